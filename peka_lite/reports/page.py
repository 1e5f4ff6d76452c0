"""Write a report: all tables and figures of a set of runs, in one folder."""

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
from peka_lite._core.progress import logger, stage
from peka_lite.experiments._sweep_folder import SweepFolder, is_sweep, read_sweep_folder
from peka_lite.reports._effects import effects_table
from peka_lite.reports._settings import average_seeds, format_settings, split_by_settings
from peka_lite.reports.paper_tables import table1, table2
from peka_lite.reports.points import metrics_table, points_table, shorten_for_page, write_tidy
from peka_lite.reports.runs import PROTOCOLS, TARGETS, Run, group_runs, read_runs, row_label, split_panels
from peka_lite.reports.tables import difference_table, leak_table, protocol_table, score_table

SUFFIXES = (".md", ".csv", ".parquet", ".png")


def write_report(folders: Iterable[str | os.PathLike], out: str | os.PathLike, *, replace: bool = False) -> list[Path]:
    """Write all tables (CSV and Markdown) and figures of a set of runs, and ``report.md`` that shows them.

    ``points`` and ``metrics`` (CSV and parquet) list every run and every gene's PCC. For the other tables and figures,
    runs that differ only in their seed are averaged. If other settings differ, these tables and figures are of the
    reference settings (`split_by_settings`), and ``effects`` compares the other settings with them.

    Parameters
    ----------
    folders
        As for `read_runs`: run folders, folders of those, or folders of sweeps.
    out
        Folder to create; it appears when the report is complete. With several protocols, the file names of Table 1,
        Table 2 and Figure 2 include the protocol.
    replace
        Replace an existing report.

    Returns
    -------
    list of pathlib.Path
        The files written.

    Raises
    ------
    FileExistsError
        If `out` exists, also if another process creates it first; with `replace`, if it is not a report or has files
        that `write_report` does not write.

    Examples
    --------
    >>> import peka_lite as pk
    >>> small = {"method": "none", "slides": ["MINI3"], "split": "spot", "n_splits": 2, "n_genes": 10}
    >>> _ = pk.load_or_run(pk.RunConfig(features="depth", **small), "depth", maps=False)
    >>> files = pk.write_report(["depth"], "report")
    >>> [path.name for path in files if path.suffix == ".md"]
    ['protocol_mini-MINI3_custom.md', 'report.md', 'scores_mini-MINI3_custom.md', 'table1.md', 'table2.md']
    >>> [path.name for path in files if path.suffix in (".parquet", ".png")]
    ['figure2.png', 'metrics.parquet', 'points.parquet', 'points.png']
    """
    out, folders = Path(out), [Path(folder) for folder in folders]
    _check_out(out, replace)
    with lock(out):
        return _write_report(folders, out, replace)


def _write_report(folders: Sequence[Path], out: Path, replace: bool) -> list[Path]:
    _check_out(out, replace)  # another process may have created it before the lock
    with stage("reading the runs"):
        runs = read_runs(folders)
        sweeps = [read_sweep_folder(folder) for folder in folders if is_sweep(folder)]
    logger.info(f"plan: tables and figures of {len(runs)} {'run' if len(runs) == 1 else 'runs'}")
    with tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as scratch:
        page = _Page(Path(scratch) / out.name, sweeps)
        with stage("points"):
            _add_points(page, runs, sweeps)
        if runs:
            reference, others, reference_settings = split_by_settings(average_seeds(runs))
            if others:
                with stage("effects of settings"):
                    _add_effects(page, reference, others, reference_settings)
            with stage("tables and figures of each protocol"):
                _add_protocols(page, reference)
            with stage("leaks"):
                _add_leaks(page, reference)
        written, old = page.finish(), Path(scratch) / "old"
        with defer_signals():  # no report exists between the two moves
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
    """A report being written: its folder, and the parts of ``report.md``."""

    def __init__(self, folder: Path, sweeps: Sequence[SweepFolder]):
        self.folder, self.file_names = folder, {}
        titles = [escape_markdown(sweep.title) for sweep in sweeps]
        self.parts = [f"# {titles[0]}" if len(sweeps) == 1 else "# Report"]
        for name, sweep in zip(titles, sweeps, strict=True):
            self.add((f"{name}: " if len(sweeps) > 1 else "") + sweep.describe())
        folder.mkdir()

    def add(self, text: str) -> None:
        self.parts.append(text)

    def add_tables(self, name: str, tables: dict[str, pd.DataFrame]) -> None:
        path = self.folder / unique_file_name(name, self.file_names)
        _write_tables(path, tables)
        self.add(path.with_name(f"{path.name}.md").read_text("utf-8"))

    def add_figure(self, name: str, figure) -> None:
        import matplotlib.pyplot as plt

        file = f"{unique_file_name(name, self.file_names)}.png"
        write_file(self.folder / file, figure_bytes(figure, dpi=120))
        plt.close(figure)
        self.add(f"![{escape_markdown(name)}]({file})")

    def finish(self) -> list[str]:
        text = "\n\n".join(part.strip() for part in self.parts) + "\n"
        write_file(self.folder / "report.md", text.encode())
        return sorted(path.name for path in self.folder.iterdir())


def _add_points(page: _Page, runs: Sequence[Run], sweeps: Sequence[SweepFolder]) -> None:
    points = points_table(runs, sweeps=sweeps)
    write_tidy(points, page.folder / "points")
    if len(points):
        page.add(f"{format_markdown(shorten_for_page(points))}\n{points.attrs['note'] if runs else ''}")
    if not runs:
        page.add("No point has a run folder, so there are no figures and no protocol tables.")
        return
    write_tidy(metrics_table(runs, sweeps=sweeps), page.folder / "metrics")
    from peka_lite.reports._sweep_figures import sweep_figure

    page.add_figure("points", sweep_figure(points))


