"""A report: every table and figure that a set of runs allows, in one folder."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path

import pandas as pd

from peka_lite._core._signals import defer_signals
from peka_lite._core.io import figure_bytes, report_full_disk, write_file
from peka_lite._core.locks import lock, move_if_absent
from peka_lite._core.names import escape_markdown, short_name, unique_file_name, write_spreadsheet_csv
from peka_lite._core.outputs import check_free
from peka_lite._core.progress import Stage, print_line
from peka_lite.experiments._sweep_folder import SweepFolder, is_sweep, read_sweep_folder
from peka_lite.reports._effects import effects_table
from peka_lite.reports._settings import average_seeds, format_settings, split_by_settings
from peka_lite.reports.paper import table1, table2
from peka_lite.reports.points import metrics_table, points_table, shorten_for_page, write_tidy
from peka_lite.reports.runs import PROTOCOLS, TARGETS, Run, group_runs, read_runs, row_label, split_panels
from peka_lite.reports.tables import difference_table, leak_table, protocol_table

MADE = (".md", ".csv", ".parquet", ".png")


def write_report(folders: Iterable[str | os.PathLike], out: str | os.PathLike, *, replace: bool = False) -> list[Path]:
    """Write every table (CSV and Markdown) and figure that the runs allow, and ``report.md`` which binds them.

    ``points`` and ``metrics`` (CSV and parquet) hold every run and every PCC of a gene. Then runs that differ in their
    seed alone are averaged; where other settings differ, tables and figures are of the reference settings
    (`split_by_settings`), and ``effects`` tell what the others are worth.

    Parameters
    ----------
    folders
        As for `read_runs`: run folders, folders of those, or folders of sweeps.
    out
        Folder to make; it appears when the report is complete. Table 1, Table 2 and Figure 2 carry the protocol in
        their file names where there are several.
    replace
        Put the new report in the place of one that is there.

    Returns
    -------
    list of pathlib.Path
        The files written.

    Raises
    ------
    FileExistsError
        If `out` is there already, or when another process that is at work on it is through; with `replace`, if it is
        no report, or holds what no report makes.

    Examples
    --------
    >>> import peka_lite as pk
    >>> small = {"method": "none", "slides": ["MINI3"], "split": "spot", "n_splits": 2, "n_genes": 10}
    >>> _ = pk.load_or_run(pk.RunConfig(features="depth", **small), "depth", maps=False)
    >>> files = pk.write_report(["depth"], "report")
    >>> [path.name for path in files if path.suffix == ".csv"]
    ['metrics.csv', 'points.csv', 'protocol_mini-MINI3_custom.csv', 'table1.csv', 'table2.csv']
    >>> [path.name for path in files if path.suffix in (".md", ".png")]
    ['figure2.png', 'points.png', 'protocol_mini-MINI3_custom.md', 'report.md', 'table1.md', 'table2.md']
    """
    out, folders = Path(out), [Path(folder) for folder in folders]
    _check_free(out, replace)
    with lock(out):
        return _write_report(folders, out, replace)


def _write_report(folders: Sequence[Path], out: Path, replace: bool) -> list[Path]:
    _check_free(out, replace)  # another process may have been first
    with Stage("reading the runs"):
        runs = read_runs(folders)
        sweeps = [read_sweep_folder(folder) for folder in folders if is_sweep(folder)]
    print_line(f"plan: tables and figures of {len(runs)} {'run' if len(runs) == 1 else 'runs'}")
    with tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as scratch:
        page = _Page(Path(scratch) / out.name, sweeps)
        with Stage("points"):
            _add_points(page, runs, sweeps)
        if runs:
            reference, others, told = split_by_settings(average_seeds(runs))
            if others:
                with Stage("effects of settings"):
                    _add_effects(page, reference, others, told)
            with Stage("tables and figures of each protocol"):
                _add_protocols(page, reference)
            with Stage("leaks"):
                _add_leaks(page, reference)
        written, old = page.end(), Path(scratch) / "old"
        with defer_signals():  # between the two there is no report
            if replace and out.exists():
                os.replace(out, old)
            try:
                move_if_absent(page.folder, out)
            except OSError:
                if old.exists():
                    os.replace(old, out)
                raise
    return [out / name for name in written]


class _Page:
    """A report in the making: its folder, and the parts of ``report.md``."""

    def __init__(self, folder: Path, sweeps: Sequence[SweepFolder]):
        self.folder, self.given = folder, {}
        titles = [escape_markdown(sweep.title) for sweep in sweeps]
        self.parts = [f"# {titles[0]}" if len(sweeps) == 1 else "# Report"]
        for name, sweep in zip(titles, sweeps, strict=True):
            self.add((f"{name}: " if len(sweeps) > 1 else "") + sweep.told())
        folder.mkdir()

    def add(self, text: str) -> None:
        self.parts.append(text)

    def put(self, name: str, tables: dict[str, pd.DataFrame]) -> None:
        path = self.folder / unique_file_name(name, self.given)
        _write_tables(path, tables)
        self.add(path.with_name(f"{path.name}.md").read_text("utf-8"))

    def draw(self, name: str, figure) -> None:
        import matplotlib.pyplot as plt

        file = f"{unique_file_name(name, self.given)}.png"
        write_file(self.folder / file, figure_bytes(figure, dpi=120))
        plt.close(figure)
        self.add(f"![{escape_markdown(name)}]({file})")

    def end(self) -> list[str]:
        text = "\n\n".join(part.strip() for part in self.parts) + "\n"
        write_file(self.folder / "report.md", text.encode())
        return sorted(path.name for path in self.folder.iterdir())


def _add_points(page: _Page, runs: Sequence[Run], sweeps: Sequence[SweepFolder]) -> None:
    points = points_table(runs, sweeps=sweeps)
    write_tidy(points, page.folder / "points")
    if len(points):
        page.add(f"{markdown(shorten_for_page(points))}\n{points.attrs['note'] if runs else ''}")
    if not runs:
        page.add("No point holds a run folder, so there is nothing to draw and no protocol's table.")
        return
    write_tidy(metrics_table(runs, sweeps=sweeps), page.folder / "metrics")
    from peka_lite.reports._sweep_figures import sweep_figure

    page.draw("points", sweep_figure(points))


def _add_effects(page: _Page, reference: Sequence[Run], others: Sequence[Run], told: dict[str, dict]) -> None:
    from peka_lite.reports._sweep_figures import effects_figure

    page.add("## Effects of settings")
    page.add(_reference_in_words(told))
    for protocol, everything in group_runs(
        [*reference, *others], lambda run: run.summary["protocol"], order=PROTOCOLS
    ).items():
        for cohort, together in split_panels(everything).items():
            changed, base = ([run for run in together if run in part] for part in (others, reference))
            if changed and base:
                table = effects_table(changed, base)
                page.put(f"effects_{cohort}_{protocol}", {"": table})
                page.draw(f"effects_{cohort}_{protocol}", effects_figure(table))
            elif changed:
                name = escape_markdown(cohort)
                page.add(f"{name}, {protocol} protocol: no run of the reference settings, so there are no effects.")


def _add_protocols(page: _Page, runs: Sequence[Run]) -> None:
    from peka_lite.reports.figures import figure2

    by_protocol = group_runs(runs, lambda run: run.summary["protocol"], order=PROTOCOLS)
    for protocol, here in by_protocol.items():
        end = f"_{protocol}" if len(by_protocol) > 1 else ""
        page.add(f"## {protocol.capitalize()} protocol")
        page.put(f"table1{end}", {"": table1(here)})
        page.put(f"table2{end}", {"": table2(here)})
        page.draw(f"figure2{end}", figure2(here))
        for cohort, together in split_panels(here).items():
            name = f"{cohort}_{protocol}"
            targets = _targets(together)
            page.put(f"protocol_{name}", {m: protocol_table(together, normalization=m) for m in targets})
            if "frozen" in (rows := [row_label(run) for run in together]) and len(rows) > 1:
                page.put(f"differences_{name}", {m: difference_table(together, normalization=m) for m in targets})
            else:
                page.add(f"No differences for {escape_markdown(cohort)}: they need a frozen student and another row.")


def _add_leaks(page: _Page, runs: Sequence[Run]) -> None:
    from peka_lite.reports.figures import leak_figure

    page.add("## What leaks are worth")
    for cohort, together in split_panels([run for run in runs if run.summary["protocol"] != "custom"]).items():
        if len({run.summary["protocol"] for run in together}) < 2:
            page.add(f"{escape_markdown(cohort)}: one protocol only, so there is nothing to set side by side.")
            continue
        page.put(f"leak_{cohort}", {"": leak_table(together)})
        page.draw(f"leak_{cohort}", leak_figure(together))


def _reference_in_words(told: dict[str, dict]) -> str:
    words = {cohort: format_settings(found) for cohort, found in told.items() if found}
    if len(words) == len(told) and len(set(words.values())) == 1:
        said = next(iter(words.values()))
    else:
        said = "; ".join(f"{cohort}: {text}" for cohort, text in words.items())
    said = escape_markdown(said)
    return f"Reference settings: {said}. All tables and figures after this section are of runs with these settings."


def _check_free(out: Path, replace: bool) -> None:
    if not replace or not out.exists():
        check_free(out)
        return
    if not (out / "report.md").is_file():
        raise FileExistsError(f"{out} is there already and is no report (no report.md in it): give another --out")
    if strange := [p.name for p in sorted(out.iterdir()) if not p.is_file() or p.suffix not in MADE]:
        raise FileExistsError(f"{out} holds what no report makes ({', '.join(strange[:3])}); move that away first")


def markdown(table: pd.DataFrame) -> str:
    """Return a table as GitHub's Markdown: three decimals, empty where there is no value."""
    flat = table.reset_index() if any(table.index.names) else table
    lines = [[_cell(str(column).strip()) for column in flat]]
    lines += [[_cell(value) for value in row] for row in flat.itertuples(index=False)]
    lines = [[escape_markdown(text) for text in line] for line in lines]
    return "".join(f"| {' | '.join(line)} |\n" for line in [lines[0], ["---"] * flat.shape[1], *lines[1:]])


def _targets(runs: Sequence[Run]) -> list[str]:
    own = runs[0].summary["normalization"]
    return [own, *(m for m in TARGETS if m != own)]


def _write_tables(path: Path, tables: dict[str, pd.DataFrame]) -> None:
    """Write one CSV (with a column of targets where there are several tables) and one Markdown file."""
    whole = pd.concat(tables, names=["targets"]) if len(tables) > 1 else next(iter(tables.values()))
    with report_full_disk(path.with_name(path.name + ".csv")):
        write_spreadsheet_csv(whole, path.with_name(path.name + ".csv"), index=True)
    told = [(escape_markdown(t.attrs["title"]), markdown(t), escape_markdown(t.attrs["note"])) for t in tables.values()]
    texts = [f"### {title}\n\n{table}\n{note}\n" for title, table, note in told]
    write_file(path.with_name(path.name + ".md"), "\n".join(texts).encode())


def _cell(value: object) -> str:
    if isinstance(value, float):
        return "" if pd.isna(value) else f"{value:.3f}"
    return short_name(str(value), longest=200)
