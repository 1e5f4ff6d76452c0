"""Tidy tables of many runs with their varying settings: one row per run, or per run, fold and gene."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path

import pandas as pd

from peka_lite._core.io import report_full_disk, write_file
from peka_lite._core.names import write_spreadsheet_csv
from peka_lite.evaluation.scores import pool_scores
from peka_lite.experiments._sweep_folder import SweepFolder
from peka_lite.experiments.settings import OLD_FEATURES
from peka_lite.reports._settings import OF_PROTOCOL, ROW, TRAINED, format_settings, format_value, is_untrained
from peka_lite.reports.runs import BACKBONES, ELSEWHERE, INTERVALS, Run, row_label

_EXCLUDED = ("protocol", "backbone", *ELSEWHERE)  # settings with another column, or without effect on scores


def points_table(runs: Sequence[Run], *, sweeps: Sequence[SweepFolder] = ()) -> pd.DataFrame:
    """Tabulate runs of any settings, one per row.

    Parameters
    ----------
    runs
        Of any protocols, cohorts and settings.
    sweeps
        Sweep folders of the runs: these give the order of settings, and rows for the summaries that notebooks write.

    Returns
    -------
    pandas.DataFrame
        One row per run: point (joined by ``"; "`` if several points have it), run (its folder), one column for each
        setting that varies, label, protocol, cohort, backbone, mean_pcc with ci_low and ci_high (pooled over a
        fold's test spots, on the protocol's targets), the same by slides, share_of_ceiling, seconds. Then one row per
        summary that a notebook wrote, with its scalars in columns of their names. Columns of mixed types become text.
        ``attrs`` has the title and the note.

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
    names, rows = _varying_settings(runs, sweeps), []
    for run in runs:
        pooled, slides = run.score(), run.score("slides")
        row = _identify_row(run, names)
        row |= {"mean_pcc": pooled["pcc"], "ci_low": pooled["ci_low"], "ci_high": pooled["ci_high"]}
        row |= {f"{k}_by_slides": slides[v] for k, v in (("mean_pcc", "pcc"), ("ci_low", "ci_low"))}
        row["ci_high_by_slides"] = slides["ci_high"]
        row["share_of_ceiling"] = pooled["pcc"] / run.summary["ceiling"][run.summary["normalization"]]["pcc"]
        rows.append(row | {"seconds": run.summary.get("seconds")})
    for sweep in sweeps:
        for point, scalars in sweep.summaries():
            given = {name: _to_scalar(value) for name, value in sweep.points[point].items()}
            seconds = {"seconds": sweep.seconds[point]} if point in sweep.seconds else {}
            rows.append({"point": point} | dict.fromkeys(names) | seconds | scalars | given)
    table = _unify_types(pd.DataFrame(rows, dtype=object))
    table.attrs = {
        "title": f"{len(rows)} finished {'runs' if runs else 'points'}" if len(rows) != 1 else "One finished run",
        "note": f"Mean PCC on held-out spots, on the protocol's targets; {INTERVALS}. Protocols measure different "
        "things: compare only rows of one protocol and cohort.",
    }
    return table


