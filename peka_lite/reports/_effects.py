"""What a change of settings is worth: runs beside those of the reference settings, row by row."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pandas as pd

from peka_lite.evaluation.scores import difference
from peka_lite.reports._settings import in_words, sd_over_seeds, settings
from peka_lite.reports.runs import INTERVALS, Run, group, in_order, label, title


def effects_table(others: Sequence[Run], reference: Sequence[Run]) -> pd.DataFrame:
    """Put runs of other settings under each other, each with its difference to the same row of the reference settings.

    Parameters
    ----------
    others, reference
        From `by_settings`, of one protocol, cohort and backbone (and controls).

    Returns
    -------
    pandas.DataFrame
        One row a run of `others`, by settings (those in which it differs from the reference, in words) and features
        (`label`): mean PCC on the protocol's own targets with its interval, PCC by slides, difference to the reference
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
    >>> reference, others, told = pk.reports.by_settings(pk.reports.read_runs(["spots_100%", "spots_25%"]))
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
    for words, here in group(others, lambda run: in_words(changes[run])).items():
        for run in in_order(here):
            own, slides, base = run.score(), run.score("slides"), bases[run]
            row = {"PCC": own["pcc"], "low": own["ci_low"], "high": own["ci_high"], "PCC, by slides": slides["pcc"]}
            row["sd over seeds"] = sd_over_seeds(run)
            rows.append(row | _paired(run, base if label(base) == label(run) else None))
            index.append((words, label(run)))
            told |= {name: settings(base)[name] for name in changes[run]}
    table = pd.DataFrame(rows, index=pd.MultiIndex.from_tuples(index, names=["settings", "features"]))
    if table["sd over seeds"].isna().all():
        table = table.drop(columns="sd over seeds")
    own = reference[0].summary["normalization"]
    table.attrs = {
        "title": f"Effects of settings · {title(reference, normalization=own)}",
        "note": f"Reference: {in_words(told)}. Difference of the mean PCC to the run of the reference settings with "
        f"the same features, paired; {INTERVALS}, each for itself and not for all rows together: of many, some lie off "
        "zero by chance.",
        "reference": in_words(told),
    }
    return table


def _base(run: Run, reference: Sequence[Run]) -> Run:
    """Return the reference's run of the same row; else one that feels most of the same settings."""
    same = [base for base in reference if (label(base), base.backbone) == (label(run), run.backbone)]
    return same[0] if same else max(reference, key=lambda base: len(settings(run).keys() & settings(base).keys()))


def _changed(run: Run, base: Run) -> dict:
    theirs = settings(base)
    changed = {k: v for k, v in settings(run).items() if k in theirs and theirs[k] != v}
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
        found = difference(mine, theirs)
    except ValueError:
        return nothing | {"note": "not paired: other folds, slides, spots or genes"}
    return dict(zip(nothing, (found["pcc"], found["ci_low"], found["ci_high"]), strict=True)) | {"note": ""}


def _seeds(run: Run) -> str:
    return ", ".join(map(str, run.seeds))
