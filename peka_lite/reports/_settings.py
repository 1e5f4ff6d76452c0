"""Group runs by their settings: average seeds, and split off the reference settings."""

from __future__ import annotations

import math
import re
import statistics
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from peka_lite.evaluation.scores import bootstrap_interval
from peka_lite.experiments.settings import settings_deciding
from peka_lite.reports.runs import CONTROLS, ELSEWHERE, METHODS, Run, format_seeds, group_runs, row_label, widest_seeds

_UNTRAINED = (METHODS["none"], *CONTROLS.values(), "teacher (upper line)")
ROW = ("protocol", "method", "features", "shuffle_teacher", "backbone")  # settings shown by a row or a title
OF_PROTOCOL = ("split", "normalization", "alpha")
#: Settings without effect where no student is trained.
TRAINED = tuple(set(settings_deciding("student", "memory")) - {*ROW, *ELSEWHERE, "weights", "seed"})
_SAME_IN_COHORT = ("data_fingerprint", "n_splits", "seed", "n_genes", "train_share", "epochs", "teacher")


def is_untrained(label: str) -> bool:
    """Return whether the label of a row (`row_label`) is that of runs without a trained student."""
    return label in _UNTRAINED or label.startswith("file ")


def average_seeds(runs: Sequence[Run]) -> list[Run]:
    """Average runs that differ only in their seed into one run.

    Its moments are those of all seeds, so that `bootstrap_interval` and `bootstrap_difference` draw the same patients
    and genes for each: a fold is named ``"0:1"``, seed and fold. Scores are recomputed, ceilings and seconds are means.
    A single run is returned unchanged. Of runs that differ only in settings without effect (frozen students with
    several tau), the first is returned. Runs are in the order of the first of each.

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
    groups = group_runs(
        runs, lambda run: (row_label(run), run.backbone, run.cohort, tuple(run_settings(run, seed=False).items()))
    )
    return [_average(list({run.config["seed"]: run for run in reversed(group)}.values())) for group in groups.values()]


def seed_scores(run: Run, how: str = "pooled", *, normalization: str | None = None) -> dict[int, float]:
    """Return the mean PCC of each seed, on the protocol's targets by default.

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
    """Return the standard deviation of the mean PCC over seeds (n - 1); NaN for one seed.

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
    """Return the settings that affect a run's scores, except row, cohort and protocol; lists as tuples.

    Training settings are left out where no student is trained.
    """
    trained, from_teacher = run.summary["method"] != "none", run.summary["features"] == "teacher"
    skip = {*ROW, *ELSEWHERE, "seed"} | (set() if run.backbone else {"weights"})
    if not trained:
        skip |= {name for name in TRAINED if not (from_teacher and name.startswith("teacher"))}
    settings = {k: tuple(v) if isinstance(v, list) else v for k, v in run.config.items() if k not in skip}
    settings["data_fingerprint"] = run.summary["data_fingerprint"]
    return settings | ({"seed": run.seeds} if seed else {})


def split_by_settings(runs: Sequence[Run]) -> tuple[list[Run], list[Run], dict[str, dict]]:
    """Split runs into those of the reference settings and the others.

    Within each cohort, runs are grouped by the settings in which they differ. A setting that does not affect a run is
    ignored: frozen students and controls are in the groups of every tau. The reference is the largest group; among
    equally large groups the one from which the others differ least, then the first.

    Parameters
    ----------
    runs
        From `average_seeds`.

    Returns
    -------
    reference, others
        `reference` of one cohort, protocol and backbone fits in one table.
    reference_settings
        Cohort -> the reference's values of the settings that differ.

    Examples
    --------
    >>> import peka_lite as pk
    >>> small = {"method": "none", "slides": ["MINI3"], "split": "spot", "n_splits": 2, "n_genes": 10}
    >>> for features, share in (("coordinates", 1.0), ("depth", 1.0), ("coordinates", 0.25)):
    ...     config = pk.RunConfig(features=features, train_share=share, **small)
    ...     _ = pk.load_or_run(config, f"{features}_{share:.0%}", maps=False)
    >>> runs = pk.reports.read_runs(["coordinates_100%", "depth_100%", "coordinates_25%"])
    >>> reference, others, reference_settings = pk.reports.split_by_settings(runs)
    >>> [run.name for run in reference], [run.name for run in others]
    (['coordinates_100%', 'depth_100%'], ['coordinates_25%'])
    >>> reference_settings
    {'mini MINI3': {'train_share': 1.0}}
    """
    pairs = list(zip(runs, _distinctive_settings(runs), strict=True))
    chosen = {}
    for cohort, group in group_runs(pairs, lambda pair: pair[0].cohort).items():
        known = list({tuple(s.items()): s for _, s in group}.values())
        known = [s for s in known if not any(s.items() < t.items() for t in known)]

        def weight(candidate, known=known):
            members = sum(s.items() <= candidate.items() for _, s in pairs)
            return members, -sum(len(s.items() - candidate.items()) for s in known)

        chosen[cohort] = max(known, key=weight)
    reference = [run for run, s in pairs if s.items() <= chosen[run.cohort].items()]
    return reference, [run for run, _ in pairs if run not in reference], chosen


def format_settings(settings: dict) -> str:
    """Return settings as text, ``"epochs=2, tau=4"``; the data fingerprint only if it is the only one."""
    if len(settings) > 1:
        settings = {k: v for k, v in settings.items() if k != "data_fingerprint"}
    return ", ".join(f"{'data' if k == 'data_fingerprint' else k}={format_value(v)}" for k, v in settings.items())


def format_value(value) -> str:
    """Return a setting's value as text: ``null``, ``true``, ``4``, a file's name without its folder."""
    value = value.item() if hasattr(value, "item") else value  # a column's numpy scalar
    if value is None or isinstance(value, bool):
        return "null" if value is None else str(value).lower()
    if isinstance(value, list | tuple):
        return "+".join(map(format_value, value))
    if isinstance(value, float):
        return f"{value:g}"
    return Path(value).name if isinstance(value, str) and "/" in value else str(value)


def _average(runs: list[Run]) -> Run:
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
    pooled = scores[first.summary["normalization"]]["pooled"]
    summary = first.summary | {"scores": scores, "ceiling": {}} | {"mean_pcc_per_fold": pooled["per_fold"]}
    summary |= {"mean_pcc": pooled["pcc"], "ci_low": pooled["ci_low"], "ci_high": pooled["ci_high"]}
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


def _distinctive_settings(runs: Sequence[Run]) -> list[dict]:
    """Return for each run the settings in which it differs from others.

    These are settings that must be equal within a column, and settings in which runs of one row differ. Each counts
    only in the cohort, protocol or backbone in which it differs.
    """

    def scopes(run: Run, name: str) -> tuple[tuple, tuple]:
        """Return the key of the runs to compare, and of the runs to distinguish if their values differ."""
        cohort, protocol, backbone, _ = _row(run)
        if name in _SAME_IN_COHORT:
            return (cohort,), (cohort,)
        if name in OF_PROTOCOL:
            return (cohort, protocol), (cohort, protocol)
        return (cohort, backbone) if name == "weights" else _row(run), (cohort, backbone)

    most = {cohort: widest_seeds(group) for cohort, group in group_runs(runs, lambda run: run.cohort).items()}
    pairs = [(run, run_settings(run) | {"seed": format_seeds(run, most[run.cohort])}) for run in runs]
    values = defaultdict(set)
    for run, settings in pairs:
        for name, value in settings.items():
            values[name, scopes(run, name)[0]].add(value)
    differ = set()
    for run, settings in pairs:
        differ |= {(name, scopes(run, name)[1]) for name in settings if len(values[name, scopes(run, name)[0]]) > 1}
    return [{k: v for k, v in settings.items() if (k, scopes(run, k)[1]) in differ} for run, settings in pairs]
