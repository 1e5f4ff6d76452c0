"""Predict genes from frozen features by PCA and ridge: the probe of equation 1 of PEKA."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence

import numpy as np
import pandas as pd

from peka_lite.probe._choices import check_alpha
from peka_lite.probe.metrics import fold_table
from peka_lite.probe.moments import Moments, components, gather

SOLVERS = ("exact", "hest-bench")
CHUNK = 4096  # rows in float64 at a time
MOST_BYTES = 4 * 2**30  # for the sums of cross_validate


class PCARidge:
    """Standardize features, reduce them by PCA and predict all genes by ridge.

    Parameters
    ----------
    n_components
        Width after PCA, 256 in the paper and in HEST-bench. ``"exact"`` caps it at the rank the data allow and
        warns. None skips PCA.
    alpha
        Regularization strength: factor of the squared norm in ridge, added to the sum of squared errors. ``"hest"`` is
        HEST-bench's ``100 / (columns after PCA * genes)``.
    solver
        ``"exact"``: closed form in float64 from sums (`peka_lite.probe.moments`), deterministic.
        ``"hest-bench"``: scikit-learn with HEST-bench's settings (seeded PCA, scores rounded to float32, iterative
        lsqr, no intercept), for comparison with its published numbers.
    standardize
        Divide each feature by its standard deviation before PCA, as HEST-bench does. False needs ``"exact"``.
    fit_intercept
        Add the genes' training means, so that predictions are in the genes' units. HEST-bench does not; the Pearson
        correlation is the same. True needs ``"exact"``.

    Examples
    --------
    >>> import numpy as np
    >>> import peka_lite as pk
    >>> X = np.random.default_rng(0).normal(size=(80, 6))  # features of 80 spots
    >>> Y = X[:, :2] + 3  # two genes
    >>> probe = pk.probe.PCARidge(n_components=6, alpha=0.0, fit_intercept=True).fit(X[:60], Y[:60])
    >>> probe.coef_.shape, bool(np.allclose(probe.predict(X[60:]), Y[60:]))
    ((6, 2), True)
    """

    def __init__(
        self,
        n_components: int | None = 256,
        alpha: str | float = "hest",
        solver: str = "exact",
        *,
        standardize: bool = True,
        fit_intercept: bool = False,
    ):
        if solver not in SOLVERS:
            raise ValueError(f"unknown solver {solver!r}; known: {', '.join(SOLVERS)}")
        check_alpha(alpha)
        if n_components is not None and n_components < 1:
            raise ValueError(f"n_components must be at least 1 or None, not {n_components}")
        if fit_intercept and solver == "hest-bench":
            raise ValueError("HEST-bench fits no intercept; use solver='exact' with fit_intercept=True")
        if not standardize and solver == "hest-bench":
            raise ValueError("HEST-bench standardizes; use solver='exact' with standardize=False")
        self.n_components, self.alpha, self.solver = n_components, alpha, solver
        self.standardize, self.fit_intercept = standardize, fit_intercept

    def fit(self, X: np.ndarray, Y: np.ndarray) -> PCARidge:
        """Fit on features (n, d) and targets (n, genes).

        The exact solver sets ``coef_`` (d, genes) and ``range_`` (2, genes), each gene's smallest and largest target.
        """
        X, Y = np.asarray(X), np.asarray(Y)
        if X.ndim != 2 or Y.ndim != 2 or len(X) != len(Y):
            raise ValueError(f"features (n, d) and targets (n, genes) must share rows, not {X.shape} and {Y.shape}")
        if self.solver == "exact":
            return self._fit_exact(gather(X, Y, np.zeros(len(X), dtype=np.int64), chunk=CHUNK).over([0]))
        if len(X) < 2:
            raise ValueError("at least two training rows are needed")
        for name, A in (("features", X), ("targets", Y)):
            if not np.isfinite(A).all():
                raise ValueError(f"{name} have NaN or infinite values")
        return self._fit_hest_bench(X, Y)

    def fit_sums(self, moments: Moments) -> PCARidge:
        """Fit on the sums of the training rows (`peka_lite.probe.moments`), with the result of `fit` on the rows."""
        if self.solver != "exact":
            raise ValueError("solver 'hest-bench' needs rows; fit_sums needs solver='exact'")
        return self._fit_exact(moments)

    def predict(self, X: np.ndarray) -> np.ndarray:
        """Predict (n, genes) float64 from features (n, d)."""
        if self.solver == "hest-bench":
            return self.ridge_.predict(self._reduce(X)).reshape(len(X), -1).astype(np.float64)
        weights, P = self.coef_ / self.scale_[:, None], np.empty((len(X), self.coef_.shape[1]))
        for start in range(0, len(X), CHUNK):
            P[start : start + CHUNK] = (X[start : start + CHUNK] - self.mean_) @ weights
        return P + self.intercept_

    def _alpha(self, width: int, genes: int) -> float:
        return 100 / (width * genes) if self.alpha == "hest" else float(self.alpha)

    def _fit_exact(self, moments: Moments) -> PCARidge:
        if moments.n < 2:
            raise ValueError("at least two training rows are needed")
        reduced = components(moments, self.n_components, standardize=self.standardize)
        d, width = reduced.vectors.shape
        if self.n_components is not None and width < self.n_components:
            warnings.warn(
                f"{moments.n} training rows of {d} features allow {width} of {self.n_components} components",
                stacklevel=3,
            )
        self.n_components_, self.mean_, self.scale_ = width, reduced.mean, reduced.scale
        # Features are centered, so ridge on the scores with or without intercept has these coefficients.
        self.coef_ = reduced.vectors @ reduced.weights(self._alpha(width, len(moments.mean_y)))
        self.range_ = np.stack([moments.low_y, moments.high_y])
        self.intercept_ = moments.mean_y if self.fit_intercept else np.zeros_like(moments.mean_y)
        return self

    def _fit_hest_bench(self, X: np.ndarray, Y: np.ndarray) -> PCARidge:
        from sklearn.decomposition import PCA
        from sklearn.linear_model import Ridge
        from sklearn.preprocessing import StandardScaler

        n, d = X.shape
        if self.n_components is not None and self.n_components > min(n, d):
            raise ValueError(
                f"HEST-bench cannot reduce {n} rows of {d} features to {self.n_components} components; "
                f"use n_components <= {min(n, d)}, or solver='exact', which caps it"
            )
        # Without PCA, HEST-bench neither scales nor centers the features.
        self.steps_ = []
        if self.n_components is not None:
            scaler = StandardScaler().fit(X)
            self.steps_ = [scaler, PCA(self.n_components, random_state=1).fit(scaler.transform(X))]
        Z = self._reduce(X)
        alpha = self._alpha(Z.shape[1], Y.shape[1])
        self.ridge_ = Ridge(alpha=alpha, solver="lsqr", fit_intercept=False, random_state=0, max_iter=1000).fit(Z, Y)
        return self

    def _reduce(self, X: np.ndarray) -> np.ndarray:
        for step in self.steps_:
            X = step.transform(X)
        # HEST-bench stores scores as float32, and scikit-learn's ridge converts them to float64.
        return X.astype(np.float32).astype(np.float64 if self.steps_ else np.float32)


def cross_validate(
    X: np.ndarray,
    Y: np.ndarray,
    folds: Sequence[tuple[np.ndarray, np.ndarray]],
    *,
    genes: Sequence[str] | None = None,
    n_components: int | None = 256,
    alpha: str | float = "hest",
    solver: str = "exact",
) -> pd.DataFrame:
    """Fit the probe on each fold's training rows and score its test rows.

    The exact solver reads the features once to fit all folds, and once to predict.

    Parameters
    ----------
    X
        (N, d) frozen features; may be a `numpy.memmap`.
    Y
        (N, genes) targets.
    folds
        Row indices, as `peka_lite.folds` returns.
    genes
        Names of the columns of `Y`; by default their numbers.

    Returns
    -------
    pandas.DataFrame
        One row per fold and gene: fold, gene, pcc (NaN for a constant gene or prediction), r2, rmse, spearman,
        n_train, n_test. The probe has no intercept, so the genes' means count as errors in r2 and rmse.

    Examples
    --------
    >>> import numpy as np
    >>> import peka_lite as pk
    >>> rng = np.random.default_rng(0)
    >>> X = rng.normal(size=(600, 4))  # features of 600 spots
    >>> Y = np.stack([X[:, 0] + rng.normal(size=600), rng.normal(size=600)], axis=1)  # the second gene is noise
    >>> first, second = np.arange(300), np.arange(300, 600)
    >>> folds = [(first, second), (second, first)]
    >>> pk.cross_validate(X, Y, folds, genes=["KRT8", "CD8A"], n_components=4).round(2)
       fold  gene   pcc    r2  rmse  spearman  n_train  n_test
    0     0  KRT8  0.71  0.50  1.01      0.68      300     300
    1     0  CD8A -0.03 -0.03  0.99     -0.05      300     300
    2     1  KRT8  0.70  0.49  0.98      0.69      300     300
    3     1  CD8A -0.10 -0.01  1.08     -0.10      300     300
    """
    Y = np.asarray(Y)
    genes = list(range(Y.shape[1])) if genes is None else list(genes)
    if len(genes) != Y.shape[1]:
        raise ValueError(f"{len(genes)} gene names for {Y.shape[1]} columns")
    if X.ndim != 2 or len(X) != len(Y):
        raise ValueError(f"features (n, d) and targets (n, genes) must share rows, not {X.shape} and {Y.shape}")
    folds = [tuple(np.arange(len(X))[rows] for rows in fold) for fold in folds]
    sums = _training_sums(X, Y, [train for train, _ in folds]) if solver == "exact" else None
    tables = []
    for fold, (train, test) in enumerate(folds):
        model = PCARidge(n_components, alpha, solver)
        model = model.fit_sums(sums(fold)) if sums else model.fit(X[train], Y[train])
        P = np.concatenate([model.predict(X[test[i : i + CHUNK]]) for i in range(0, len(test) or 1, CHUNK)])
        tables.append(fold_table(fold, genes, Y[test], P, n_train=len(train)))
    return pd.concat(tables, ignore_index=True)


def _training_sums(X: np.ndarray, Y: np.ndarray, trains: Sequence[np.ndarray]) -> Callable[[int], Moments]:
    """Return a function from a fold to the moments of its training rows, gathered in one pass or one per fold.

    Rows that are in training in the same folds form a cell. With too many cells for one pass to be faster, or sums
    larger than `MOST_BYTES`, each fold has a separate pass.
    """
    counts = np.stack([np.bincount(train, minlength=len(X)) for train in trains], axis=1)  # (N, folds)
    if counts.max() > 1:  # a bootstrap: rows drawn twice count twice
        return lambda fold: gather(X[trains[fold]], Y[trains[fold]], np.zeros(len(trains[fold]), dtype=np.int64)).over(
            [0]
        )
    patterns, cells = np.unique(np.packbits(counts > 0, axis=1), axis=0, return_inverse=True)
    bits = np.unpackbits(patterns, axis=1, count=len(trains)).astype(bool)  # (patterns, folds)
    if len(patterns) > 4 * len(trains) + 1 or len(patterns) * X.shape[1] ** 2 * 8 > MOST_BYTES:
        return lambda fold: gather(X, Y, counts[:, fold].astype(np.int64) - 1, chunk=CHUNK).over([0])
    sums = gather(X, Y, np.where(bits.any(1), np.arange(len(bits)), -1)[cells.ravel()], chunk=CHUNK)
    return lambda fold: sums.over(np.flatnonzero(bits[:, fold]))
