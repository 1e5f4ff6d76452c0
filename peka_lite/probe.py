"""The probe: PCA and ridge from frozen features to genes, scored by Pearson correlation."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence

import numpy as np
import pandas as pd
from scipy.linalg import eigh
from scipy.stats import t

SOLVERS = ("exact", "hest-bench")


class PCARidge:
    """Standardise, reduce by PCA, predict all genes at once by ridge.

    Parameters
    ----------
    n_components
        Width after PCA, 256 in the paper and in HEST-bench. ``"exact"`` caps it at what the data allow and warns;
        None leaves PCA out.
    alpha
        Ridge penalty on the squared norm, beside the sum of squared errors; ``"hest"`` is HEST-bench's
        ``100 / (columns after PCA * genes)``.
    solver
        ``"exact"``: float64, closed form, no randomness. ``"hest-bench"``: scikit-learn as HEST-bench calls it
        (seeded PCA, scores rounded to float32, iterative lsqr, no intercept), to compare with its published numbers.
    fit_intercept
        Add the genes' training means, so that predictions are in the genes' units. HEST-bench does not; the Pearson
        correlation is the same. Only with ``"exact"``.

    Examples
    --------
    >>> rng = np.random.default_rng(0)
    >>> X = rng.normal(size=(80, 6))
    >>> model = PCARidge(n_components=6, alpha=1e-6).fit(X, X[:, :2])
    >>> bool(np.corrcoef(model.predict(X)[:, 0], X[:, 0])[0, 1] > 0.999)
    True
    """

    def __init__(
        self,
        n_components: int | None = 256,
        alpha: str | float = "hest",
        solver: str = "exact",
        *,
        fit_intercept: bool = False,
    ):
        if solver not in SOLVERS:
            raise ValueError(f"unknown solver {solver!r}; known: {', '.join(SOLVERS)}")
        if alpha != "hest" and not (isinstance(alpha, (int, float)) and alpha >= 0):
            raise ValueError(f"alpha is 'hest' or a number of at least 0, not {alpha!r}")
        if n_components is not None and n_components < 1:
            raise ValueError(f"n_components must be at least 1 or None, not {n_components}")
        if fit_intercept and solver == "hest-bench":
            raise ValueError("HEST-bench fits no intercept; use solver='exact' with fit_intercept=True")
        self.n_components, self.alpha, self.solver, self.fit_intercept = n_components, alpha, solver, fit_intercept

    def fit(self, X: np.ndarray, Y: np.ndarray) -> PCARidge:
        """Fit on features (n, d) and targets (n, genes); sets ``coef_`` (d, genes) for the exact solver."""
        X, Y = np.asarray(X), np.asarray(Y)
        if X.ndim != 2 or Y.ndim != 2 or len(X) != len(Y):
            raise ValueError(f"features (n, d) and targets (n, genes) must share rows, not {X.shape} and {Y.shape}")
        if len(X) < 2:
            raise ValueError("at least two training rows are needed")
        for name, A in (("features", X), ("targets", Y)):
            if not np.isfinite(A).all():
                raise ValueError(f"{name} hold NaN or infinite values")
        return self._fit_exact(X, Y) if self.solver == "exact" else self._fit_hest_bench(X, Y)

    def predict(self, X: np.ndarray) -> np.ndarray:
        """Predict (n, genes) float64 from features (n, d)."""
        if self.solver == "hest-bench":
            return self.ridge_.predict(self._reduce(X)).reshape(len(X), -1).astype(np.float64)
        return (np.asarray(X, dtype=np.float64) - self.mean_) / self.scale_ @ self.coef_ + self.intercept_

    def _alpha(self, width: int, genes: int) -> float:
        return 100 / (width * genes) if self.alpha == "hest" else float(self.alpha)

    def _fit_exact(self, X: np.ndarray, Y: np.ndarray) -> PCARidge:
        X, Y = X.astype(np.float64), Y.astype(np.float64)
        n, d = X.shape
        self.mean_, self.scale_ = X.mean(0), X.std(0)
        self.scale_[self.scale_ <= 1e-12 * np.abs(self.mean_) + 1e-300] = 1.0  # a constant feature carries nothing
        X = (X - self.mean_) / self.scale_
        y_mean = Y.mean(0)
        gram, cross = X.T @ X, X.T @ (Y - y_mean)  # (d, d), (d, genes)
        width = d if self.n_components is None else min(self.n_components, n - 1, d)
        if self.n_components is not None and width < self.n_components:
            warnings.warn(
                f"{n} training rows of {d} features allow {width} of {self.n_components} components", stacklevel=3
            )
        self.n_components_ = width
        values, vectors = eigh(gram, subset_by_index=[d - width, d - 1])
        # X is centred, so ridge on the scores with or without intercept has these coefficients.
        shrink = np.clip(values, 0, None) + self._alpha(width, Y.shape[1])
        shrink[shrink <= 0] = np.inf  # alpha 0: directions without variance are left out
        self.coef_ = vectors @ ((vectors.T @ cross) / shrink[:, None])
        self.intercept_ = y_mean if self.fit_intercept else np.zeros_like(y_mean)
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
        # Without a reduction HEST-bench neither scales nor centres: the features go in as they are.
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
        # HEST-bench keeps scores as a float32 tensor, which scikit-learn's ridge then reads as float64.
        return X.astype(np.float32).astype(np.float64 if self.steps_ else np.float32)


def pearson(Y: np.ndarray, P: np.ndarray) -> np.ndarray:
    """Pearson correlation column by column, (genes,) float64; NaN where either side is constant.

    Examples
    --------
    >>> pearson(np.array([[0.0, 1], [1, 1], [2, 1]]), np.array([[1.0, 3], [2, 4], [4, 5]])).round(3).tolist()
    [0.982, nan]
    """
    Y, P = np.asarray(Y, dtype=np.float64), np.asarray(P, dtype=np.float64)
    if Y.shape != P.shape:
        raise ValueError(f"measured {Y.shape} and predicted {P.shape} differ in shape")
    y, p = Y - Y.mean(0), P - P.mean(0)
    norm_y, norm_p = np.linalg.norm(y, axis=0), np.linalg.norm(p, axis=0)
    # Rounding leaves a constant column with a norm of about 1e-16 of its size, not with zero.
    constant = (norm_y <= 1e-10 * np.linalg.norm(Y, axis=0)) | (norm_p <= 1e-10 * np.linalg.norm(P, axis=0))
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(constant, np.nan, (y * p).sum(0) / (norm_y * norm_p))


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

    Parameters
    ----------
    X
        (N, d) frozen features.
    Y
        (N, genes) targets.
    folds
        Row indices, as `peka_lite.folds` returns.
    genes
        Names for the columns of `Y`; numbered without.

    Returns
    -------
    pandas.DataFrame
        One row per fold and gene: fold, gene, pcc (NaN for a constant gene or prediction), n_train, n_test.
    """
    Y = np.asarray(Y)
    genes = list(range(Y.shape[1])) if genes is None else list(genes)
    if len(genes) != Y.shape[1]:
        raise ValueError(f"{len(genes)} gene names for {Y.shape[1]} columns")
    tables = []
    for fold, (train, test) in enumerate(folds):
        model = PCARidge(n_components, alpha, solver).fit(X[train], Y[train])
        tables.append(fold_table(fold, genes, Y[test], model.predict(X[test]), n_train=len(train)))
    return pd.concat(tables, ignore_index=True)


