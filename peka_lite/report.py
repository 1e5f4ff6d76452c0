"""A report: every table and figure that a set of runs allows, in one folder."""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path

import pandas as pd

from peka_lite.paper_tables import table1, table2
from peka_lite.report_runs import PROTOCOLS, TARGETS, Run, group, label, panels, read_runs
from peka_lite.report_tables import difference_table, leak_table, protocol_table


def write_report(folders: Iterable[str | os.PathLike], out: str | os.PathLike) -> list[Path]:
    """Write every table (CSV and Markdown) and figure that the runs allow, and ``report.md`` which binds them.

    Parameters
    ----------
    folders
        As for `read_runs`.
    out
        Folder to make; it appears when the report is complete. Table 1, Table 2 and Figure 2 carry the protocol in
        their file names where there are several.

    Returns
    -------
    list of pathlib.Path
        The files written.

    Raises
    ------
    FileExistsError
        If `out` is there already.
    """
    import matplotlib.pyplot as plt

    from peka_lite.report_figures import figure2, leak_figure

    out = Path(out)
    if out.exists():
        raise FileExistsError(f"{out} is there already; name another folder or remove it")
    runs = read_runs(folders)
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as scratch:
        work = Path(scratch) / out.name
        work.mkdir()
        page = ["# Report", _run_list(runs)]

        def put(name: str, tables: dict[str, pd.DataFrame]) -> None:
            _write_tables(work / _file_name(name), tables)
            page.append((work / f"{_file_name(name)}.md").read_text("utf-8"))

        def draw(name: str, figure) -> None:
            figure.savefig(work / f"{_file_name(name)}.png", dpi=120)
            plt.close(figure)
            page.append(f"![{name}]({_file_name(name)}.png)")

        by_protocol = group(runs, lambda run: run.summary["protocol"], order=PROTOCOLS)
        for protocol, here in by_protocol.items():
            end = f"_{protocol}" if len(by_protocol) > 1 else ""
            page.append(f"## {protocol.capitalize()} protocol")
            put(f"table1{end}", {"": table1(here)})
            put(f"table2{end}", {"": table2(here)})
            draw(f"figure2{end}", figure2(here))
            for cohort, together in panels(here).items():
                name = f"{cohort}_{protocol}"
                targets = _targets(together)
                put(f"protocol_{name}", {m: protocol_table(together, normalization=m) for m in targets})
                if "frozen" in (rows := [label(run) for run in together]) and len(rows) > 1:
                    put(f"differences_{name}", {m: difference_table(together, normalization=m) for m in targets})
                else:
                    page.append(f"No differences for {cohort}: they need a frozen student and another row.")
        page.append("## What leaks are worth")
        named = [run for run in runs if run.summary["protocol"] != "custom"]
        for cohort, together in panels(named).items():
            if len({run.summary["protocol"] for run in together}) < 2:
                page.append(f"{cohort}: one protocol only, so there is nothing to set side by side.")
                continue
            put(f"leak_{cohort}", {"": leak_table(together)})
            draw(f"leak_{cohort}", leak_figure(together))
        (work / "report.md").write_text("\n\n".join(part.strip() for part in page) + "\n", "utf-8")
        written = sorted(path.name for path in work.iterdir())
        os.replace(work, out)
    return [out / name for name in written]


def markdown(table: pd.DataFrame) -> str:
    """Return a table as GitHub's Markdown: three decimals, empty where there is no value."""
    flat = table.reset_index() if any(table.index.names) else table
    lines = [[str(column).strip() for column in flat], ["---"] * flat.shape[1]]
    lines += [[_cell(value) for value in row] for row in flat.itertuples(index=False)]
    return "".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |\n" for line in lines)


def _targets(runs: Sequence[Run]) -> list[str]:
    own = runs[0].summary["normalization"]
    return [own, *(m for m in TARGETS if m != own)]


def _write_tables(path: Path, tables: dict[str, pd.DataFrame]) -> None:
    """Write one CSV (with a column of targets where there are several tables) and one Markdown file."""
    whole = pd.concat(tables, names=["targets"]) if len(tables) > 1 else next(iter(tables.values()))
    whole.to_csv(path.with_name(path.name + ".csv"))
    texts = [f"### {t.attrs['title']}\n\n{markdown(t)}\n{t.attrs['note']}\n" for t in tables.values()]
    path.with_name(path.name + ".md").write_text("\n".join(texts), "utf-8")


def _run_list(runs: Sequence[Run]) -> str:
    rows = [
        {"run": run.name, "protocol": run.summary["protocol"], "cohort": run.named_cohort,
         "student": run.backbone or "", "row": label(run)}
        for run in runs
    ]  # fmt: skip
    return markdown(pd.DataFrame(rows))


def _file_name(name: str) -> str:
    return re.sub(r"[^\w.-]+", "-", name).strip("-")


def _cell(value: object) -> str:
    if isinstance(value, float):
        return "" if pd.isna(value) else f"{value:.3f}"
    return str(value)
