"""Who is held out: spots, slides or patients."""

from __future__ import annotations

import warnings

import numpy as np
from sklearn.model_selection import GroupKFold, KFold

from peka_lite.evaluation.leaks import LeakError
from peka_lite.evaluation.protocols import SPLITS

SAYS = {"slide": "tells nothing about a new patient", "spot": "scores neighbors of training spots: too high"}


def folds(cohort, by: str = "patient", n_splits: int = 5, seed: int = 0) -> list[tuple[np.ndarray, np.ndarray]]:
    """Split the rows of a cohort into folds in which no group stands on both sides.

    Parameters
    ----------
    cohort
        `peka_lite.data.Cohort`.
    by
        ``"patient"``: people are held out, what a new patient would see. ``"slide"``: sections are held out; two
        sections of one person may stand on both sides. ``"spot"``: random spots, as in the authors' released code
        (protocol ``"paper"``); neighbors of a test spot are in training.
    n_splits
        Number of folds. With fewer groups than folds, each group is one fold, and a warning says so.
    seed
        Decides the shuffle.

    Returns
    -------
    list of (train, test)
        int64 row indices, ascending, disjoint; the tests together hold each row once.

    Raises
    ------
    ValueError
        With one group, or where a slide's patient is unknown: nobody can be held out by guessing.

    Examples
    --------
    How many of the two patients stand on both sides of each fold:

    >>> import peka_lite as pk
    >>> cohort = pk.open_cohort("mini", slides=["MINI1", "MINI2", "MINI7"])  # MINI1 and MINI7 are of one patient
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
            f"no patient is known for {', '.join(unknown)}, and a patient split does not guess. Give patients=FILE.csv "
            "(columns id,patient), or split by slide and say so beside the result."
        )
    groups = cohort.obs[by].to_numpy().astype(str)
    names = np.unique(groups)
    if len(names) == 1:
        other = "slide" if len(cohort.slides) > 1 else "spot"
        raise ValueError(
            f"the cohort holds one {by} ({names[0]}); there is none to hold out. Add slides of others, or split by "
            f"{other}, which {SAYS[other]}"
        )
    if len(names) < n_splits:
        warnings.warn(f"{len(names)} {by}s for {n_splits} folds: each {by} is one fold", stacklevel=2)
        n_splits = len(names)
    splitter = GroupKFold(n_splits, shuffle=True, random_state=seed)
    made = [_as_rows(s) for s in splitter.split(np.zeros(n), groups=groups)]
    for train, test in made:
        if crossing := set(groups[train]) & set(groups[test]):
            raise AssertionError(f"{by} on both sides of a fold: {', '.join(sorted(crossing))}")
    return made


def protocol_folds(cohort, protocol, n_splits: int, seed: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """Split a cohort as a `Protocol` asks; where that cannot be, name settings under which it can.

    Raises
    ------
    ValueError
        With too few patients, slides or spots, or an unknown patient; a `LeakError` where sections would stand for
        patients. The message names options of ``peka-lite run`` with which this cohort can be split.
    """
    inner, named, by = protocol.alpha == "inner", protocol.name != "custom", protocol.split
    why = _why_not(cohort, by, n_splits, inner=inner, named=named)
    if why is None:
        return folds(cohort, by, n_splits, seed)
    slide, spot = f"--split slide, which {SAYS['slide']}", f"which {SAYS['spot']}"
    enough = 3 if n_splits < 3 else len(cohort)
    # Words, split, folds, penalty on inner folds, under a protocol's name; what holds most out comes first.
    ways = [(f"--n-splits {enough}", by, enough, inner, named)]
    if named:
        ways += [
            ("--protocol hest", "patient", n_splits, False, True),
            (f"--protocol hest with {slide}", "slide", n_splits, False, True),
            ("--alpha NUMBER without --protocol", "patient", n_splits, False, False),
            (f"--protocol paper, {spot}", "spot", n_splits, False, True),
        ]
    else:
        ways += [
            ("--alpha hest or a number", by, n_splits, False, False),
            (slide, "slide", n_splits, inner, False),
            (f"--split spot, {spot}", "spot", n_splits, inner, False),
        ]
    found = [words for words, *way in ways if _why_not(cohort, way[0], way[1], inner=way[2], named=way[3]) is None]
    unknown = any(s.patient is None for s in cohort.slides)
    kind, words = why
    if not found or not found[0].startswith("--n-splits"):  # other slides are wanted
        found.insert(0, "--patients FILE.csv (columns id,patient)" if unknown else "slides of more patients")
    raise kind(f"{words}: give {', or '.join(found[:3])}")


def _why_not(cohort, by: str, n_splits: int, *, inner: bool, named: bool) -> tuple[type[ValueError], str] | None:
    """Say why a cohort cannot be split so, with the error that it is; None where it can."""
    patients = sorted({s.patient or "unknown" for s in cohort.slides})
    if by == "patient" and (unknown := [s.id for s in cohort.slides if s.patient is None]):
        return ValueError, f"no patient is known for {', '.join(unknown)}, and a patient split does not guess"
    if by == "slide" and named and (len(patients) > 1 or patients == ["unknown"]):
        return LeakError, (
            "the protocol holds out patients; sections may stand for them only within one known patient, and this "
            f"cohort has {', '.join(patients)}"
        )
    if by == "spot":
        groups = len(cohort)
        if groups < n_splits:
            return ValueError, f"{groups} spots cannot make {n_splits} folds"
    else:
        groups = cohort.obs[by].nunique()
        if groups == 1:
            return ValueError, f"the cohort holds one {by} ({cohort.obs[by].iloc[0]}), there is none to hold out"
    if inner and min(n_splits, groups) < 3:
        made = f"{groups} {by}s make {groups}" if groups < n_splits else f"--n-splits asks for {n_splits}"
        return ValueError, f"choosing a penalty on inner folds needs at least 3 folds, and {made}"
    return None


def _as_rows(split) -> tuple[np.ndarray, np.ndarray]:
    train, test = split
    return np.sort(train).astype(np.int64), np.sort(test).astype(np.int64)
