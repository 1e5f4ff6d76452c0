"""Estimate the PCC that a perfect model could reach given counting noise, by count splitting.

Counts of one spot differ between sequencing runs, and no model can predict that part. Its size follows from the
correlation of two halves of the counts that are independent given the rates.
"""

from __future__ import annotations

from collections.abc import Sequence

import anndata as ad
import numpy as np
import pandas as pd
from scipy import sparse

from peka_lite.data.expression import normalize


def expression_ceiling(
    adata: ad.AnnData, genes: Sequence[str], *, method: str = "log1p-cp10k"
) -> tuple[pd.Series, str]:
    """Return the ceiling of each gene and its source.

    Parameters
    ----------
    adata
        Raw counts (N, G).
    genes
        Names among ``adata.var_names``.
    method
        Normalization of the counts, as in `peka_lite.data.normalize`.

    Returns
    -------
    pandas.Series
        As `estimate_ceiling`; NaN for a gene whose rate or count does not vary.
    str
        ``"known"`` if ``layers["rate"]`` has the true rates, as in the mini cohort (`noise_ceiling`), else
        ``"count splitting"`` (`estimate_ceiling`).

    Examples
    --------
    >>> import peka_lite as pk
    >>> adata = pk.open_cohort("mini", slides=["MINI1"]).adata
    >>> ceiling, source = pk.evaluation.expression_ceiling(adata, ["KRT8", "CD8A"])
    >>> ceiling.round(2).to_dict(), source
    ({'KRT8': 0.86, 'CD8A': 0.78}, 'known')
    >>> del adata.layers["rate"]  # real data have none
    >>> pk.evaluation.expression_ceiling(adata, ["KRT8", "CD8A"])[1]
    'count splitting'
    """
    if "rate" not in adata.layers:
        return estimate_ceiling(adata, genes, method=method), "count splitting"
    return noise_ceiling(adata, method=method).iloc[_columns(adata, genes)].rename("ceiling"), "known"


def estimate_ceiling(
    adata: ad.AnnData,
    genes: Sequence[str] | None = None,
    *,
    method: str = "log1p-cp10k",
    dispersion=None,
    n_splits: int = 10,
    seed: int = 0,
) -> pd.Series:
    """Estimate the Pearson correlation between the true rates and the measured target, for each gene.

    Every count is split at random into two halves that are independent given the rates (Neufeld et al. 2024,
    doi:10.1093/biostatistics/kxac047). Each half is doubled and normalized, the two are correlated over spots, and the
    Spearman-Brown formula extrapolates that reliability r to full depth: ceiling = sqrt(2 r / (1 + r)).

    For overdispersed counts, as real counts are, it is an upper bound: all variation that the two halves of a spot
    share, of its rate or its total, counts as signal. On the default mini cohort (variance = mean + 0.08 mean^2), with
    log1p-cp10k, it is 0.08 too high on average for genes with a pattern and 0.21 for genes without; given
    `dispersion`, 0.04 and 0.10. On simulated Poisson counts of 1,000 to 20,000 per spot the mean over genes is within
    0.02 with 1,000 spots (0.025 with 300). With 1,000 spots the error of a single gene is 0.03 to 0.06 for ceilings
    above 0.4, about 0.1 below that, and more with fewer spots: report means over genes.

    Parameters
    ----------
    adata
        Raw counts (N, G) of all genes, which the totals need.
    genes
        Names among ``adata.var_names``; None means all.
    method
        Normalization of the counts, as in `peka_lite.data.normalize`.
    dispersion
        None for Poisson counts. For negative binomial counts (G,) values a with variance = mean + a mean^2, in the
        order of ``adata.var_names`` (a Series is reindexed); counts are then split by a beta-binomial rule (Neufeld et
        al. 2023, arXiv:2307.12985). It cannot be estimated here without the true rates.
    n_splits
        Number of random splits to average.
    seed
        Seed of the splits.

    Returns
    -------
    pandas.Series
        float64, indexed by gene, 0 to 1; 0 where the halves do not correlate; NaN where the counts are constant.

    Raises
    ------
    KeyError
        For an unknown gene.
    ValueError
        For counts that are not whole numbers of 0 or more, a gene given twice, an unknown method, a dispersion of
        invalid shape or below 0, or fewer than one split.

    Examples
    --------
    Deeper sequencing raises the ceiling:

    >>> import anndata as ad
    >>> import numpy as np
    >>> import pandas as pd
    >>> import peka_lite as pk
    >>> rng = np.random.default_rng(0)
    >>> rate = rng.uniform(0.2, 1.8, size=(500, 1)) * [2, 20]  # 500 spots, two genes of one pattern
    >>> counts = ad.AnnData(rng.poisson(rate).astype(np.float32), var=pd.DataFrame(index=["shallow", "deep"]))
    >>> pk.evaluation.estimate_ceiling(counts, method="log1p").round(1).to_dict()
    {'shallow': 0.5, 'deep': 0.9}
    """
    genes = adata.var_names if genes is None else genes
    columns = _columns(adata, genes)
    X = _whole_counts(adata)
    if n_splits < 1:
        raise ValueError(f"n_splits must be 1 or more, got {n_splits}")
    selected = X[:, columns]
    varies = (selected.max(0) - selected.min(0)).toarray().ravel() > 0
    if dispersion is None:
        # A sum of Poisson counts is Poisson: the sum of the other genes suffices for the totals.
        others = np.asarray(X.sum(1)).ravel() - np.asarray(selected.sum(1)).ravel()
        X, columns, scatter = sparse.csr_matrix(sparse.hstack([selected, others[:, None]])), slice(len(columns)), None
    else:
        scatter = _dispersion(adata, dispersion)[X.indices]  # one for each stored count

    rng = np.random.default_rng(seed)
    covariance = variance = 0.0
    for _ in range(n_splits):
        # Doubling restores the mean of the whole, so that the logarithm has the same effect.
        a, b = (
            normalize(ad.AnnData(2 * half), method=method)[:, columns].astype(np.float64)
            for half in _halves(X, scatter, rng)
        )
        mean_a, mean_b = (np.asarray(half.mean(0)).ravel() for half in (a, b))
        covariance = covariance + np.asarray(a.multiply(b).mean(0)).ravel() - mean_a * mean_b
        squares = (np.asarray(half.multiply(half).mean(0)).ravel() for half in (a, b))
        variance = variance + (sum(squares) - mean_a**2 - mean_b**2) / 2
    # A ratio of sums, not a mean of ratios: in one split a rare gene may have no variance.
    reliability = np.clip(np.divide(covariance, variance, out=np.zeros(len(varies)), where=varies), 0, 1)
    ceiling = np.where(varies, np.sqrt(2 * reliability / (1 + reliability)), np.nan)
    return pd.Series(ceiling, index=pd.Index(genes), name="ceiling")


