"""Score features under a protocol, choose alpha on inner folds, and check every step for leakage."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import combinations

import numpy as np
import pandas as pd

from peka_lite._core.progress import steps
from peka_lite.data.expression import NORMALIZATIONS, expression_targets, top_hvg
from peka_lite.evaluation.leaks import FittedFeatures, LeakChecker
from peka_lite.evaluation.protocols import ALPHAS, Protocol
from peka_lite.evaluation.scores import mean_scores, pool_scores, slide_moments
from peka_lite.probe.metrics import spearman
from peka_lite.probe.moments import CellSums, alpha_path, components, gather
from peka_lite.probe.pca_ridge import PCARidge


@dataclass(frozen=True, repr=False)
class Evaluation:
    """Result of `evaluate`; printed as its mean scores on the protocol's targets.

    Attributes
    ----------
    protocol
        The `Protocol`.
    learned_from
        What is known about the rows that the features learned from: ``"not declared"``, ``"declared and checked"``,
        ``"declared"`` (the protocol allows all rows, so there is nothing to check) or ``"recorded by each fit"``.
    scores
        normalization, fold, gene, pcc, r2, rmse and spearman, over all test spots of the fold.
    moments
        `slide_moments` of every normalization and fold, with columns normalization and fold.
    predicted
        Fold -> (test rows, genes, measured, predicted) for the protocol's normalization.
    probes
        Fold -> (`PCARidge` for the protocol's normalization, genes); predicts in the genes' units, so always with an
        intercept. Without one in the protocol, `predicted` and R2 and RMSE are of predictions without it.
    alphas
        Normalization -> regularization strength of each fold.
    n_components
        Columns after PCA in the last fold.

    Examples
    --------
    >>> import peka_lite as pk
    >>> cohort = pk.open_cohort("mini", slides=["MINI1", "MINI3", "MINI5"])
    >>> folds, X = pk.folds(cohort, "patient", 3, 0), pk.evaluation.depth_features(cohort)
    >>> pk.evaluate(cohort, folds, X, protocol=pk.evaluation.PROTOCOLS["strict"], n_genes=10, learned_from={})
    ... # doctest: +ELLIPSIS
    Evaluation(protocol: strict, targets: log1p-cp10k, PCC 0.019, ... features learned from: declared and checked)
    """

    protocol: Protocol
    learned_from: str
    scores: pd.DataFrame
    moments: pd.DataFrame
    predicted: dict
    probes: dict
    alphas: dict[str, list[float]]
    n_components: int

    def _as_row(self) -> dict:
        scores = self.scores[self.scores["normalization"] == self.protocol.normalization]
        row = {"protocol": self.protocol.name, "targets": self.protocol.normalization}
        row["PCC"] = float(scores.groupby("fold")["pcc"].mean().mean())
        means = mean_scores(scores)[self.protocol.normalization]
        row |= {"R2": means["r2"], "RMSE": means["rmse"], "Spearman": means["spearman"]}
        return row | {"features learned from": self.learned_from}

    def __repr__(self) -> str:
        texts = (f"{k} {v:.3f}" if isinstance(v, float) else f"{k}: {v}" for k, v in self._as_row().items())
        return f"Evaluation({', '.join(texts)})"

    def _repr_html_(self) -> str:
        return pd.DataFrame([self._as_row()]).to_html(index=False, float_format="{:.3f}".format)


def evaluate(
    cohort,
    folds: list[tuple[np.ndarray, np.ndarray]],
    X,
    *,
    protocol: Protocol,
    n_genes: int = 50,
    n_components: int = 256,
    train_mask: np.ndarray | None = None,
    learned_from: np.ndarray | Mapping[str, np.ndarray | None] | None = None,
) -> Evaluation:
    """Predict the held-out rows of every fold from features by PCA and ridge, and score the predictions.

    Genes, PCA, alpha and ridge are fitted on the rows that the protocol allows. The rows that the features learned from
    are checked as far as they are known.

    Parameters
    ----------
    cohort
        `peka_lite.data.Cohort`.
    folds
        Row indices from `peka_lite.folds`; each row is in one test set.
    X
        Features of every spot: an array (N, D) of finite numbers, or a `FittedFeatures`, which records what its fits
        learned from. Or, for features that are fitted, a function that returns one of these: it is called with the
        rows (int64, ascending) that may be used for a fold, and for alpha ``"inner"`` with those without any two
        folds. An object that it returns again must have the same content.
    train_mask
        (N,) bool, rows that may be used for training; None allows all. Test rows are not restricted.
    learned_from
        `row_ids` of the rows that features given as arrays learned from: of counts (``cohort.adata.X``, or all genes
        of each slide) or of tiles (``cohort.tiles.ids``). Or a mapping: step -> ids, None for a pretrained step; ``{}``
        declares that nothing was fitted.

    Raises
    ------
    LeakError
        If a patient is in training and test of a fold, or if genes, PCA and ridge, or a step of the features learned
        from rows outside the training rows; it names the fold, the step and the number of rows.
    ValueError
        For folds that do not fit the cohort or protocol, features that are not one row of finite numbers for each spot,
        and a `learned_from` that has no row ids.

    Examples
    --------
    >>> import peka_lite as pk
    >>> cohort = pk.open_cohort("mini", slides=["MINI1", "MINI3", "MINI5"])
    >>> X = cohort.tiles[:][:, ::8, ::8].mean((1, 2))  # (N, 3): mean red, green and blue of a tile
    >>> folds, protocol = pk.folds(cohort, "patient", 3, 0), pk.evaluation.PROTOCOLS["hest"]
    >>> result = pk.evaluate(cohort, folds, X, protocol=protocol, n_genes=10)
    >>> result.scores.query("normalization == 'log1p'").groupby("fold")["pcc"].mean().round(2).to_dict()
    {0: 0.28, 1: 0.24, 2: 0.31}
    >>> result.learned_from
    'not declared'

    Features that learn, here the mean color of the training rows:

    >>> result = pk.evaluate(cohort, folds, lambda rows: X - X[rows].mean(0), protocol=protocol, n_genes=10)
    """
    features = _Features(X, len(cohort), learned_from)
    checker = LeakChecker(cohort, folds, protocol, train_mask=train_mask)
    genes = []
    for i in steps("choosing genes: fold", range(len(folds))):
        rows = None if protocol.genes == "all" else checker.allowed((i,))
        genes.append(top_hvg(cohort.adata, n=n_genes, rows=rows, method=protocol.normalization))
        checker.check_genes(genes[i], i)
    union = list(dict.fromkeys(g for names in genes for g in names))
    Y = np.hstack([expression_targets(cohort.adata, union, method=m) for m in NORMALIZATIONS])  # (N, 2 * len(union))
    column = {g: k for k, g in enumerate(union)}
    columns = {
        ((i,), m): np.array([column[g] for g in genes[i]]) + NORMALIZATIONS.index(m) * len(union)
        for i in range(len(folds))
        for m in NORMALIZATIONS
    }
    # Rows excluded from training have separate cells, to be scored but never summed for training.
    cells = np.where(checker.train_mask, checker.fold_of, checker.fold_of + len(folds))
    sums = _FoldSums(features, checker, Y, cells)
    alphas = dict.fromkeys(columns, protocol.alpha)
    if protocol.alpha == "inner":
        alphas = _choose_alphas(columns, sums, checker, n_components)
    tables, rank_correlations, predicted, probes, width = [], [], {}, {}, 0
    slides, patients = cohort.obs["slide"].to_numpy(), cohort.obs["patient"].fillna("unknown").to_numpy()
    for i, (_, test) in enumerate(steps("probe: fold", folds)):
        values, cell_sums = sums((i,))
        moments = cell_sums.over([c for c in range(len(folds)) if c != i])
        checker.check_probe(moments.rows, (i,))
        for m in NORMALIZATIONS:
            at = columns[(i,), m]
            options = {"standardize": protocol.standardize, "fit_intercept": protocol.fit_intercept}
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message=".*training rows of.*components")  # reported in summary.json
                probe = PCARidge(n_components, alphas[(i,), m], **options).fit_sums(moments.targets(at))
            measured, P, width = Y[np.ix_(test, at)], probe.predict(values[test]), int(probe.n_components_)
            if m == protocol.normalization:
                predicted[i] = (test, list(genes[i]), measured, P)
                # The coefficients are those with an intercept: features are centered.
                probe.fit_intercept, probe.intercept_ = True, moments.mean_y[at]
                probes[i] = probe, list(genes[i])
            scored = slide_moments(measured, P, slides=slides[test], patients=patients[test], genes=genes[i])
            tables.append(scored.assign(normalization=m, fold=i))
            rank_correlations.append(spearman(measured, P))
    moments = pd.concat(tables, ignore_index=True)
    return Evaluation(
        protocol=protocol,
        learned_from=features.describe_origin(checked=protocol.student == "train"),
        scores=pool_scores(moments).assign(spearman=np.concatenate(rank_correlations)),
        moments=moments,
        predicted=predicted,
        probes=probes,
        alphas={
            m: [a if (a := alphas[(i,), m]) == "hest" else float(a) for i in range(len(folds))] for m in NORMALIZATIONS
        },
        n_components=width,
    )


def left_out_sets(n_folds: int, *, inner: bool) -> list[tuple[int, ...]]:
    """Return the tuples of folds without which `evaluate` asks for features."""
    pairs = list(combinations(range(n_folds), 2)) if inner else []
    return [(i,) for i in range(n_folds)] + pairs


def choose_alpha(
    left_out: tuple[int, ...], X, checker: LeakChecker, *, Y: np.ndarray, n_components: int = 256
) -> float:
    """Return the best of `ALPHAS` for a probe fitted without `left_out`, scored on each other fold.

    Parameters
    ----------
    left_out
        One fold or none.
    X
        As for `evaluate`; a function is called with the rows that are neither in `left_out` nor in the scored fold.
    checker
        Gives folds, protocol and the rows that may be used.
    Y
        (N, genes) targets.
    """
    cells = np.where(checker.train_mask, checker.fold_of, -1)
    sums = _FoldSums(_Features(X, len(checker.cohort)), checker, Y, cells)
    return _choose_alphas({(left_out, ""): slice(None)}, sums, checker, n_components)[left_out, ""]


def _choose_alphas(columns: dict, sums: _FoldSums, checker: LeakChecker, n_components: int) -> dict:
    """Choose alpha for each (folds left out, name) and its target columns, by the score on each other fold.

    Features without folds i and j are used for inner fold j of i and inner fold i of j, so that K folds need
    K (K - 1) / 2 more fits instead of K (K - 1).
    """
    n, scored = len(checker.folds), {}  # folds left out of a fit -> [(folds left out, inner fold)]
    for outer in dict.fromkeys(outer for outer, _ in columns):
        for inner in (fold for fold in range(n) if fold not in outer):
            scored.setdefault(tuple(sorted((*outer, inner))), []).append((outer, inner))
    scores = {key: [] for key in columns}  # [(n_alphas,) mean over genes]
    for out, pairs in steps("alpha: folds left out", list(scored.items())):
        _, cell_sums = sums(out)
        train = cell_sums.over([c for c in range(n) if c not in out])
        checker.check_probe(train.rows, out)
        reduced = components(train, n_components, standardize=checker.protocol.standardize)
        for outer, inner in pairs:
            test = cell_sums.over([inner, inner + n])  # with the rows excluded from training, if they have a cell
            path = alpha_path(reduced, test, ALPHAS)  # (n_alphas, targets)
            for key in [key for key in columns if key[0] == outer]:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore", RuntimeWarning)  # a gene that is constant in an inner fold
                    scores[key].append(np.nanmean(path[:, columns[key]], axis=1))
    return {key: ALPHAS[int(np.nanargmax(np.mean(values, axis=0)))] for key, values in scores.items()}


class _Features:
    """Checked features for given training rows, from any `X` of `evaluate`."""

    def __init__(self, X, n: int, learned_from=None):
        self.X, self.n, self.learned_from = X, n, learned_from
        self.given = self.features = None  # the object that X gave last, held so that no other gets its id
        self.kinds = set()
        if learned_from is not None:
            self.learned_from = learned_from if isinstance(learned_from, Mapping) else {"features": learned_from}
            for step, ids in self.learned_from.items():
                if ids is not None and (np.ndim(ids) != 1 or getattr(ids, "dtype", None) != np.uint64):
                    raise ValueError(
                        f"learned_from has no row ids for {step!r}: give the uint64 array of pk.evaluation.row_ids "
                        "of the rows, not row numbers"
                    )
        if not callable(X):
            self._set(X)

    def __call__(self, rows: np.ndarray) -> FittedFeatures:
        given = self.X(rows) if callable(self.X) else self.X
        if self.features is None or given is not self.given:
            self._set(given)
        return self.features

    def _set(self, given) -> None:
        fitted = isinstance(given, FittedFeatures)
        if fitted and self.learned_from is not None:
            raise ValueError("FittedFeatures record what they learned from: leave out learned_from")
        self.kinds.add("recorded" if fitted else "not declared" if self.learned_from is None else "declared")
        _check_values(given.values if fitted else given, self.n)
        self.given = given
        self.features = given if fitted else FittedFeatures(np.asarray(given), self.learned_from or {})
        ids = self.features.embedding_ids
        if ids is not None and len(ids) != self.n:
            raise ValueError(f"embedding_ids has {len(ids)} rows for {self.n} spots")

    def describe_origin(self, *, checked: bool) -> str:
        """Return `Evaluation.learned_from`."""
        if "not declared" in self.kinds:
            return "not declared"
        if "recorded" in self.kinds:
            return "recorded by each fit"
        return "declared and checked" if checked else "declared"


def _check_values(values, n: int) -> None:
    """Raise a ValueError unless these are finite numbers (n, D)."""
    values = np.asarray(values)
    if values.ndim != 2 or not (np.issubdtype(values.dtype, np.floating) or np.issubdtype(values.dtype, np.integer)):
        raise ValueError(f"features are a 2-D array of real numbers (spots, width), not {values.dtype} {values.shape}")
    if len(values) != n or not values.shape[1]:
        raise ValueError(f"features have {len(values)} rows and {values.shape[1]} columns for {n} spots of the cohort")
    for start in range(0, n, 4096):
        bad = np.argwhere(~np.isfinite(values[start : start + 4096]))
        if len(bad):
            row, column = bad[0] + [start, 0]
            raise ValueError(f"features have NaN or infinite values; the first in row {row}, column {column}")


class _FoldSums:
    """Features without given folds, and their sums by cell, reused while the features are the same object."""

    def __init__(self, features: _Features, checker: LeakChecker, Y: np.ndarray, cells: np.ndarray):
        self.features, self.checker, self.Y, self.cells = features, checker, Y, cells
        self.summed = self.sums = None

    def __call__(self, left_out: tuple[int, ...]) -> tuple[np.ndarray, CellSums]:
        allowed = () if self.checker.protocol.student == "all" else left_out
        features = self.features(self.checker.allowed(allowed))
        self.checker.check_features(features, left_out)
        if features is not self.summed:
            self.sums = None  # large: release the last ones first
            self.summed, self.sums = features, gather(features.values, self.Y, self.cells)
        return features.values, self.sums