def fold_table(fold: int, genes: Sequence[str], Y: np.ndarray, P: np.ndarray, *, n_train: int) -> pd.DataFrame:
    """Score one fold: the rows of the result table for measured `Y` and predicted `P`, both (n_test, genes)."""
    return pd.DataFrame({"fold": fold, "gene": list(genes), "pcc": pearson(Y, P), "n_train": n_train, "n_test": len(Y)})


def summarize(table: pd.DataFrame, *, n_boot: int = 2000, seed: int = 0) -> dict:
    """Reduce a result table to its mean PCC with a 95% interval, leaving NaN out by name.

    The mean is the mean over folds of each fold's mean over genes, as HEST-bench reports. The interval's standard error
    comes from resampling folds (patients or slides) and genes together: spots of one slide are not independent, so
    they are not resampled. It is scaled for the number of folds and multiplied by Student's t with folds - 1 degrees
    of freedom, since the percentiles of a bootstrap over five patients would be too narrow.

    Returns
    -------
    dict
        mean_pcc, ci_low, ci_high (NaN with one fold), mean_pcc_per_fold (list), n_nan, nan_genes (names).
    """
    wide = table.pivot_table(index="fold", columns="gene", values="pcc", dropna=False, aggfunc="first", sort=True)
    lost = table[table["pcc"].isna()]
    per_fold = table.groupby("fold")["pcc"].mean()
    if per_fold.isna().all():
        raise ValueError("every PCC is NaN: genes or predictions are constant in every fold")
    values = wide.to_numpy(dtype=float)  # (folds, genes), NaN where a fold did not predict a gene
    rng = np.random.default_rng(seed)
    means = np.empty(n_boot)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # a resampled fold may hold no gene
        for b in range(n_boot):
            f = rng.integers(0, values.shape[0], values.shape[0])
            g = rng.integers(0, values.shape[1], values.shape[1])
            means[b] = np.nanmean(np.nanmean(values[np.ix_(f, g)], axis=1))
    n_folds = int(per_fold.notna().sum())
    error = np.nanstd(means) * math.sqrt(n_folds / (n_folds - 1)) if n_folds > 1 else math.nan
    reach = error * t.ppf(0.975, n_folds - 1) if n_folds > 1 else math.nan
    mean = float(per_fold.mean())
    return {
        "mean_pcc": mean,
        "ci_low": mean - float(reach),
        "ci_high": mean + float(reach),
        "mean_pcc_per_fold": [float(v) for v in per_fold],
        "n_nan": len(lost),
        "nan_genes": sorted(set(lost["gene"].astype(str))),
    }
