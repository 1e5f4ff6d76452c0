"""Score features under a protocol, choose alpha on inner folds, and check every step for leakage."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from itertools import combinations

import numpy as np
import pandas as pd

from peka_lite._core.hashing import row_ids
from peka_lite._core.progress import steps
from peka_lite.data.expression import NORMALIZATIONS, expression_targets, top_hvg
from peka_lite.evaluation.leaks import LeakError, require_allowed, require_disjoint
from peka_lite.evaluation.protocols import ALPHAS, Protocol
from peka_lite.evaluation.scores import slide_moments
from peka_lite.probe.moments import alpha_path, components, gather
from peka_lite.probe.pca_ridge import PCARidge


@dataclass(frozen=True)
class Evaluation:
    """Result of `evaluate`.

    Attributes
    ----------
    moments
        `slide_moments` of every normalization and fold, with columns normalization and fold.
    predicted
        Fold -> (test rows, genes, measured, predicted) for the protocol's normalization.
    probes
        Fold -> (`PCARidge` for the protocol's normalization, genes); predicts in the genes' units.
    alphas
        Normalization -> regularization strength of each fold.
    n_components
        Columns after PCA in the last fold.
    """

    moments: pd.DataFrame
    predicted: dict
    probes: dict
    alphas: dict[str, list[float]]
    n_components: int


def evaluate(
    cohort,
    folds: list[tuple[np.ndarray, np.ndarray]],
    features: Callable,
    *,
    protocol: Protocol,
    n_genes: int = 50,
    n_components: int = 256,
    train_mask: np.ndarray | None = None,
) -> Evaluation:
    """Predict the held-out rows of every fold by PCA and ridge, and reduce them to moments.

    Genes, PCA, alpha and ridge are fitted on the rows that the protocol allows. Students of `features` are checked by
    the row ids recorded when they were fitted.

    Parameters
    ----------
    cohort
        `peka_lite.data.Cohort`.
    folds
        Row indices from `peka_lite.folds`; each row is in one test set.
    features
        Function from a tuple of fold numbers to a `Student` fitted without their test rows. Called with ``(i,)``, and
        for alpha ``"inner"`` with every pair ``(i, j)``, i < j.
    train_mask
        (N,) bool, rows that may be used for training; None allows all. Test rows are not restricted.

    Raises
    ------
    LeakError
        If a patient is in training and test of a fold, or genes, teacher, clusters, student or probe were fitted on
        rows outside the training rows.

    Examples
    --------
    >>> import peka_lite as pk
    >>> cohort = pk.open_cohort("mini", slides=["MINI1", "MINI3", "MINI5"])
    >>> color = cohort.tiles[:][:, ::8, ::8].mean((1, 2))  # (N, 3): mean red, green and blue of a tile
    >>> student = pk.experiments.Student(color, {}, None, {}, None)  # not fitted on any row
    >>> splits, protocol = pk.folds(cohort, "patient", 3, 0), pk.evaluation.PROTOCOLS["hest"]
    >>> result = pk.evaluate(cohort, splits, lambda left_out: student, protocol=protocol, n_genes=10)
    >>> moments = result.moments[result.moments["normalization"] == "log1p"]
    >>> pk.evaluation.pool_pcc(moments).groupby("fold")["pcc"].mean().round(2).to_dict()
    {0: 0.28, 1: 0.24, 2: 0.31}
    """
    fold_of = np.empty(len(cohort), dtype=np.int64)
    for i, (_, test) in enumerate(folds):
        fold_of[test] = i
    use = np.ones(len(cohort), dtype=bool) if train_mask is None else np.asarray(train_mask)
    checker = LeakChecker(cohort, folds, protocol)
    genes = []
    for i, (train, _) in enumerate(steps("choosing genes: fold", folds)):
        rows = None if protocol.genes == "all" else train[use[train]]
        genes.append(top_hvg(cohort.adata, n=n_genes, rows=rows, method=protocol.normalization))
        checker.check_genes(genes[i], i)
    union = list(dict.fromkeys(g for names in genes for g in names))
    Y = np.hstack([expression_targets(cohort.adata, union, method=m) for m in NORMALIZATIONS])  # (N, 2 * len(union))
    column = {g: k for k, g in enumerate(union)}
    columns = {
        (i, m): np.array([column[g] for g in genes[i]]) + NORMALIZATIONS.index(m) * len(union)
        for i in range(len(folds))
        for m in NORMALIZATIONS
    }
    # Rows excluded from training have separate cells, to be scored but never summed for training.
    cells = np.where(use, fold_of, fold_of + len(folds))
    memo: dict[int, object] = {}

    def sums(left_out: tuple[int, ...]):
        student = features(left_out)
        checker.check_student(student, left_out)
        if id(student) not in memo:
            memo.clear()  # sums are large: store one set, reused while the student is the same
            memo[id(student)] = (student, gather(student.features, Y, cells))
        return student, memo[id(student)][1]

    chosen = {m: [protocol.alpha] * len(folds) for m in NORMALIZATIONS}
    if protocol.alpha == "inner":
        chosen = _inner_alphas(folds, sums, columns, protocol, n_components, checker)
    tables, predicted, probes, width = [], {}, {}, 0
    slides, patients = cohort.obs["slide"].to_numpy(), cohort.obs["patient"].fillna("unknown").to_numpy()
    for i, (_, test) in enumerate(steps("probe: fold", folds)):
        student, cell_sums = sums((i,))
        moments = cell_sums.over([c for c in range(len(folds)) if c != i])
        checker.check_probe(moments.rows, (i,))
        for m in NORMALIZATIONS:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message=".*training rows of.*components")  # reported in summary.json
                probe = PCARidge(
                    n_components, chosen[m][i], standardize=protocol.standardize, fit_intercept=protocol.fit_intercept
                ).fit_sums(moments.targets(columns[i, m]))
            P, width = probe.predict(student.features[test]), int(probe.n_components_)
            measured = Y[np.ix_(test, columns[i, m])]
            if m == protocol.normalization:
                predicted[i] = (test, list(genes[i]), measured, P)
                probe.intercept_ = moments.mean_y[columns[i, m]]
                probes[i] = probe, list(genes[i])
            scored = slide_moments(measured, P, slides=slides[test], patients=patients[test], genes=genes[i])
            tables.append(scored.assign(normalization=m, fold=i))
    alphas = {m: [a if a == "hest" else float(a) for a in chosen[m]] for m in NORMALIZATIONS}
    return Evaluation(pd.concat(tables, ignore_index=True), predicted, probes, alphas, width)


def left_out_sets(n_folds: int, *, inner: bool) -> list[tuple[int, ...]]:
    """Return the tuples of folds that `evaluate` calls `features` with."""
    pairs = list(combinations(range(n_folds), 2)) if inner else []
    return [(i,) for i in range(n_folds)] + pairs


def _inner_alphas(folds, sums, columns, protocol, n_components, checker) -> dict[str, list[float]]:
    """Choose alpha of each outer fold by its score on the other folds, with students fitted without either.

    The student of the pair (i, j) is used for inner fold j of i and inner fold i of j, so that K folds need
    K (K - 1) / 2 more students instead of K (K - 1).
    """
    n = len(folds)
    scores = {key: [] for key in columns}  # (fold, normalization) -> [(n_alphas,) mean over genes]
    for i, j in steps("alpha: pair of folds", list(combinations(range(n), 2))):
        _, cell_sums = sums((i, j))
        train = cell_sums.over([c for c in range(n) if c not in (i, j)])
        checker.check_probe(train.rows, (i, j))
        reduced = components(train, n_components, standardize=protocol.standardize)
        for outer, inner in ((i, j), (j, i)):
            test = cell_sums.over([c for c in (inner, inner + n) if c in cell_sums.cells])
            path = alpha_path(reduced, test, ALPHAS)  # (n_alphas, targets)
            for m in NORMALIZATIONS:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore", RuntimeWarning)  # a gene that is constant in an inner fold
                    scores[outer, m].append(np.nanmean(path[:, columns[outer, m]], axis=1))
    return {m: [ALPHAS[int(np.nanargmax(np.mean(scores[i, m], axis=0)))] for i in range(n)] for m in NORMALIZATIONS}


def choose_alpha(
    left: tuple[int, ...],
    n_folds: int,
    features,
    checker: LeakChecker,
    *,
    Y,
    cells,
    standardize: bool,
    n_components: int = 256,
) -> float:
    """Return the best of `ALPHAS` over the folds not left out, each scored on a student fitted without it.

    Parameters
    ----------
    Y, cells
        (N, genes) targets, and (N,) each row's fold, -1 for rows excluded from training.
    """
    scores = []
    others = [j for j in range(n_folds) if j not in left]
    for j in steps("alpha: fold", others):
        out = tuple(sorted((*left, j)))
        student = features(out)
        checker.check_student(student, out)
        cell_sums = gather(student.features, Y, cells)
        train = cell_sums.over([c for c in others if c != j])
        checker.check_probe(train.rows, out)
        path = alpha_path(components(train, n_components, standardize=standardize), cell_sums.over([j]), ALPHAS)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # a gene that is constant in an inner fold
            scores.append(np.nanmean(path, axis=1))
    return ALPHAS[int(np.nanargmax(np.mean(scores, axis=0)))]


class LeakChecker:
    """Compare the rows that each step was fitted on with the rows that the protocol allows.

    The constructor checks the folds. It raises a `LeakError` for a group or section in training and test, or for
    sections held out under a named protocol in a cohort of several or unknown patients, and a ValueError for too few
    folds or test rows that do not cover the cohort.
    """

    def __init__(self, cohort, folds, protocol: Protocol):
        self.protocol, self.cohort = protocol, cohort
        self.test = [test for _, test in folds]
        self.counts = row_ids(cohort.adata.X)
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
                require_disjoint(groups, self.counts, train, test, where=f"fold {i}")
        if not np.array_equal(np.sort(np.concatenate(self.test)), np.arange(len(cohort))):
            raise ValueError("each row of the cohort must be in the test rows of one fold")

    @cached_property
    def _slide_counts(self) -> np.ndarray:
        """Ids of the counts used by a teacher: all genes of each slide, not only the shared ones."""
        return np.concatenate([row_ids(s.adata.X) for s in self.cohort.slides])

    def _allowed(self, left_out: tuple[int, ...]) -> np.ndarray:
        allowed = np.ones(len(self.cohort), dtype=bool)
        for fold in left_out:
            allowed[self.test[fold]] = False
        return allowed

    def check_genes(self, genes, fold: int) -> None:
        """Raise a `LeakError` for a `GeneList` chosen on rows outside the fold's training rows, if not allowed."""
        if self.protocol.genes == "train":
            allowed = self.counts[self._allowed((fold,))]
            require_allowed("the choice of genes", genes.fitted_on_, allowed=allowed, where=f"fold {fold}")

    def check_student(self, student, left_out: tuple[int, ...]) -> None:
        """Raise a `LeakError` for a `Student` fitted in any step on test rows of a fold left out."""
        if self.protocol.student == "all":
            return
        allowed, where = self._allowed(left_out), _where(left_out)
        allowed_ids = {
            "teacher": lambda: self._slide_counts[allowed],
            "clusters": lambda: student.embedding_ids[allowed],
            "student": lambda: self.cohort.tiles.ids[allowed],
        }
        for step, learned_from in student.learned_from.items():
            require_allowed(f"the {step}", learned_from, allowed=allowed_ids[step](), where=where)

    def check_probe(self, rows: np.ndarray, left_out: tuple[int, ...]) -> None:
        """Raise a `LeakError` for sums over test rows of a fold left out; `rows` are cohort indices."""
        if n := int((~self._allowed(left_out)[rows]).sum()):
            raise LeakError(f"{_where(left_out)}: PCA and ridge learned from {n} rows outside the training rows")


def _where(left_out: tuple[int, ...]) -> str:
    return f"fold {left_out[0]}" if len(left_out) == 1 else f"inner fold of {left_out[0]} and {left_out[1]}"
