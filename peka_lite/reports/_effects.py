"""What a change of settings is worth: runs beside those of the reference settings, row by row."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pandas as pd

from peka_lite.evaluation.scores import bootstrap_difference
from peka_lite.reports._settings import format_settings, run_settings, seed_sd
from peka_lite.reports.runs import INTERVALS, Run, group_runs, row_label, sort_rows, table_title


def effects_table(others: Sequence[Run], reference: Sequence[Run]) -> pd.DataFrame:
    """Put runs of other settings under each other, each with its difference to the same row of the reference settings.

    Parameters
    ----------
    others, reference
        From `split_by_settings`, of one protocol, cohort and backbone (and controls).

    Returns
    -------
    pandas.DataFrame
        One row a run of `others`, by settings (those in which it differs from the reference, in words) and features
        (`row_label`): mean PCC on the protocol's own targets with its interval, PCC by slides, difference to the reference
        with its paired 95% interval, and a note where there is none. Of means over seeds also their standard deviation.
        ``attrs`` holds title, note and reference (its settings, in words).

    Raises
    ------
    ValueError
        Without runs in either list, or if they are not of one protocol and cohort.

    Examples
    --------
    >>> import peka_lite as pk
    >>> small = {"features": "coordinates", "method": "none", "slides": ["MINI3"], "n_splits": 2, "n_genes": 10}
    >>> for share in (1.0, 0.25):
    ...     config = pk.RunConfig(train_share=share, protocol="paper", **small)
    ...     _ = pk.load_or_run(config, f"spots_{share:.0%}", maps=False)
    >>> reference, others, told = pk.reports.split_by_settings(pk.reports.read_runs(["spots_100%", "spots_25%"]))
    >>> pk.reports.effects_table(others, reference)[["PCC", "difference"]].round(2).reset_index()
               settings     features   PCC  difference
    0  train_share=0.25  coordinates  0.07       -0.12
    """
    if not others or not reference:
        raise ValueError("effects need runs of the reference settings and of others")
    if len({(run.summary["protocol"], run.cohort) for run in [*others, *reference]}) > 1:
        raise ValueError("effects are differences within one protocol and cohort; give runs of one")
    bases = {run: _base(run, reference) for run in others}
    changes = {run: _changed(run, base) for run, base in bases.items()}
    rows, index, told = [], [], {}
    for words, here in group_runs(others, lambda run: format_settings(changes[run])).items():
        for run in sort_rows(here):
            own, slides, base = run.score(), run.score("slides"), bases[run]
            row = {"PCC": own["pcc"], "low": own["ci_low"], "high": own["ci_high"], "PCC, by slides": slides["pcc"]}
            row["sd over seeds"] = seed_sd(run)
            rows.append(row | _paired(run, base if row_label(base) == row_label(run) else None))
            index.append((words, row_label(run)))
            told |= {name: run_settings(base)[name] for name in changes[run]}
    table = pd.DataFrame(rows, index=pd.MultiIndex.from_tuples(index, names=["settings", "features"]))
    if table["sd over seeds"].isna().all():
        table = table.drop(columns="sd over seeds")
    own = reference[0].summary["normalization"]
    table.attrs = {
        "title": f"Effects of settings · {table_title(reference, normalization=own)}",
        "note": f"Reference: {format_settings(told)}. Difference of the mean PCC to the run of the reference settings with "
        f"the same features, paired; {INTERVALS}, each for itself and not for all rows together: of many, some lie off "
        "zero by chance.",
        "reference": format_settings(told),
    }
    return table


def _base(run: Run, reference: Sequence[Run]) -> Run:
    """Return the reference's run of the same row; else one that feels most of the same settings."""
    same = [base for base in reference if (row_label(base), base.backbone) == (row_label(run), run.backbone)]
    return (
        same[0] if same else max(reference, key=lambda base: len(run_settings(run).keys() & run_settings(base).keys()))
    )


def _changed(run: Run, base: Run) -> dict:
    theirs = run_settings(base)
    changed = {k: v for k, v in run_settings(run).items() if k in theirs and theirs[k] != v}
    if set(run.seeds) <= set(base.seeds) and len(changed) > 1:
        changed.pop("seed", None)  # fewer seeds of the same; the note says so
    return changed


def _paired(run: Run, base: Run | None) -> dict:
    nothing = dict.fromkeys(("difference", "difference low", "difference high"), math.nan)
    if base is None:
        return nothing | {"note": "the reference settings have no such row"}
    if run.seeds != base.seeds:
        return nothing | {"note": f"not paired: seeds {_seeds(run)}, the reference's {_seeds(base)}"}
    target = run.summary["normalization"]
    mine, theirs = (r.moments[r.moments["normalization"] == target] for r in (run, base))
    try:
        found = bootstrap_difference(mine, theirs)
    except ValueError:
        return nothing | {"note": "not paired: other folds, slides, spots or genes"}
    return dict(zip(nothing, (found["pcc"], found["ci_low"], found["ci_high"]), strict=True)) | {"note": ""}


def _seeds(run: Run) -> str:
    return ", ".join(map(str, run.seeds))
