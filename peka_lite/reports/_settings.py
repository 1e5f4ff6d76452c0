"""Runs of other settings: seeds are averaged, what else differs makes groups, and one group is the reference."""

from __future__ import annotations

import math
import re
import statistics
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from peka_lite.evaluation.scores import bootstrap_interval
from peka_lite.reports.runs import CONTROLS, ELSEWHERE, METHODS, Run, group_runs, row_label, seeds_among, widest_seeds

UNTRAINED = (METHODS["none"], *CONTROLS.values(), "teacher (upper line)")  # labels of runs without a taught student
ROW = ("protocol", "method", "features", "shuffle_teacher", "backbone")  # settings that a row or a title names
OF_PROTOCOL = ("split", "normalization", "alpha")
# `students.TRAINING` and what decides its teacher and memory: settings that only a taught student feels.
TRAINED = (
    "r", "layers", "teacher", "teacher_checkpoint", "teacher_genes", "teacher_mapping", "label_method", "resolution",
    "n_clusters", "kd_space", "tau", "kd_weight", "ce_weight", "epochs", "batch_size", "lr", "augment", "micro_batch",
    "recompute", "compile",
)  # fmt: skip
_ALIKE = ("data_fingerprint", "n_splits", "seed", "n_genes", "train_share", "epochs", "teacher")  # in one cohort


def average_seeds(runs: Sequence[Run]) -> list[Run]:
    """Replace runs that differ in their seed alone by one run: the mean over seeds.

    Its moments hold those of every seed, so that `bootstrap_interval` and `difference` draw the same patients and genes for all
    of them: folds are numbered ``"0:1"``, seed and fold. Scores are computed anew, ceilings and seconds are means. A
    run alone stays as it is. Of runs that differ in nothing they feel (frozen students of several tau) the first stays.

    Returns
    -------
    list of Run
        In order of their first runs.

    Examples
    --------
    >>> import peka_lite as pk
    >>> small = {"method": "none", "slides": ["MINI3"], "split": "spot", "n_splits": 2, "n_genes": 10}
    >>> for seed in (0, 1):
    ...     _ = pk.load_or_run(pk.RunConfig(features="coordinates", seed=seed, **small), f"seed{seed}", maps=False)
    >>> runs = pk.reports.read_runs(["seed0", "seed1"])
    >>> (mean,) = pk.reports.average_seeds(runs)
    >>> mean.seeds, sorted(mean.moments["fold"].unique())
    ((0, 1), ['0:0', '0:1', '1:0', '1:1'])
    >>> [round(run.score()["pcc"], 2) for run in (*runs, mean)]
    [0.12, 0.14, 0.13]
    """
    alike = group_runs(
        runs, lambda run: (row_label(run), run.backbone, run.cohort, tuple(run_settings(run, seed=False).items()))
    )
    return [_mean(list({run.config["seed"]: run for run in reversed(here)}.values())) for here in alike.values()]


def seed_scores(run: Run, how: str = "pooled", *, normalization: str | None = None) -> dict[int, float]:
    """Return the mean PCC of each seed; of the protocol's own targets by default.

    Examples
    --------
    >>> import peka_lite as pk
    >>> small = {"method": "none", "slides": ["MINI3"], "split": "spot", "n_splits": 2, "n_genes": 10}
    >>> for seed in (0, 1):
    ...     _ = pk.load_or_run(pk.RunConfig(features="coordinates", seed=seed, **small), f"seed{seed}", maps=False)
    >>> (mean,) = pk.reports.average_seeds(pk.reports.read_runs(["seed0", "seed1"]))
    >>> {seed: round(pcc, 2) for seed, pcc in pk.reports.seed_scores(mean).items()}
    {0: 0.12, 1: 0.14}
    """
    return {part.config["seed"]: part.score(how, normalization=normalization)["pcc"] for part in run.parts or (run,)}