def _add_effects(page: _Page, reference: Sequence[Run], others: Sequence[Run], settings: dict[str, dict]) -> None:
    from peka_lite.reports._sweep_figures import effects_figure

    page.add("## Effects of settings")
    page.add(_describe_reference(settings))
    by_protocol = group_runs([*reference, *others], lambda run: run.summary["protocol"], order=PROTOCOLS)
    for protocol, group in by_protocol.items():
        for cohort, panel in split_panels(group).items():
            changed, base = ([run for run in panel if run in part] for part in (others, reference))
            if changed and base:
                table = effects_table(changed, base)
                page.add_tables(f"effects_{cohort}_{protocol}", {"": table})
                page.add_figure(f"effects_{cohort}_{protocol}", effects_figure(table))
            elif changed:
                name = escape_markdown(cohort)
                page.add(f"{name}, {protocol} protocol: no run with the reference settings, so there are no effects.")


def _add_protocols(page: _Page, runs: Sequence[Run]) -> None:
    from peka_lite.reports.figures import figure2

    by_protocol = group_runs(runs, lambda run: run.summary["protocol"], order=PROTOCOLS)
    for protocol, group in by_protocol.items():
        end = f"_{protocol}" if len(by_protocol) > 1 else ""
        page.add(f"## {protocol.capitalize()} protocol")
        page.add_tables(f"table1{end}", {"": table1(group)})
        page.add_tables(f"table2{end}", {"": table2(group)})
        page.add_figure(f"figure2{end}", figure2(group))
        for cohort, panel in split_panels(group).items():
            name = f"{cohort}_{protocol}"
            targets = _order_targets(panel)
            page.add_tables(f"protocol_{name}", {m: protocol_table(panel, normalization=m) for m in targets})
            page.add_tables(f"scores_{name}", {m: score_table(panel, normalization=m) for m in targets})
            if "frozen" in (rows := [row_label(run) for run in panel]) and len(rows) > 1:
                page.add_tables(f"differences_{name}", {m: difference_table(panel, normalization=m) for m in targets})
            else:
                page.add(f"No differences for {escape_markdown(cohort)}: these need a frozen student and another row.")


def _add_leaks(page: _Page, runs: Sequence[Run]) -> None:
    from peka_lite.reports.figures import leak_figure

    page.add("## Effect of leakage")
    for cohort, panel in split_panels([run for run in runs if run.summary["protocol"] != "custom"]).items():
        if len({run.summary["protocol"] for run in panel}) < 2:
            page.add(f"{escape_markdown(cohort)}: one protocol only, so there is nothing to compare.")
            continue
        page.add_tables(f"leak_{cohort}", {"": leak_table(panel)})
        page.add_figure(f"leak_{cohort}", leak_figure(panel))


def _describe_reference(settings: dict[str, dict]) -> str:
    texts = {cohort: format_settings(values) for cohort, values in settings.items() if values}
    if len(texts) == len(settings) and len(set(texts.values())) == 1:
        text = next(iter(texts.values()))
    else:
        text = "; ".join(f"{cohort}: {text}" for cohort, text in texts.items())
    text = escape_markdown(text)
    return f"Reference settings: {text}. All tables and figures after this section are of runs with these settings."


def _check_out(out: Path, replace: bool) -> None:
    if not replace or not out.exists():
        check_free(out)
        return
    if not (out / "report.md").is_file():
        raise FileExistsError(f"{out} exists and is not a report (it has no report.md): give another --out")
    if foreign := [p.name for p in sorted(out.iterdir()) if not p.is_file() or p.suffix not in SUFFIXES]:
        raise FileExistsError(f"{out} has files of no report ({', '.join(foreign[:3])}): move them away first")


def format_markdown(table: pd.DataFrame) -> str:
    """Return a table as GitHub Markdown, with three decimals, and nothing or ``attrs["missing"]`` for NaN."""
    flat = table.reset_index() if any(table.index.names) else table
    lines = [[_format_cell(str(column).strip()) for column in flat]]
    missing = table.attrs.get("missing", "")
    lines += [[_format_cell(value, missing) for value in row] for row in flat.itertuples(index=False)]
    lines = [[escape_markdown(text) for text in line] for line in lines]
    return "".join(f"| {' | '.join(line)} |\n" for line in [lines[0], ["---"] * flat.shape[1], *lines[1:]])


def _order_targets(runs: Sequence[Run]) -> list[str]:
    default = runs[0].summary["normalization"]
    return [default, *(m for m in TARGETS if m != default)]


def _write_tables(path: Path, tables: dict[str, pd.DataFrame]) -> None:
    """Write tables to one CSV (with a column of targets if there are several) and one Markdown file."""
    whole = pd.concat(tables, names=["targets"]) if len(tables) > 1 else next(iter(tables.values()))
    with report_full_disk(path.with_name(path.name + ".csv")):
        write_spreadsheet_csv(whole, path.with_name(path.name + ".csv"), index=True)
    texts = [
        f"### {escape_markdown(t.attrs['title'])}\n\n{format_markdown(t)}\n{escape_markdown(t.attrs['note'])}\n"
        for t in tables.values()
    ]
    write_file(path.with_name(path.name + ".md"), "\n".join(texts).encode())


def _format_cell(value: object, missing: str = "") -> str:
    if isinstance(value, float):
        return missing if pd.isna(value) else f"{value:.3f}"
    return short_name(str(value), longest=200)
