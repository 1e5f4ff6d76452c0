"""Detect leakage: compare ids of the rows used in a fit with the rows that are allowed."""

from __future__ import annotations

import numpy as np


class LeakError(ValueError):
    """A step that is scored on held-out rows was fitted on rows outside its training rows.

    Examples
    --------
    >>> import numpy as np
    >>> import peka_lite as pk
    >>> E = np.random.default_rng(0).normal(size=(100, 5)).astype(np.float32)
    >>> clusters = pk.PseudoLabeler("kmeans", n_clusters=3).fit(E)  # on all rows
    >>> train = pk.evaluation.row_ids(E[:80])
    >>> from peka_lite.evaluation.leaks import require_allowed
    >>> require_allowed("the clusters", clusters.fitted_on_, allowed=train, where="fold 0")
    ... # doctest: +ELLIPSIS
    Traceback (most recent call last):
        ...
    peka_lite.evaluation.leaks.LeakError: fold 0: the clusters learned from 20 of 100 rows outside the training ...
    """


def require_allowed(step: str, learned_from: np.ndarray | None, *, allowed: np.ndarray, where: str) -> None:
    """Raise a LeakError if a step was fitted on rows outside the allowed ones.

    Parameters
    ----------
    step
        Name of the step for the message: ``"the clusters"``.
    learned_from
        `row_ids` recorded by its fit; None for a pretrained model.
    allowed
        `row_ids` of the training rows.
    where
        Name of the fold for the message.

    Raises
    ------
    LeakError
        Names the fold, the step and the number of rows.
    """
    if learned_from is None:
        return
    outside = ~np.isin(learned_from, allowed)
    if outside.any():
        raise LeakError(
            f"{where}: {step} learned from {int(outside.sum())} of {len(outside)} rows outside the training rows; "
            "fit it on the training rows alone"
        )


def require_disjoint(
    groups: np.ndarray, counts: np.ndarray, train: np.ndarray, test: np.ndarray, *, where: str
) -> None:
    """Raise a LeakError for a fold with a group or a spot in both training and test.

    Parameters
    ----------
    groups
        (N,) patient (or slide) of each row.
    counts
        (N,) `row_ids` of the counts.
    train, test
        Row indices of the fold.
    """
    if shared := sorted(set(groups[train]) & set(groups[test])):
        raise LeakError(f"{where}: {', '.join(map(str, shared))} in both training and test")
    if len(np.intersect1d(train, test)):
        raise LeakError(f"{where}: {len(np.intersect1d(train, test))} rows in both training and test")
    if (duplicates := np.isin(counts[test], counts[train])).any():
        raise LeakError(
            f"{where}: {int(duplicates.sum())} test spots have the same counts as training spots; is one section "
            "in the cohort under two ids?"
        )
