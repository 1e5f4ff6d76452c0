"""Tables of one protocol, of differences to a reference, and of the cost of leakage."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pandas as pd

from peka_lite.evaluation.scores import bootstrap_difference, pool_scores
from peka_lite.reports._settings import seed_scores, seed_sd
from peka_lite.reports.runs import (
    INTERVALS,
    PROTOCOLS,
    TARGETS,
    Run,
    describe_cohort,
    require_shared,
    row_label,
    table_title,
    widest_seeds,
)

CAUTION = {
    "paper": "Random spots are held out, as in PEKA's released code (the paper does not state what its folds "
    "split), and a trained student saw the whole cohort, test spots included: these values do not estimate performance "
    "on a new patient.",
    "hest": "A trained student saw training rows only; genes are selected on all rows, as in HEST-bench.",
    "strict": "Student, clusters, genes, PCA and regularization strength come from training rows only.",
    "custom": "Custom protocol: see config.yml of each run for how rows were held out.",
}
NO_INTERCEPT = (
    " HEST-bench's ridge has no intercept: it predicts differences from the genes' training means and is scored on the "
    "values themselves, so its R2 can be far below 0 at any PCC."
)


def protocol_table(runs: Sequence[Run], *, normalization: str | None = None) -> pd.DataFrame:
    """Tabulate runs of one protocol, cohort and backbone, one per row.

    Parameters
    ----------
    normalization
        Of the targets; the protocol's by default.

    Returns
    -------
    pandas.DataFrame
        One row per run (`row_label`): mean PCC pooled over a fold's test spots with its interval, the same by slides,
        the pooled PCC as a share of the noise ceiling, and the pooled PCC of each fold (of means over seeds: of each
        seed, and their standard deviation). ``attrs`` has the title and the note.

    Raises
    ------
    ValueError
        If the runs differ in a field that must be equal within a column; the message names it.

    Examples
    --------
    >>> import peka_lite as pk
    >>> small = {"method": "none", "slides": ["MINI3"], "split": "spot", "n_splits": 2, "n_genes": 10}
    >>> for features in ("coordinates", "depth"):
    ...     _ = pk.load_or_run(pk.RunConfig(features=features, **small), features, maps=False)
    >>> table = pk.reports.protocol_table(pk.reports.read_runs(["coordinates", "depth"]))
    >>> table[["PCC", "share of ceiling", "fold 0", "fold 1"]].round(2).T
    features          coordinates  total count
    PCC                      0.12        -0.01
    share of ceiling         0.21        -0.02
    fold 0                   0.13        -0.04
    fold 1                   0.10         0.01
    >>> table.attrs["title"].split(" · ")[2:]
    ['one patient, random spots held out', 'log1p-cp10k targets', 'no intervals: one slide']
    """
    runs = require_shared(runs)
    default = runs[0].summary["normalization"]
    normalization = normalization or default
    rows = []
    for run in runs:
        pooled, slides = (run.score(how, normalization=normalization) for how in ("pooled", "slides"))
        row = _score_columns("PCC", pooled, slides)
        row["share of ceiling"] = pooled["pcc"] / run.summary["ceiling"][normalization]["pcc"]
        if len(widest_seeds(runs)) > 1:
            row["sd over seeds"] = seed_sd(run, normalization=normalization)
            row |= {f"seed {s}": pcc for s, pcc in seed_scores(run, normalization=normalization).items()}
        else:
            row |= {f"fold {i}": pcc for i, pcc in enumerate(pooled["per_fold"])}
        rows.append(row)
    table = pd.DataFrame(rows, index=pd.Index([row_label(run) for run in runs], name="features"))
    basis = runs[0].summary["ceiling"][normalization]["basis"]
    note = f"{CAUTION[runs[0].summary['protocol']]} Mean PCC over genes, then over folds (pooled) or slides; "
    note += f"{INTERVALS}. Ceiling: {'known from the simulation' if basis == 'known' else 'from ' + basis}."
    if few := [row_label(run) for run in runs if len(run.seeds) < len(widest_seeds(runs))]:
        note += f" Fewer seeds: {', '.join(few)}."
    if normalization != default:
        note += f" The protocol's targets are {default}; its genes were selected for those."
    table.attrs = {"title": table_title(runs, normalization=normalization), "note": note}
    return table


def score_table(runs: Sequence[Run], *, normalization: str | None = None) -> pd.DataFrame:
    """Tabulate PCC, R2, RMSE and Spearman's correlation of runs of one protocol, cohort and backbone, one per row.

    Parameters and errors are those of `protocol_table`. All are of a fold's test spots together, then means over genes
    and folds; Spearman's is NaN for runs of older versions.

    Examples
    --------
    >>> import peka_lite as pk
    >>> small = {"method": "none", "slides": ["MINI1", "MINI3", "MINI5"], "n_splits": 3, "n_genes": 10}
    >>> for protocol in ("hest", "strict"):
    ...     folder = f"color_{protocol}"
    ...     _ = pk.load_or_run(pk.RunConfig(features="color", protocol=protocol, **small), folder, maps=False)
    ...     table = pk.reports.score_table(pk.reports.read_runs([folder]), normalization="log1p")
    ...     print(protocol, table.loc["color and texture"].round(2).to_dict())
    hest {'PCC': 0.35, 'R2': -1.89, 'RMSE': 0.74, 'Spearman': 0.26}
    strict {'PCC': 0.33, 'R2': 0.08, 'RMSE': 0.44, 'Spearman': 0.25}
    """
    runs = require_shared(runs)
    normalization = normalization or runs[0].summary["normalization"]
    rows = []
    for run in runs:
        scores = pool_scores(run.moments[run.moments["normalization"] == normalization])
        means = scores.groupby("fold")[["r2", "rmse"]].mean().mean()
        known = [part.summary.get("other_scores", {}).get(normalization, {}) for part in run.parts or (run,)]
        row = {"PCC": run.score(normalization=normalization)["pcc"], "R2": means["r2"], "RMSE": means["rmse"]}
        rows.append(row | {"Spearman": sum(scores.get("spearman", math.nan) for scores in known) / len(known)})
    table = pd.DataFrame(rows, index=pd.Index([row_label(run) for run in runs], name="features"))
    note = (
        "Means over genes, then over folds. R2 and RMSE depend on level and scale of the predictions, PCC and Spearman "
    )
    note += "do not: compare R2 and RMSE within one protocol and kind of targets only."
    if runs[0].summary["protocol"] == "hest":
        note += NO_INTERCEPT
    table.attrs = {"title": f"other scores · {table_title(runs, normalization=normalization)}", "note": note}
    table.attrs["missing"] = "–"
    return table


def difference_table(
    runs: Sequence[Run], *, reference: str = "frozen", normalization: str | None = None
) -> pd.DataFrame:
    """Subtract the reference's mean PCC from that of each other run, paired by patient (or slide) and gene.

    Parameters and errors are those of `protocol_table`; `reference` is the `row_label` of a run. Columns: difference of
    the pooled PCC and its 95% interval, and the same by slides; NaN for runs of other seeds than the reference's.

    Examples
    --------
    >>> import peka_lite as pk
    >>> small = {"method": "none", "slides": ["MINI1", "MINI3", "MINI5"], "n_splits": 3, "n_genes": 10}
    >>> for features in ("coordinates", "depth"):
    ...     config = pk.RunConfig(features=features, protocol="hest", **small)
    ...     _ = pk.load_or_run(config, f"{features}_hest", maps=False)
    >>> runs = pk.reports.read_runs(["coordinates_hest", "depth_hest"])
    >>> pk.reports.difference_table(runs, reference="coordinates").round(2).T.head(3)
    minus coordinates  total count
    difference                0.25
    low                       0.04
    high                      0.45
    """
    runs = require_shared(runs)
    named = {row_label(run): run for run in runs}
    if reference not in named or len(named) == 1:
        raise ValueError(f"differences to {reference!r} need that run and another one; the runs are {', '.join(named)}")
    normalization = normalization or runs[0].summary["normalization"]
    moments = {k: run.moments[run.moments["normalization"] == normalization] for k, run in named.items()}
    reference_moments, rows, unpaired = moments.pop(reference), [], []
    for name, run_moments in moments.items():
        if named[name].seeds == named[reference].seeds:
            scores = [bootstrap_difference(run_moments, reference_moments, how=how) for how in ("pooled", "slides")]
        else:
            scores = [dict.fromkeys(("pcc", "ci_low", "ci_high"), math.nan)] * 2
            unpaired.append(name)
        rows.append(_score_columns("difference", *scores))
    table = pd.DataFrame(rows, index=pd.Index(list(moments), name=f"minus {reference}"))
    note = f"Paired differences of the mean PCC; {INTERVALS}, not corrected for multiple comparisons."
    if unpaired:
        note += f" Missing for {', '.join(unpaired)}: other seeds than {reference}."
    table.attrs = {"title": f"minus {reference} · {table_title(runs, normalization=normalization)}", "note": note}
    return table


def leak_table(runs: Sequence[Run]) -> pd.DataFrame:
    """Compare the protocols paper, hest and strict on the same data, one column each, with the cost of each step.

    Returns
    -------
    pandas.DataFrame
        One row per kind of targets and `row_label`: pooled mean PCC by protocol, the cost of each step (positive if the
        PCC drops), then the intervals. NaN where there is no run.

    Raises
    ------
    ValueError
        For fewer than two of these protocols, or for runs that differ in data, backbone, epochs or other settings.

    Examples
    --------
    >>> import peka_lite as pk
    >>> small = {"method": "none", "slides": ["MINI1", "MINI3"], "n_splits": 2, "n_genes": 10}
    >>> for protocol in ("paper", "hest"):
    ...     config = pk.RunConfig(features="coordinates", protocol=protocol, **small)
    ...     _ = pk.load_or_run(config, f"leak_{protocol}", maps=False)
    >>> table = pk.reports.leak_table(pk.reports.read_runs(["leak_paper", "leak_hest"]))
    >>> table[["paper", "hest", "cost of holding patients out"]].reset_index().round(2).T
                                            0            1
    targets                       log1p-cp10k        log1p
    features                      coordinates  coordinates
    paper                                0.21         0.24
    hest                                -0.05        -0.03
    cost of holding patients out         0.27         0.27
    """
    have = [p for p in PROTOCOLS if any(run.summary["protocol"] == p for run in runs)]
    if len(have) < 2 or "custom" in have:
        raise ValueError(f"leak_table takes runs of at least two of paper, hest and strict, not {', '.join(have)}")
    runs = require_shared(runs, across_protocols=True)
    units = "patients" if any(run.summary["split"] == "patient" for run in runs) else "sections"
    rows = {}
    for target in TARGETS:
        for run in runs:
            score, name = run.score(normalization=target), run.summary["protocol"]
            row = rows.setdefault((target, row_label(run)), {})
            row |= {name: score["pcc"], f"{name} low": score["ci_low"], f"{name} high": score["ci_high"]}
    table = pd.DataFrame.from_dict(rows, orient="index")
    table.index = pd.MultiIndex.from_tuples(rows, names=["targets", "features"])
    table = table.reindex(columns=[f"{p}{end}" for end in ("", " low", " high") for p in PROTOCOLS[:3]])
    table.insert(3, f"cost of holding {units} out", table["paper"] - table["hest"])
    table.insert(4, "cost of the rest", table["hest"] - table["strict"])
    table.attrs["title"] = f"one column per protocol, not interchangeable · {describe_cohort(runs)} · pooled PCC"
    table.attrs["note"] = (
        f"From paper to hest, {units} are held out from student and probe, and the regularization strength changes. "
        "From hest to strict, genes and regularization strength are selected on training rows too; a better strength "
        "can make that cost negative. Protocols score different genes and folds: a cost is a difference of two means, "
        "without a paired interval."
    )
    return table


def _score_columns(name: str, pooled: dict, slides: dict) -> dict:
    columns = {"": pooled, ", by slides": slides}
    keys = {name: "pcc", "low": "ci_low", "high": "ci_high"}
    return {column + end: score[key] for end, score in columns.items() for column, key in keys.items()}
