"""Differences between runs of other settings and runs of the reference settings."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pandas as pd

from peka_lite.evaluation.scores import bootstrap_difference
from peka_lite.reports._settings import format_settings, run_settings, seed_sd
from peka_lite.reports.runs import INTERVALS, Run, group_runs, row_label, sort_rows, table_title


def effects_table(others: Sequence[Run], reference: Sequence[Run]) -> pd.DataFrame:
    """Compare runs of other settings with the same row of the reference settings.

    Parameters
    ----------
    others, reference
        From `split_by_settings`, of one protocol, cohort and backbone (and controls).

    Returns
    -------
    pandas.DataFrame
        One row per run of `others`, indexed by the settings that differ from the reference (as text) and by features
        (`row_label`): mean PCC on the protocol's targets with its interval, PCC by slides, difference to the reference
        with its paired 95% interval, and a note where it is missing. Means over seeds also have their standard
        deviation. ``attrs`` has the title, the note and the reference settings (as text).

    Raises
    ------
    ValueError
        If a list is empty, or the runs are not of one protocol and cohort.

    Examples
    --------
    >>> import peka_lite as pk
    >>> small = {"features": "coordinates", "method": "none", "slides": ["MINI3"], "n_splits": 2, "n_genes": 10}
    >>> for share in (1.0, 0.25):
    ...     config = pk.RunConfig(train_share=share, protocol="paper", **small)
    ...     _ = pk.load_or_run(config, f"spots_{share:.0%}", maps=False)
    >>> reference, others, settings = pk.reports.split_by_settings(pk.reports.read_runs(["spots_100%", "spots_25%"]))
    >>> pk.reports.effects_table(others, reference)[["PCC", "difference"]].round(2).reset_index()
               settings     features   PCC  difference
    0  train_share=0.25  coordinates  0.07       -0.12
    """
    if not others or not reference:
        raise ValueError("effects_table needs at least one run of the reference settings and one of other settings")
    if len({(run.summary["protocol"], run.cohort) for run in [*others, *reference]}) > 1:
        raise ValueError("effects_table compares runs of one protocol and cohort; pass runs of one only")
    bases = {run: _find_base(run, reference) for run in others}
    changes = {run: _changed_settings(run, base) for run, base in bases.items()}
    rows, index, base_settings = [], [], {}
    for text, group in group_runs(others, lambda run: format_settings(changes[run])).items():
        for run in sort_rows(group):
            pooled, slides, base = run.score(), run.score("slides"), bases[run]
            row = {"PCC": pooled["pcc"], "low": pooled["ci_low"], "high": pooled["ci_high"]}
            row["PCC, by slides"] = slides["pcc"]
            row["sd over seeds"] = seed_sd(run)
            rows.append(row | _paired_difference(run, base if row_label(base) == row_label(run) else None))
            index.append((text, row_label(run)))
            base_settings |= {name: run_settings(base)[name] for name in changes[run]}
    table = pd.DataFrame(rows, index=pd.MultiIndex.from_tuples(index, names=["settings", "features"]))
    if table["sd over seeds"].isna().all():
        table = table.drop(columns="sd over seeds")
    normalization = reference[0].summary["normalization"]
    table.attrs = {
        "title": f"Effects of settings · {table_title(reference, normalization=normalization)}",
        "note": f"Reference: {format_settings(base_settings)}. Paired difference of the mean PCC to the run with "
        f"the same features and the reference settings; {INTERVALS}, not corrected for multiple comparisons: of many, "
        "some exclude zero by chance.",
        "reference": format_settings(base_settings),
    }
    return table


def _find_base(run: Run, reference: Sequence[Run]) -> Run:
    """Return the reference run of the same row, else the one that shares the most settings."""
    same = [base for base in reference if (row_label(base), base.backbone) == (row_label(run), run.backbone)]
    return (
        same[0] if same else max(reference, key=lambda base: len(run_settings(run).keys() & run_settings(base).keys()))
    )


def _changed_settings(run: Run, base: Run) -> dict:
    base_settings = run_settings(base)
    changed = {k: v for k, v in run_settings(run).items() if k in base_settings and base_settings[k] != v}
    if set(run.seeds) <= set(base.seeds) and len(changed) > 1:
        changed.pop("seed", None)  # a subset of the seeds: reported in the note
    return changed


def _paired_difference(run: Run, base: Run | None) -> dict:
    missing = dict.fromkeys(("difference", "difference low", "difference high"), math.nan)
    if base is None:
        return missing | {"note": "the reference settings have no such row"}
    if run.seeds != base.seeds:
        return missing | {"note": f"not paired: seeds {_format_seeds(run)}, the reference's {_format_seeds(base)}"}
    target = run.summary["normalization"]
    moments = (r.moments[r.moments["normalization"] == target] for r in (run, base))
    try:
        score = bootstrap_difference(*moments)
    except ValueError:
        return missing | {"note": "not paired: other folds, slides, spots or genes"}
    return dict(zip(missing, (score["pcc"], score["ci_low"], score["ci_high"]), strict=True)) | {"note": ""}


def _format_seeds(run: Run) -> str:
    return ", ".join(map(str, run.seeds))