def _halves(X: sparse.csr_matrix, dispersion: np.ndarray | None, rng: np.random.Generator) -> list[sparse.csr_matrix]:
    """Split every stored count into two parts that are independent given the rates."""
    share = 0.5
    if dispersion is not None:
        # Halves of a negative binomial count are independent if each count's share is drawn from a beta.
        shape = 0.5 / np.maximum(dispersion, 1e-9)
        share = rng.beta(shape, shape)
    first = rng.binomial(X.data.astype(np.int64), share).astype(np.float64)
    return [sparse.csr_matrix((part, X.indices, X.indptr), shape=X.shape) for part in (first, X.data - first)]


def _whole_counts(adata: ad.AnnData) -> sparse.csr_matrix:
    X = sparse.csr_matrix(adata.X, dtype=np.float64)
    invalid = ~(np.isfinite(X.data) & (X.data >= 0) & (X.data == np.floor(X.data)))
    if invalid.any():
        raise ValueError(
            f"count splitting needs raw counts, but X has {X.data[invalid][0]:g} for gene "
            f"{adata.var_names[X.indices[invalid][0]]!r}; give whole numbers of 0 or more, not normalized expression"
        )
    return X


def _columns(adata: ad.AnnData, genes: Sequence[str]) -> np.ndarray:
    if missing := [g for g in genes if g not in adata.var_names]:
        raise KeyError(f"genes not in the data: {', '.join(missing[:10])}")
    names = pd.Index(genes)
    if not names.is_unique:
        raise ValueError(f"gene {names[names.duplicated()][0]!r} is given more than once")
    return adata.var_names.get_indexer(names)


def _dispersion(adata: ad.AnnData, dispersion) -> np.ndarray:
    if isinstance(dispersion, pd.Series):
        dispersion = dispersion.reindex(adata.var_names)
    dispersion = np.asarray(dispersion, dtype=np.float64)
    if dispersion.shape != (adata.n_vars,) or not (np.isfinite(dispersion) & (dispersion >= 0)).all():
        raise ValueError(f"dispersion must be one finite number of 0 or more for each of the {adata.n_vars} genes")
    return dispersion


def noise_ceiling(adata, *, method="log1p-cp10k"):
    """Return the Pearson correlation of the true rates with the counts, for each gene.

    It is computed over spots, of log1p of the true rates and log1p of the counts: the expected score of a perfect
    prediction. With few spots it is itself an estimate.

    Parameters
    ----------
    adata : anndata.AnnData
        A slide of the mini cohort, or several concatenated: raw counts in ``X`` and ``layers["rate"]``.
    method : str
        ``"log1p-cp10k"``: both are first scaled to 10,000 per spot; ``"log1p"``: neither is scaled.

    Returns
    -------
    pandas.Series
        float64 (n_genes,), indexed by gene; NaN where the true share (for ``"log1p"`` the rate) is constant, as for
        a noise gene within one patient.

    Raises
    ------
    ValueError
        For an unknown method.

    Examples
    --------
    Even the true rates do not reach 1:

    >>> import peka_lite as pk
    >>> adata = pk.open_cohort("mini", slides=["MINI1", "MINI2"]).adata
    >>> ceiling = pk.evaluation.noise_ceiling(adata)
    >>> ceiling.groupby(adata.var["kind"], observed=True).mean().round(1).to_dict()
    {'invisible': 0.6, 'noise': 0.1, 'visible': 0.6}
    """
    if method not in ("log1p-cp10k", "log1p"):
        raise ValueError(f"unknown normalization {method!r}; known: log1p-cp10k, log1p")
    counts = adata.X.toarray() if sparse.issparse(adata.X) else np.asarray(adata.X)
    rate = np.asarray(adata.layers["rate"])
    if method == "log1p-cp10k":
        rate, counts = (1e4 * x / x.sum(1, keepdims=True, dtype=np.float64) for x in (rate, counts))
    true, observed = (np.log1p(x, dtype=np.float64) for x in (rate, counts))
    true, observed = true - true.mean(0), observed - observed.mean(0)  # (n_spots, n_genes)
    spread = np.sqrt((true**2).mean(0) * (observed**2).mean(0))
    # Variation by rounding does not count.
    spread[true.std(0) < 1e-5] = np.nan
    with np.errstate(invalid="ignore", divide="ignore"):
        return pd.Series((true * observed).mean(0) / spread, index=adata.var_names, name="noise_ceiling")
