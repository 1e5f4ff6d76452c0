"""Which rows a thing learned from, told by the rows themselves, and a refusal where it should not have."""

from __future__ import annotations

import numpy as np


class LeakError(ValueError):
    """Something that is judged on held-out rows has learned from rows it must not know.

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
    """Refuse a step that learned from any row outside the allowed ones.

    Parameters
    ----------
    step
        What it is, in words: ``"the clusters"``.
    learned_from
        `row_ids` recorded by its fit; None for one that came trained from elsewhere.
    allowed
        `row_ids` of the training rows.
    where
        Which fold, for the message.

    Raises
    ------
    LeakError
        Naming the step, how many rows and the fold.
    """
    if learned_from is None:
        return
    strange = ~np.isin(learned_from, allowed)
    if strange.any():
        raise LeakError(
            f"{where}: {step} learned from {int(strange.sum())} of {len(strange)} rows outside the training rows; "
            "fit it on the training rows alone"
        )


def require_disjoint(
    groups: np.ndarray, counts: np.ndarray, train: np.ndarray, test: np.ndarray, *, where: str
) -> None:
    """Refuse a fold with one group, or the very same spots, on both sides.

    Parameters
    ----------
    groups
        (N,) patient (or slide) of each row.
    counts
        (N,) `row_ids` of the counts.
    train, test
        Row indices of the fold.
    """
    if both := sorted(set(groups[train]) & set(groups[test])):
        raise LeakError(f"{where}: {', '.join(map(str, both))} on both sides")
    if len(np.intersect1d(train, test)):
        raise LeakError(f"{where}: {len(np.intersect1d(train, test))} rows on both sides")
    if (twins := np.isin(counts[test], counts[train])).any():
        raise LeakError(
            f"{where}: {int(twins.sum())} test spots have the very counts of training spots; is one section in the "
            "cohort under two ids?"
        )