def metrics_table(runs: Sequence[Run], *, sweeps: Sequence[SweepFolder] = ()) -> pd.DataFrame:
    """Tabulate the PCC of each run, fold and gene.

    Returns
    -------
    pandas.DataFrame
        point, run, the settings that vary, label, protocol, cohort and backbone as in `points_table`, then fold, gene,
        pcc and the other columns of the run's ``metrics.csv``; these three alone for a run without that file.

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
    names, parts = _varying_settings(runs, sweeps), []
    for run in runs:
        if run.metrics is not None:
            table = run.metrics.replace({"features": OLD_FEATURES})
        else:
            table = pool_scores(run.moments[run.moments["normalization"] == run.summary["normalization"]])
            table = table[["fold", "gene", "pcc"]]
        first = pd.DataFrame([_identify_row(run, names)], dtype=object)
        first = first.loc[first.index.repeat(len(table))].reset_index(drop=True)
        parts.append(pd.concat([first, table[[name for name in table if name not in first]]], axis=1))
    return _unify_types(pd.concat(parts, ignore_index=True))


def setting_columns(points: pd.DataFrame) -> list[str]:
    """Return the setting columns of `points_table`: those between run and label."""
    columns = list(points)
    return columns[columns.index("run") + 1 : columns.index("label")]


def write_tidy(table: pd.DataFrame, path: str | os.PathLike) -> None:
    """Write a table as parquet and as CSV (`write_spreadsheet_csv`); `path` has no suffix."""
    path = Path(path)
    with report_full_disk(path.with_name(f"{path.name}.csv")):
        write_spreadsheet_csv(table, path.with_name(f"{path.name}.csv"), index=False)
    write_file(path.with_name(f"{path.name}.parquet"), table.to_parquet(index=False))


def describe_distinction(points: pd.DataFrame, names: Sequence[str]) -> tuple[list[str], str]:
    """Describe the varying settings of each row, for rows of one protocol and cohort.

    Returns
    -------
    texts
        One per row. If more than two settings vary, only the unusual ones, or ``"base"`` if there are none. The label
        if none of the settings affects the row.
    base
        The usual settings, those of most trained students; empty if at most two vary.
    """
    vary = [name for name in names if points[name].nunique(dropna=False) > 1]
    trained = points[~points["label"].map(is_untrained)]
    usual = {k: (points if trained.empty else trained)[k].mode(dropna=False).iloc[0] for k in vary if len(vary) > 2}
    several, texts = points["backbone"].dropna().nunique() > 1, []
    for row in points.to_dict("records"):
        used = {k: row[k] for k in vary if not (is_untrained(row["label"]) and k in TRAINED)}
        unusual = format_settings(
            {k: v for k, v in used.items() if k not in usual or format_value(v) != format_value(usual[k])}
        )
        backbone = (
            BACKBONES.get(row["backbone"], row["backbone"]) if several and isinstance(row["backbone"], str) else ""
        )
        texts.append(", ".join(filter(None, (backbone, unusual))) or ("base" if usual and used else row["label"]))
    return texts, format_settings(usual)


def shorten_for_page(points: pd.DataFrame) -> pd.DataFrame:
    """Return `points_table` for a page: without redundant columns, and with many settings as one text column."""
    shown = points.copy()
    if "label" not in shown:
        return shown
    runs, names = points[points["label"].notna()], setting_columns(points)
    rows = runs.groupby(["label", "protocol", "backbone"], dropna=False)
    redundant = [k for k in names if k in (*ROW, *OF_PROTOCOL) and (rows[k].nunique(dropna=False) == 1).all()]
    others = [k for k in names if k not in (*redundant, "seed")]
    shown = shown.drop(columns=redundant if len(others) < 4 else [*redundant, *others])
    if len(others) > 3:
        texts = [
            pd.Series(describe_distinction(group, others)[0], group.index)
            for _, group in runs.groupby(["protocol", "cohort"])
        ]
        shown.insert(list(shown).index("label"), "settings", pd.concat(texts))
    for name in set(names) & set(shown):
        shown[name] = ["" if pd.isna(value) else format_value(value) for value in points[name]]
    if shown["point"].isna().all() or shown["point"].equals(shown["run"]):
        shown = shown.drop(columns="point")
    else:
        points_of = [[] if pd.isna(text) else text.split("; ") for text in shown["point"]]
        shown["point"] = [", ".join(p[:1]) + (f" and {len(p) - 1} more" if len(p) > 1 else "") for p in points_of]
    columns = {"mean_pcc": "PCC", "ci_low": "low", "ci_high": "high", "mean_pcc_by_slides": "PCC, by slides"}
    columns |= {"share_of_ceiling": "share of ceiling"}
    shown = shown.drop(columns=["ci_low_by_slides", "ci_high_by_slides"]).rename(columns=columns)
    return shown.astype(object).where(shown.notna(), "")


def _varying_settings(runs: Sequence[Run], sweeps: Sequence[SweepFolder]) -> list[str]:
    """Return the settings that vary: first those of the sweeps, then others in which configs differ."""
    named = dict.fromkeys(name for sweep in sweeps for name in sweep.varied)
    fields = dict.fromkeys(name for run in runs for name in run.config)
    differ = (k for k in fields if len({_hashable(run.config[k]) for run in runs if k in run.config}) > 1)
    return [name for name in dict.fromkeys([*named, *differ]) if not (runs and name in _EXCLUDED)]


def _identify_row(run: Run, names: Iterable[str]) -> dict:
    given = run.config | {k: v for k, v in run.varied.items() if k not in run.config}
    row = {"point": "; ".join(run.points) or None, "run": run.name}
    row |= {name: _to_scalar(given[name]) if name in given else None for name in names}
    row |= {"label": row_label(run), "protocol": run.summary["protocol"]}
    return row | {"cohort": run.named_cohort, "backbone": run.backbone}


def _hashable(value):
    return tuple(value) if isinstance(value, list) else value


def _to_scalar(value):
    return format_value(value) if value is None or isinstance(value, list | tuple | dict) else value


def _unify_types(table: pd.DataFrame) -> pd.DataFrame:
    """Convert each column to one type: numbers, booleans, or text (None where missing)."""
    columns = {}
    for name, column in table.items():
        if column.dtype != object or name == "gene":  # format_value would cut names with a slash
            columns[name] = column
            continue
        if not (known := [value for value in column if not (value is None or value != value)]):
            columns[name] = column if all(value is None for value in column) else column.astype(float)
            continue
        is_bool = [isinstance(value, bool) for value in known]
        if all(is_bool):
            columns[name] = column.astype(bool) if len(known) == len(column) else column.where(column.notna(), None)
        elif not any(is_bool) and all(isinstance(value, int | float) for value in known):
            columns[name] = pd.to_numeric(column)
        else:
            columns[name] = pd.Series([None if v is None or v != v else format_value(v) for v in column], dtype=object)
    return pd.DataFrame(columns, index=table.index)
