"""Split a cohort into cross-validation folds: which patients, slides or spots are held out together."""

from __future__ import annotations

import warnings

import numpy as np
from sklearn.model_selection import GroupKFold, KFold

from peka_lite.evaluation.leaks import LeakError
from peka_lite.evaluation.protocols import SPLITS

CAVEATS = {"slide": "does not test new patients", "spot": "scores neighbors of training spots: too high"}


def folds(cohort, by: str = "patient", n_splits: int = 5, seed: int = 0) -> list[tuple[np.ndarray, np.ndarray]]:
    """Split the rows of a cohort into folds with no group in both training and test.

    Parameters
    ----------
    cohort
        `peka_lite.data.Cohort`.
    by
        ``"patient"``: holds out patients, as for a new patient. ``"slide"``: holds out sections; two sections of one
        patient may be in training and test. ``"spot"``: holds out random spots, as in the authors' released code
        (protocol ``"paper"``); neighbors of a test spot are in training.
    n_splits
        Number of folds. With fewer groups than folds, each group is one fold, with a warning.
    seed
        Seed of the shuffle.

    Returns
    -------
    list of (train, test)
        int64 row indices, ascending and disjoint; each row is in one test set.

    Raises
    ------
    ValueError
        With one group, or a patient split where a slide's patient is unknown.

    Examples
    --------
    Number of patients in both training and test of each fold:

    >>> import peka_lite as pk
    >>> cohort = pk.open_cohort("mini", slides=["MINI1", "MINI2", "MINI7"])  # MINI1 and MINI7 have one patient
    >>> patient = cohort.obs["patient"]
    >>> for by in ("patient", "slide", "spot"):
    ...     folds = pk.folds(cohort, by=by, n_splits=2)
    ...     print(by, [len({*patient[train]} & {*patient[test]}) for train, test in folds])
    patient [0, 0]
    slide [1, 1]
    spot [2, 2]
    """
    if by not in SPLITS:
        raise ValueError(f"unknown split {by!r}; known: {', '.join(SPLITS)}")
    if n_splits < 2:
        raise ValueError(f"n_splits must be at least 2, not {n_splits}")
    n = len(cohort)
    if by == "spot":
        if n < n_splits:
            raise ValueError(f"{n} spots cannot make {n_splits} folds")
        return [_as_rows(s) for s in KFold(n_splits, shuffle=True, random_state=seed).split(np.zeros(n))]

    if by == "patient" and (unknown := [s.id for s in cohort.slides if s.patient is None]):
        raise ValueError(
            f"no patient is known for {', '.join(unknown)}, and a patient split needs all patients. Give "
            "patients=FILE.csv (columns id,patient), or split by slide and report it with the result."
        )
    groups = cohort.obs[by].to_numpy().astype(str)
    names = np.unique(groups)
    if len(names) == 1:
        other = "slide" if len(cohort.slides) > 1 else "spot"
        raise ValueError(
            f"the cohort has one {by} ({names[0]}) and none to hold out. Add slides of others, or split by "
            f"{other}, which {CAVEATS[other]}"
        )
    if len(names) < n_splits:
        warnings.warn(f"{len(names)} {by}s for {n_splits} folds: each {by} is one fold", stacklevel=2)
        n_splits = len(names)
    splitter = GroupKFold(n_splits, shuffle=True, random_state=seed)
    splits = [_as_rows(s) for s in splitter.split(np.zeros(n), groups=groups)]
    for train, test in splits:
        if crossing := set(groups[train]) & set(groups[test]):
            raise AssertionError(f"{by} in both training and test of a fold: {', '.join(sorted(crossing))}")
    return splits


def protocol_folds(cohort, protocol, n_splits: int, seed: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """Split a cohort by a `Protocol`; if it cannot be split, raise an error that names settings that work.

    Raises
    ------
    ValueError
        With too few patients, slides or spots, or an unknown patient; a `LeakError` if sections of several patients
        would be held out instead of patients. The message names options of ``peka-lite run`` that work.
    """
    inner, named, by = protocol.alpha == "inner", protocol.name != "custom", protocol.split
    obstacle = _find_obstacle(cohort, by, n_splits, inner=inner, named=named)
    if obstacle is None:
        return folds(cohort, by, n_splits, seed)
    slide, spot = f"--split slide, which {CAVEATS['slide']}", f"which {CAVEATS['spot']}"
    n_folds = 3 if n_splits < 3 else len(cohort)
    # Option text, split, number of folds, alpha on inner folds, named protocol; strictest first.
    options = [(f"--n-splits {n_folds}", by, n_folds, inner, named)]
    if named:
        options += [
            ("--protocol hest", "patient", n_splits, False, True),
            (f"--protocol hest with {slide}", "slide", n_splits, False, True),
            ("--alpha NUMBER without --protocol", "patient", n_splits, False, False),
            (f"--protocol paper, {spot}", "spot", n_splits, False, True),
        ]
    else:
        options += [
            ("--alpha hest or a number", by, n_splits, False, False),
            (slide, "slide", n_splits, inner, False),
            (f"--split spot, {spot}", "spot", n_splits, inner, False),
        ]
    fixes = [o for o, *p in options if _find_obstacle(cohort, p[0], p[1], inner=p[2], named=p[3]) is None]
    unknown = any(s.patient is None for s in cohort.slides)
    kind, message = obstacle
    if not fixes or not fixes[0].startswith("--n-splits"):  # first suggest other slides
        fixes.insert(0, "--patients FILE.csv (columns id,patient)" if unknown else "slides of more patients")
    raise kind(f"{message}: give {', or '.join(fixes[:3])}")


def _find_obstacle(cohort, by: str, n_splits: int, *, inner: bool, named: bool) -> tuple[type[ValueError], str] | None:
    """Return error type and message if a cohort cannot be split this way, else None."""
    patients = sorted({s.patient or "unknown" for s in cohort.slides})
    if by == "patient" and (unknown := [s.id for s in cohort.slides if s.patient is None]):
        return ValueError, f"no patient is known for {', '.join(unknown)}, and a patient split needs all patients"
    if by == "slide" and named and (len(patients) > 1 or patients == ["unknown"]):
        return LeakError, (
            "the protocol holds out patients; holding out sections instead needs one known patient, and this "
            f"cohort has {', '.join(patients)}"
        )
    if by == "spot":
        groups = len(cohort)
        if groups < n_splits:
            return ValueError, f"{groups} spots cannot make {n_splits} folds"
    else:
        groups = cohort.obs[by].nunique()
        if groups == 1:
            return ValueError, f"the cohort has one {by} ({cohort.obs[by].iloc[0]}) and none to hold out"
    if inner and min(n_splits, groups) < 3:
        number = f"{groups} {by}s make {groups}" if groups < n_splits else f"--n-splits is {n_splits}"
        return ValueError, f"choosing alpha on inner folds needs at least 3 folds, and {number}"
    return None


def _as_rows(split) -> tuple[np.ndarray, np.ndarray]:
    train, test = split
    return np.sort(train).astype(np.int64), np.sort(test).astype(np.int64)
