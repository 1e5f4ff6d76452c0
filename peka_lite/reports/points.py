"""Tidy tables of many runs: one row a run, and one row a run, fold and gene, with every setting that varies."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path

import pandas as pd

from peka_lite._core.io import report_full_disk, write_file
from peka_lite._core.names import read_metrics, write_spreadsheet_csv
from peka_lite.evaluation.scores import pool_pcc
from peka_lite.experiments._sweep_folder import SweepFolder
from peka_lite.reports._settings import OF_PROTOCOL, ROW, TRAINED, UNTRAINED, format_settings, format_value
from peka_lite.reports.runs import BACKBONES, ELSEWHERE, INTERVALS, Run, row_label

_OWN = ("protocol", "backbone", *ELSEWHERE)  # settings that have a column anyway, or decide no number


def points_table(runs: Sequence[Run], *, sweeps: Sequence[SweepFolder] = ()) -> pd.DataFrame:
    """Put runs under each other, whatever their settings.

    Parameters
    ----------
    runs
        Of any protocols, cohorts and settings.
    sweeps
        Folders they came from: these give the order of settings, and rows of summaries that are a notebook's own.

    Returns
    -------
    pandas.DataFrame
        One row a run: point (several, joined by ``"; "``, where they made the same run), run (its folder), one column
        for each setting that varies, label, protocol, cohort, backbone, mean_pcc with ci_low and ci_high (pooled over
        a fold's test spots, on the protocol's own targets), the same by slides, share_of_ceiling, seconds. Then one
        row a summary of a notebook's own, its scalars in columns of their names. A column of several types is text.
        ``attrs`` holds title and note.

    Examples
    --------
    >>> import peka_lite as pk
    >>> small = {"method": "none", "slides": ["MINI3"], "split": "spot", "n_splits": 2, "n_genes": 10}
    >>> for features in ("coordinates", "depth"):
    ...     _ = pk.load_or_run(pk.RunConfig(features=features, **small), features, maps=False)
    >>> table = pk.reports.points_table(pk.reports.read_runs(["coordinates", "depth"]))
    >>> table[["run", "label", "protocol", "backbone", "mean_pcc", "share_of_ceiling"]].round(2)
               run        label protocol backbone  mean_pcc  share_of_ceiling
    0  coordinates  coordinates   custom     None      0.12              0.21
    1        depth  total count   custom     None     -0.01             -0.02
    """
    names, rows = _varied(runs, sweeps), []
    for run in runs:
        own, slides = run.score(), run.score("slides")
        row = _identity(run, names)
        row |= {"mean_pcc": own["pcc"], "ci_low": own["ci_low"], "ci_high": own["ci_high"]}
        row |= {f"{k}_by_slides": slides[v] for k, v in (("mean_pcc", "pcc"), ("ci_low", "ci_low"))}
        row["ci_high_by_slides"] = slides["ci_high"]
        row["share_of_ceiling"] = own["pcc"] / run.summary["ceiling"][run.summary["normalization"]]["pcc"]
        rows.append(row | {"seconds": run.summary.get("seconds")})
    for sweep in sweeps:
        for point, scalars in sweep.summaries():
            given = {name: _plain(value) for name, value in sweep.points[point].items()}
            seconds = {"seconds": sweep.seconds[point]} if point in sweep.seconds else {}
            rows.append({"point": point} | dict.fromkeys(names) | seconds | scalars | given)
    table = _of_one_type(pd.DataFrame(rows, dtype=object))
    table.attrs = {
        "title": f"{len(rows)} finished {'runs' if runs else 'points'}" if len(rows) != 1 else "One finished run",
        "note": f"Mean PCC on held-out spots, on the protocol's own targets; {INTERVALS}. Protocols answer different "
        "questions: compare rows of one protocol and cohort.",
    }
    return table


def metrics_table(runs: Sequence[Run], *, sweeps: Sequence[SweepFolder] = ()) -> pd.DataFrame:
    """Stack the runs' PCCs: one row a run, fold and gene.

    Returns
    -------
    pandas.DataFrame
        point, run, the settings that vary, label, protocol, cohort and backbone as in `points_table`, then fold, gene,
        pcc and the other columns of the run's ``metrics.csv``; a run without that file gives these three.

    Examples
    --------
    >>> import peka_lite as pk
    >>> small = {"method": "none", "slides": ["MINI3"], "split": "spot", "n_splits": 2, "n_genes": 10}
    >>> _ = pk.load_or_run(pk.RunConfig(features="depth", **small), "depth", maps=False)
    >>> table = pk.reports.metrics_table(pk.reports.read_runs(["depth"]))
    >>> table[["run", "label", "protocol", "fold", "gene", "pcc"]].head(3).round(2)
         run        label protocol  fold    gene   pcc
    0  depth  total count   custom     0   ADH1B  0.04
    1  depth  total count   custom     0  ELAVL1 -0.13
    2  depth  total count   custom     0   MUC16 -0.01
    """
    names, parts = _varied(runs, sweeps), []
    for run in runs:
        path = run.folder and run.folder / "metrics.csv"
        if path and path.is_file():
            table = read_metrics(path, within=run.within)
        else:
            table = pool_pcc(run.moments[run.moments["normalization"] == run.summary["normalization"]])
            table = table[["fold", "gene", "pcc"]]
        first = pd.DataFrame([_identity(run, names)], dtype=object)
        first = first.loc[first.index.repeat(len(table))].reset_index(drop=True)
        parts.append(pd.concat([first, table[[name for name in table if name not in first]]], axis=1))
    return _of_one_type(pd.concat(parts, ignore_index=True))


def setting_columns(points: pd.DataFrame) -> list[str]:
    """Return the columns of `points_table` that hold settings: those between run and label."""
    columns = list(points)
    return columns[columns.index("run") + 1 : columns.index("label")]


def write_tidy(table: pd.DataFrame, path: str | os.PathLike) -> None:
    """Write a table as parquet, and as CSV for spreadsheets (`write_spreadsheet_csv`); `path` is without suffix."""
    path = Path(path)
    with report_full_disk(path.with_name(f"{path.name}.csv")):
        write_spreadsheet_csv(table, path.with_name(f"{path.name}.csv"), index=False)
    write_file(path.with_name(f"{path.name}.parquet"), table.to_parquet(index=False))


def describe_distinction(points: pd.DataFrame, names: Sequence[str]) -> tuple[list[str], str]:
    """Say in words what sets each row of one protocol and cohort apart, of the settings `names`.

    Returns
    -------
    words
        Of each row. Where more than two settings vary, only what is not usual, and ``"base"`` where all is; a label
        where the row feels none of them.
    base
        The usual settings, those of most taught students; empty where no more than two vary.
    """
    vary = [name for name in names if points[name].nunique(dropna=False) > 1]
    taught = points[~points["label"].isin(UNTRAINED)]
    usual = {k: (points if taught.empty else taught)[k].mode(dropna=False).iloc[0] for k in vary if len(vary) > 2}
    several, words = points["backbone"].dropna().nunique() > 1, []
    for row in points.to_dict("records"):
        felt = {k: row[k] for k in vary if not (row["label"] in UNTRAINED and k in TRAINED)}
        told = format_settings(
            {k: v for k, v in felt.items() if k not in usual or format_value(v) != format_value(usual[k])}
        )
        backbone = (
            BACKBONES.get(row["backbone"], row["backbone"]) if several and isinstance(row["backbone"], str) else ""
        )
        words.append(", ".join(filter(None, (backbone, told))) or ("base" if usual and felt else row["label"]))
    return words, format_settings(usual)


def shorten_for_page(points: pd.DataFrame) -> pd.DataFrame:
    """Return `points_table` as a page shows it: no column that says nothing new; many settings as one, in words."""
    shown = points.copy()
    if "label" not in shown:
        return shown
    runs, names = points[points["label"].notna()], setting_columns(points)
    rows = runs.groupby(["label", "protocol", "backbone"], dropna=False)
    told = [k for k in names if k in (*ROW, *OF_PROTOCOL) and (rows[k].nunique(dropna=False) == 1).all()]
    others = [k for k in names if k not in (*told, "seed")]
    shown = shown.drop(columns=told if len(others) < 4 else [*told, *others])
    if len(others) > 3:
        words = [
            pd.Series(describe_distinction(here, others)[0], here.index)
            for _, here in runs.groupby(["protocol", "cohort"])
        ]
        shown.insert(list(shown).index("label"), "settings", pd.concat(words))
    for name in set(names) & set(shown):
        shown[name] = ["" if pd.isna(value) else format_value(value) for value in points[name]]
    if shown["point"].isna().all() or shown["point"].equals(shown["run"]):
        shown = shown.drop(columns="point")
    else:
        told = [[] if pd.isna(text) else text.split("; ") for text in shown["point"]]
        shown["point"] = [", ".join(t[:1]) + (f" and {len(t) - 1} more" if len(t) > 1 else "") for t in told]
    columns = {"mean_pcc": "PCC", "ci_low": "low", "ci_high": "high", "mean_pcc_by_slides": "PCC, by slides"}
    columns |= {"share_of_ceiling": "share of ceiling"}
    shown = shown.drop(columns=["ci_low_by_slides", "ci_high_by_slides"]).rename(columns=columns)
    return shown.astype(object).where(shown.notna(), "")


def _varied(runs: Sequence[Run], sweeps: Sequence[SweepFolder]) -> list[str]:
    """Return settings that vary: those that sweeps name, then others in which configs differ."""
    named = dict.fromkeys(name for sweep in sweeps for name in sweep.varied)
    fields = dict.fromkeys(name for run in runs for name in run.config)
    differ = (k for k in fields if len({_hashable(run.config[k]) for run in runs if k in run.config}) > 1)
    return [name for name in dict.fromkeys([*named, *differ]) if not (runs and name in _OWN)]


def _identity(run: Run, names: Iterable[str]) -> dict:
    given = run.config | {k: v for k, v in run.varied.items() if k not in run.config}
    row = {"point": "; ".join(run.points) or None, "run": run.name}
    row |= {name: _plain(given[name]) if name in given else None for name in names}
    return row | {
        "label": row_label(run), "protocol": run.summary["protocol"], "cohort": run.named_cohort, "backbone": run.backbone
    }  # fmt: skip


def _hashable(value):
    return tuple(value) if isinstance(value, list) else value


def _plain(value):
    return format_value(value) if value is None or isinstance(value, list | tuple | dict) else value


def _of_one_type(table: pd.DataFrame) -> pd.DataFrame:
    """Give each column one type: numbers, truth values, or text (None where there is nothing)."""
    columns = {}
    for name, column in table.items():
        if column.dtype != object or name == "gene":  # whose names may hold a slash
            columns[name] = column
            continue
        if not (known := [value for value in column if not (value is None or value != value)]):
            columns[name] = column if all(value is None for value in column) else column.astype(float)
            continue
        truths = [isinstance(value, bool) for value in known]
        if all(truths):
            columns[name] = column.astype(bool) if len(known) == len(column) else column.where(column.notna(), None)
        elif not any(truths) and all(isinstance(value, int | float) for value in known):
            columns[name] = pd.to_numeric(column)
        else:
            columns[name] = pd.Series([None if v is None or v != v else format_value(v) for v in column], dtype=object)
    return pd.DataFrame(columns, index=table.index)