def seed_sd(run: Run, how: str = "pooled", *, normalization: str | None = None) -> float:
    """Return the standard deviation of the seeds' mean PCC, with n - 1; NaN for one seed.

    Examples
    --------
    >>> import peka_lite as pk
    >>> small = {"method": "none", "slides": ["MINI3"], "split": "spot", "n_splits": 2, "n_genes": 10}
    >>> for seed in (0, 1):
    ...     _ = pk.load_or_run(pk.RunConfig(features="coordinates", seed=seed, **small), f"seed{seed}", maps=False)
    >>> runs = pk.reports.read_runs(["seed0", "seed1"])
    >>> (mean,) = pk.reports.average_seeds(runs)
    >>> round(pk.reports.seed_sd(mean), 3), pk.reports.seed_sd(runs[0])
    (0.015, nan)
    """
    scores = seed_scores(run, how, normalization=normalization).values()
    return statistics.stdev(scores) if len(scores) > 1 else math.nan


def run_settings(run: Run, *, seed: bool = True) -> dict:
    """Return what else decides a run's numbers, beside its row, cohort and protocol; a list as a tuple.

    A setting of teaching is left out where nothing is taught.
    """
    taught, upper = run.summary["method"] != "none", run.summary["features"] == "teacher"
    skip = {*ROW, *ELSEWHERE, "seed"} | (set() if run.backbone else {"weights"})
    if not taught:
        skip |= {name for name in TRAINED if not (upper and name.startswith("teacher"))}
    found = {k: tuple(v) if isinstance(v, list) else v for k, v in run.config.items() if k not in skip}
    found["data_fingerprint"] = run.summary["data_fingerprint"]
    return found | ({"seed": run.seeds} if seed else {})


def split_by_settings(runs: Sequence[Run]) -> tuple[list[Run], list[Run], dict[str, dict]]:
    """Split runs into those of the reference settings and the others.

    Runs are grouped by the settings in which they differ, cohort by cohort. A setting that a run does not feel keeps it
    out of no group: frozen students and controls are in the groups of every tau. The reference is the group of most
    runs; of equals the one from which the others differ least, then the first.

    Parameters
    ----------
    runs
        From `average_seeds`.

    Returns
    -------
    reference, others
        `require_shared` takes the reference of one cohort, protocol and backbone.
    told
        Cohort -> the reference's settings, of those that differ.

    Examples
    --------
    >>> import peka_lite as pk
    >>> small = {"method": "none", "slides": ["MINI3"], "split": "spot", "n_splits": 2, "n_genes": 10}
    >>> for features, share in (("coordinates", 1.0), ("depth", 1.0), ("coordinates", 0.25)):
    ...     config = pk.RunConfig(features=features, train_share=share, **small)
    ...     _ = pk.load_or_run(config, f"{features}_{share:.0%}", maps=False)
    >>> runs = pk.reports.read_runs(["coordinates_100%", "depth_100%", "coordinates_25%"])
    >>> reference, others, told = pk.reports.split_by_settings(runs)
    >>> [run.name for run in reference], [run.name for run in others]
    (['coordinates_100%', 'depth_100%'], ['coordinates_25%'])
    >>> told
    {'mini MINI3': {'train_share': 1.0}}
    """
    signed = list(zip(runs, _signatures(runs), strict=True))
    told = {}
    for cohort, here in group_runs(signed, lambda pair: pair[0].cohort).items():
        known = list({tuple(s.items()): s for _, s in here}.values())
        known = [s for s in known if not any(s.items() < t.items() for t in known)]

        def weight(s, known=known):
            members = sum(own.items() <= s.items() for _, own in signed)
            return members, -sum(len(t.items() - s.items()) for t in known)

        told[cohort] = max(known, key=weight)
    reference = [run for run, own in signed if own.items() <= told[run.cohort].items()]
    return reference, [run for run, _ in signed if run not in reference], told


def format_settings(found: dict) -> str:
    """Return settings as text, ``"epochs=2, tau=4"``; the data's fingerprint only where nothing else is said.

    Examples
    --------
    >>> from peka_lite.reports._settings import format_settings
    >>> format_settings({"epochs": 2, "lr": 0.0001, "r": None, "seed": (0, 1)})
    'epochs=2, lr=0.0001, r=null, seed=0+1'
    """
    if len(found) > 1:
        found = {k: v for k, v in found.items() if k != "data_fingerprint"}
    return ", ".join(f"{'data' if k == 'data_fingerprint' else k}={format_value(v)}" for k, v in found.items())


