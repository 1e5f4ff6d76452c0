"""Score features under a protocol: fold by fold, penalty by penalty, with every promise of the protocol checked."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from itertools import combinations

import numpy as np
import pandas as pd

from peka_lite._core.hashing import row_ids
from peka_lite._core.progress import Stage
from peka_lite.data.expression import NORMALIZATIONS, expression_targets, top_hvg
from peka_lite.evaluation.leaks import LeakError, require_allowed, require_disjoint
from peka_lite.evaluation.protocols import ALPHAS, Protocol
from peka_lite.evaluation.scores import slide_moments
from peka_lite.probe.moments import alpha_path, components, gather
from peka_lite.probe.pca_ridge import PCARidge


@dataclass(frozen=True)
class Evaluation:
    """What scoring gives.

    Attributes
    ----------
    moments
        `slide_moments` of every normalization and fold, with columns normalization and fold.
    predicted
        Fold -> (test rows, genes, measured, predicted) for the protocol's own normalization.
    probes
        Fold -> (`PCARidge` for the protocol's own normalization, genes); predicts in the genes' units.
    alphas
        Normalization -> penalty of each fold.
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
    taught_by: np.ndarray | None = None,
) -> Evaluation:
    """Predict the held-out rows of every fold by PCA and ridge, and reduce them to moments.

    Genes, PCA, penalty and ridge are made here, from the rows that the protocol allows; what `features` brings is
    judged by the rows it recorded when it learned, not by what its maker says.

    Parameters
    ----------
    cohort
        `peka_lite.data.Cohort`.
    folds
        Row indices from `peka_lite.folds`, whose tests hold each row once.
    features
        Given a tuple of fold numbers, returns a `Student` that learned from none of their test rows. Asked for
        ``(i,)``, and with an ``"inner"`` penalty for every pair ``(i, j)``, i < j.
    taught_by
        (N,) bool, training rows that may be used at all; None takes all. Test rows are always all of them.

    Raises
    ------
    LeakError
        When a promise of the protocol is broken: a patient on both sides, or genes, teacher, clusters, student or
        probe that learned from rows outside the training rows.

    Examples
    --------
    >>> import peka_lite as pk
    >>> cohort = pk.open_cohort("mini", slides=["MINI1", "MINI3", "MINI5"])
    >>> color = cohort.tiles[:][:, ::8, ::8].mean((1, 2))  # (N, 3): mean red, green and blue of a tile
    >>> student = pk.experiments.Student(color, {}, None, {}, None)  # it learned from no row
    >>> splits, protocol = pk.folds(cohort, "patient", 3, 0), pk.evaluation.PROTOCOLS["hest"]
    >>> done = pk.evaluate(cohort, splits, lambda left_out: student, protocol=protocol, n_genes=10)
    >>> own = done.moments[done.moments["normalization"] == "log1p"]
    >>> pk.evaluation.pool_pcc(own).groupby("fold")["pcc"].mean().round(2).to_dict()
    {0: 0.28, 1: 0.24, 2: 0.31}
    """
    fold_of = np.empty(len(cohort), dtype=np.int64)
    for i, (_, test) in enumerate(folds):
        fold_of[test] = i
    use = np.ones(len(cohort), dtype=bool) if taught_by is None else np.asarray(taught_by)
    judge = LeakChecker(cohort, folds, protocol)
    genes = []
    for i, (train, _) in enumerate(Stage("choosing genes: fold", folds)):
        rows = None if protocol.genes == "all" else train[use[train]]
        genes.append(top_hvg(cohort.adata, n=n_genes, rows=rows, method=protocol.normalization))
        judge.genes(genes[i], i)
    union = list(dict.fromkeys(g for names in genes for g in names))
    Y = np.hstack([expression_targets(cohort.adata, union, method=m) for m in NORMALIZATIONS])  # (N, 2 * len(union))
    column = {g: k for k, g in enumerate(union)}
    columns = {
        (i, m): np.array([column[g] for g in genes[i]]) + NORMALIZATIONS.index(m) * len(union)
        for i in range(len(folds))
        for m in NORMALIZATIONS
    }
    # Test rows that may not teach stay out of every training sum, yet are scored.
    cells = np.where(use, fold_of, fold_of + len(folds))
    memo: dict[int, object] = {}

    def sums(left_out: tuple[int, ...]):
        student = features(left_out)
        judge.student(student, left_out)
        if id(student) not in memo:
            memo.clear()  # one set of sums is large; those of a student that never changes are kept
            memo[id(student)] = (student, gather(student.features, Y, cells))
        return student, memo[id(student)][1]

    chosen = {m: [protocol.alpha] * len(folds) for m in NORMALIZATIONS}
    if protocol.alpha == "inner":
        chosen = _inner_alphas(folds, sums, columns, protocol, n_components, judge)
    tables, predicted, probes, width = [], {}, {}, 0
    slides, patients = cohort.obs["slide"].to_numpy(), cohort.obs["patient"].fillna("unknown").to_numpy()
    for i, (_, test) in enumerate(Stage("probe: fold", folds)):
        student, gathered = sums((i,))
        moments = gathered.over([c for c in range(len(folds)) if c != i])
        judge.probe(moments.rows, (i,))
        for m in NORMALIZATIONS:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message=".*training rows of.*components")  # told in summary.json
                probe = PCARidge(
                    n_components,
                    chosen[m][i],
                    standardize=protocol.standardize,
                    fit_intercept=protocol.fit_intercept,
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
    """Return what `evaluate` asks features for: each fold left out, and each pair where the penalty is chosen inside.

    Examples
    --------
    >>> from peka_lite.evaluation.evaluate import left_out_sets
    >>> left_out_sets(3, inner=True)
    [(0,), (1,), (2,), (0, 1), (0, 2), (1, 2)]
    """
    pairs = list(combinations(range(n_folds), 2)) if inner else []
    return [(i,) for i in range(n_folds)] + pairs


def _inner_alphas(folds, sums, columns, protocol, n_components, judge) -> dict[str, list[float]]:
    """Choose each outer fold's penalty by its score on the other folds, each held out from the students scored on it.

    The student of the pair (i, j) saw neither: it serves fold j inside i and fold i inside j, so that K folds take
    K (K - 1) / 2 students more and not K (K - 1).
    """
    n = len(folds)
    scores = {key: [] for key in columns}  # (fold, normalization) -> [(n_alphas,) mean over genes]
    for i, j in Stage("penalty: pair of folds", list(combinations(range(n), 2))):
        _, gathered = sums((i, j))
        train = gathered.over([c for c in range(n) if c not in (i, j)])
        judge.probe(train.rows, (i, j))
        reduced = components(train, n_components, standardize=protocol.standardize)
        for outer, inner in ((i, j), (j, i)):
            test = gathered.over([c for c in (inner, inner + n) if c in gathered.cells])
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
    judge: LeakChecker,
    *,
    Y,
    cells,
    standardize: bool,
    n_components: int = 256,
) -> float:
    """Return the penalty of `ALPHAS` that scores best over the folds not left out, each on a student that missed it.

    Parameters
    ----------
    Y, cells
        (N, genes) targets, and (N,) each row's fold, -1 where it may not teach.
    """
    scores = []
    others = [j for j in range(n_folds) if j not in left]
    for j in Stage("penalty: fold", others):
        out = tuple(sorted((*left, j)))
        student = features(out)
        judge.student(student, out)
        gathered = gather(student.features, Y, cells)
        train = gathered.over([c for c in others if c != j])
        judge.probe(train.rows, out)
        path = alpha_path(components(train, n_components, standardize=standardize), gathered.over([j]), ALPHAS)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # a gene that is constant in an inner fold
            scores.append(np.nanmean(path, axis=1))
    return ALPHAS[int(np.nanargmax(np.mean(scores, axis=0)))]


