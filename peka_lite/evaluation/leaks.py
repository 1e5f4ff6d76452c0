"""Detect leakage: compare ids of the rows used in a fit with the rows that are allowed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from peka_lite._core.hashing import row_ids as row_ids  # offered beside the checks that compare ids
from peka_lite.evaluation.protocols import Protocol


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
    if learned_from is not None:
        _require_none(step, ~np.isin(learned_from, allowed), where=where)


def _require_none(step: str, outside: np.ndarray, *, where: str) -> None:
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


@dataclass(frozen=True)
class FittedFeatures:
    """Features of every spot, and the rows that each step behind them learned from.

    Attributes
    ----------
    values
        (N, D) float32, possibly a memory map.
    learned_from
        Step (``"teacher"``, ``"clusters"``, ``"student"``, or a name of yours) -> `row_ids` recorded by its fit, None
        for a pretrained step; empty if nothing was fitted.
    embedding_ids
        (N,) `row_ids` of the teacher's embedding of every spot, input of the step ``"clusters"``.

    Examples
    --------
    >>> import numpy as np
    >>> import peka_lite as pk
    >>> cohort = pk.open_cohort("mini", slides=["MINI1", "MINI3"])
    >>> folds, protocol = pk.folds(cohort, "patient", 2, 0), pk.evaluation.PROTOCOLS["hest"]
    >>> everything = np.concatenate([pk.evaluation.row_ids(slide.adata.X) for slide in cohort.slides])
    >>> X = pk.evaluation.FittedFeatures(np.zeros((len(cohort), 2)), {"teacher": everything})
    >>> pk.evaluate(cohort, folds, X, protocol=protocol)
    Traceback (most recent call last):
    peka_lite.evaluation.leaks.LeakError: fold 0: the teacher learned from 156 of 346 rows outside the training ...
    """

    values: np.ndarray
    learned_from: Mapping[str, np.ndarray | None]
    embedding_ids: np.ndarray | None = None


def training_rows(folds, left_out: Sequence[int], train_mask: np.ndarray) -> np.ndarray:
    """Return the rows of the mask (N,) that are in no test set of the folds left out; int64, ascending."""
    keep = np.array(train_mask, dtype=bool)
    for fold in left_out:
        keep[folds[fold][1]] = False
    return np.flatnonzero(keep)


class LeakChecker:
    """Compare the rows that each step was fitted on with the rows that the protocol allows.

    The constructor checks the folds. It raises a `LeakError` for a group or section in training and test, or for
    sections held out under a named protocol in a cohort of several or unknown patients, and a ValueError for too few
    folds, a mask that is not one bool for each row, test rows that do not cover the cohort, or training rows that are
    not all others.
    """

    def __init__(self, cohort, folds, protocol: Protocol, *, train_mask: np.ndarray | None = None):
        n = len(cohort)
        self.cohort, self.folds, self.protocol = cohort, folds, protocol
        self.train_mask = np.ones(n, dtype=bool) if train_mask is None else np.asarray(train_mask)
        if self.train_mask.shape != (n,) or self.train_mask.dtype != bool:
            given = f"{self.train_mask.dtype} {self.train_mask.shape}"
            raise ValueError(f"train_mask is one bool for each of the {n} rows of the cohort, not {given}")
        if protocol.alpha == "inner" and len(folds) < 3:
            raise ValueError(f"choosing alpha on inner folds needs at least 3 folds; there are {len(folds)}")
        patients = sorted(set(cohort.obs["patient"].fillna("unknown")))
        if protocol.split == "slide" and protocol.name != "custom" and (len(patients) > 1 or patients == ["unknown"]):
            raise LeakError(
                f"protocol {protocol.name!r} holds out patients; holding out sections instead needs one known "
                f"patient, and this cohort has {', '.join(patients)}: split by patient, or give slides of one"
            )
        if protocol.split != "spot":
            groups = cohort.obs[protocol.split].to_numpy().astype(str)
            for i, (train, test) in enumerate(folds):
                require_disjoint(groups, cohort.count_ids, train, test, where=f"fold {i}")
        if not np.array_equal(np.sort(np.concatenate([test for _, test in folds])), np.arange(n)):
            raise ValueError("each row of the cohort must be in the test rows of one fold")
        self.fold_of = np.empty(n, dtype=np.int64)
        for i, (_, test) in enumerate(folds):
            self.fold_of[test] = i
        for i, (train, _) in enumerate(folds):
            if not np.array_equal(np.sort(train), np.flatnonzero(self.fold_of != i)):
                raise ValueError(
                    f"the training rows of fold {i} are not all rows outside its test rows; give rows that no fold may "
                    "train on by train_mask"
                )

    def allowed(self, left_out: tuple[int, ...]) -> np.ndarray:
        """Return the rows that may be trained on without these folds (`training_rows`)."""
        return training_rows(self.folds, left_out, self.train_mask)

    def check_genes(self, genes, fold: int) -> None:
        """Raise a `LeakError` for a `GeneList` chosen on rows outside the fold's training rows, if not allowed."""
        if self.protocol.genes == "train":
            allowed = self.cohort.count_ids[self.allowed((fold,))]
            require_allowed("the choice of genes", genes.fitted_on_, allowed=allowed, where=f"fold {fold}")

    def check_features(self, features: FittedFeatures, left_out: tuple[int, ...]) -> None:
        """Raise a `LeakError` for features fitted in any step on rows outside the training rows, if not allowed."""
        if self.protocol.student == "all":
            return
        rows = self.allowed(left_out)
        for step, learned_from in features.learned_from.items():
            if learned_from is None:
                continue
            outside = np.ones(len(learned_from), dtype=bool)
            for ids in self._ids_of(step, features):
                outside &= ~np.isin(learned_from, ids[rows])
                if not outside.any():
                    break
            _require_none(f"the {step}", outside, where=_where(left_out))

    def _ids_of(self, step: str, features: FittedFeatures) -> Iterator[np.ndarray]:
        """Yield the ids (N,) that spots have in the input of a step."""
        if step == "clusters" and features.embedding_ids is not None:
            yield features.embedding_ids
            return
        yield self.cohort.tiles.ids
        yield self.cohort.count_ids
        yield self.cohort.slide_count_ids

    def check_probe(self, rows: np.ndarray, left_out: tuple[int, ...]) -> None:
        """Raise a `LeakError` for sums over rows outside the training rows; `rows` are cohort indices."""
        if n := int((~np.isin(rows, self.allowed(left_out))).sum()):
            raise LeakError(f"{_where(left_out)}: PCA and ridge learned from {n} rows outside the training rows")


def _where(left_out: tuple[int, ...]) -> str:
    return f"fold {left_out[0]}" if len(left_out) == 1 else f"inner fold of {left_out[0]} and {left_out[1]}"