def format_value(value) -> str:
    """Return a setting's value as a reader would write it: ``null``, ``true``, ``4``, a file by its name."""
    value = value.item() if hasattr(value, "item") else value  # of a column
    if value is None or isinstance(value, bool):
        return "null" if value is None else str(value).lower()
    if isinstance(value, list | tuple):
        return "+".join(map(format_value, value))
    if isinstance(value, float):
        return f"{value:g}"
    return Path(value).name if isinstance(value, str) and "/" in value else str(value)


def _mean(runs: list[Run]) -> Run:
    if len(runs) == 1:
        return runs[0]
    runs = sorted(runs, key=lambda run: run.config["seed"])
    first, seeds = runs[0], [run.config["seed"] for run in runs]
    parts = [
        r.moments.assign(fold=[f"{seed}:{fold}" for fold in r.moments["fold"]])
        for r, seed in zip(runs, seeds, strict=True)
    ]
    moments = pd.concat(parts, ignore_index=True)
    scores = {
        target: {how: bootstrap_interval(part, how=how) for how in ("pooled", "slides")}
        for target, part in moments.groupby("normalization", sort=False)
    }
    own = scores[first.summary["normalization"]]["pooled"]
    summary = first.summary | {"scores": scores, "ceiling": {}} | {"mean_pcc_per_fold": own["per_fold"]}
    summary |= {"mean_pcc": own["pcc"], "ci_low": own["ci_low"], "ci_high": own["ci_high"]}
    for target, ceiling in first.summary["ceiling"].items():
        values = [run.summary["ceiling"][target]["pcc"] for run in runs]
        summary["ceiling"][target] = ceiling | {"pcc": statistics.fmean(values)}
    if all("seconds" in run.summary for run in runs):
        summary["seconds"] = statistics.fmean(run.summary["seconds"] for run in runs)
    name = re.sub(r"(^|,)seed=[^,]*", "", first.name).strip(",") or "base"
    return Run(
        name=f"{name} ({len(runs)} seeds)", config=first.config | {"seed": seeds}, summary=summary, moments=moments,
        points=tuple(dict.fromkeys(point for run in runs for point in run.points)), parts=tuple(runs),
        varied={k: v for k, v in first.varied.items() if all(k in r.varied and r.varied[k] == v for r in runs)},
    )  # fmt: skip


def _row(run: Run) -> tuple:
    return run.cohort, run.summary["protocol"], run.backbone, row_label(run)


def _signatures(runs: Sequence[Run]) -> list[dict]:
    """Return for each run the settings that set it apart, which are of two kinds.

    Those that must be alike in a column and are not, and those in which runs of one row differ. Either counts only
    where it differs: in this cohort, protocol or backbone.
    """

    def scopes(run: Run, name: str) -> tuple[tuple, tuple]:
        """Return among which runs values may not differ, and which runs are set apart if they do."""
        cohort, protocol, backbone, _ = _row(run)
        if name in _ALIKE:
            return (cohort,), (cohort,)
        if name in OF_PROTOCOL:
            return (cohort, protocol), (cohort, protocol)
        return (cohort, backbone) if name == "weights" else _row(run), (cohort, backbone)

    most = {cohort: widest_seeds(here) for cohort, here in group_runs(runs, lambda run: run.cohort).items()}
    found = [run_settings(run) | {"seed": seeds_among(run, most[run.cohort])} for run in runs]
    values = defaultdict(set)
    for run, own in zip(runs, found, strict=True):
        for name, value in own.items():
            values[name, scopes(run, name)[0]].add(value)
    differ = set()
    for run, own in zip(runs, found, strict=True):
        differ |= {(name, scopes(run, name)[1]) for name in own if len(values[name, scopes(run, name)[0]]) > 1}
    return [
        {k: v for k, v in own.items() if (k, scopes(run, k)[1]) in differ} for run, own in zip(runs, found, strict=True)
    ]