class LeakChecker:
    """Compares what each step recorded with the rows that the protocol allows it.

    Making one checks the folds themselves, before anything learns: a group or a section on both sides is a `LeakError`,
    as are sections held out under a named protocol where more than one patient, or an unknown one, is in the cohort;
    too few folds or test rows that do not cover the cohort are a ValueError.
    """

    def __init__(self, cohort, folds, protocol: Protocol):
        self.protocol, self.cohort = protocol, cohort
        self.test = [test for _, test in folds]
        self.counts = row_ids(cohort.adata.X)
        if protocol.alpha == "inner" and len(folds) < 3:
            raise ValueError(f"choosing a penalty on inner folds needs at least 3 folds; there are {len(folds)}")
        patients = sorted(set(cohort.obs["patient"].fillna("unknown")))
        if protocol.split == "slide" and protocol.name != "custom" and (len(patients) > 1 or patients == ["unknown"]):
            raise LeakError(
                f"protocol {protocol.name!r} holds out patients; sections may stand for them only within one known "
                f"patient, and this cohort has {', '.join(patients)}: split by patient, or give slides of one"
            )
        if protocol.split != "spot":
            groups = cohort.obs[protocol.split].to_numpy().astype(str)
            for i, (train, test) in enumerate(folds):
                require_disjoint(groups, self.counts, train, test, where=f"fold {i}")
        if not np.array_equal(np.sort(np.concatenate(self.test)), np.arange(len(cohort))):
            raise ValueError("the folds' test rows must hold each row of the cohort once")

    @cached_property
    def _slide_counts(self) -> np.ndarray:
        """Ids of the counts a teacher sees: all genes of each slide, not the shared ones alone."""
        return np.concatenate([row_ids(s.adata.X) for s in self.cohort.slides])

    def _allowed(self, left_out: tuple[int, ...]) -> np.ndarray:
        allowed = np.ones(len(self.cohort), dtype=bool)
        for fold in left_out:
            allowed[self.test[fold]] = False
        return allowed

    def genes(self, genes, fold: int) -> None:
        """Refuse a `GeneList` that rows outside the fold's training rows helped to choose, unless all rows may."""
        if self.protocol.genes == "train":
            allowed = self.counts[self._allowed((fold,))]
            require_allowed("the choice of genes", genes.fitted_on_, allowed=allowed, where=f"fold {fold}")

    def student(self, student, left_out: tuple[int, ...]) -> None:
        """Refuse a `Student` whose teacher, clusters or weights learned from the test rows of a fold left out."""
        if self.protocol.student == "all":
            return
        allowed, where = self._allowed(left_out), _where(left_out)
        known = {
            "teacher": lambda: self._slide_counts[allowed],
            "clusters": lambda: student.embedding_ids[allowed],
            "student": lambda: self.cohort.tiles.ids[allowed],
        }
        for step, learned_from in student.learned_from.items():
            require_allowed(f"the {step}", learned_from, allowed=known[step](), where=where)

    def probe(self, rows: np.ndarray, left_out: tuple[int, ...]) -> None:
        """Refuse sums that hold test rows of a fold left out; `rows` are cohort indices."""
        if outside := int((~self._allowed(left_out)[rows]).sum()):
            raise LeakError(f"{_where(left_out)}: PCA and ridge learned from {outside} rows outside the training rows")


def _where(left_out: tuple[int, ...]) -> str:
    return f"fold {left_out[0]}" if len(left_out) == 1 else f"inner fold of {left_out[0]} and {left_out[1]}"
