"""Filter spots, normalize counts, and select and align genes."""

from __future__ import annotations

import hashlib
import math
import warnings
from collections.abc import Sequence

import anndata as ad
import numpy as np
import pandas as pd
from scipy import sparse

from peka_lite._core.hashing import row_ids
from peka_lite.data._choices import NORMALIZATIONS


class GeneList(list):
    """List of gene names with ``fitted_on_``, the `row_ids` of the spots that they were selected on."""

    fitted_on_: np.ndarray


def qc(cohort, *, min_genes: int = 200, max_mito: float | None = None):
    """Drop spots with too few expressed genes or too large a mitochondrial fraction.

    Parameters
    ----------
    cohort
        `peka_lite.data.Cohort`. All genes of a slide count, shared or not.
    min_genes
        Smallest number of genes with a count above zero; 200 as in scFoundation's preprocessing
        (Hao et al. 2024, doi:10.1038/s41592-024-02305-7).
    max_mito
        Largest fraction (0 to 1) of a spot's counts in genes named ``MT-*``; None applies no limit.

    Returns
    -------
    Cohort
        A new cohort; each slide's `dropped` counts the removed spots by reason.

    Examples
    --------
    >>> import peka_lite as pk
    >>> cohort = pk.open_cohort("mini", slides=["MINI1"])
    >>> pk.data.qc(cohort, min_genes=600).slides[0].dropped
    {'spots without a tile': 2, 'spots with fewer than 600 genes': 4}
    """
    if max_mito is not None and not 0 < max_mito <= 1:
        raise ValueError(f"max_mito is a fraction between 0 and 1, not {max_mito}")
    expressed = np.concatenate([np.diff(s.adata.X.indptr) - _count_explicit_zeros(s.adata.X) for s in cohort.slides])
    cohort = cohort.select(expressed >= min_genes, reason=f"spots with fewer than {min_genes} genes")
    if max_mito is not None:
        mito = np.concatenate([_compute_mito_fraction(s.adata) for s in cohort.slides])
        cohort = cohort.select(mito <= max_mito, reason=f"spots above {max_mito:g} mitochondrial")
    return cohort


def normalize(adata: ad.AnnData, *, method: str = "log1p-cp10k") -> sparse.csr_matrix:
    """Normalize raw counts.

    Parameters
    ----------
    adata
        Raw counts (N, G); not modified.
    method
        ``"log1p-cp10k"``: each spot scaled to 10,000 counts over the given genes, then log1p (as scFoundation);
        ``"log1p"``: log1p of the raw counts (as HEST-bench; sequencing depth is not removed).

    Returns
    -------
    scipy.sparse.csr_matrix
        (N, G) float32; zero for a spot without counts.

    Examples
    --------
    >>> import anndata as ad
    >>> import numpy as np
    >>> import peka_lite as pk
    >>> counts = ad.AnnData(np.array([[1.0, 3.0], [10.0, 30.0], [0.0, 0.0]]))
    >>> print(pk.data.normalize(counts).toarray().round(2))  # ten times the counts, the same values
    [[7.82 8.92]
     [7.82 8.92]
     [0.   0.  ]]
    >>> print(pk.data.normalize(counts, method="log1p").toarray().round(2))
    [[0.69 1.39]
     [2.4  3.43]
     [0.   0.  ]]
    """
    if method not in NORMALIZATIONS:
        raise ValueError(f"unknown normalization {method!r}; known: {', '.join(NORMALIZATIONS)}")
    # Copy: a new dtype alone would share the indices, which log1p sorts in place.
    X = sparse.csr_matrix(adata.X, dtype=np.float64, copy=True)
    if method == "log1p-cp10k":
        total = np.asarray(X.sum(1)).ravel()  # (N,)
        X = sparse.diags(np.divide(1e4, total, out=np.zeros_like(total), where=total > 0)) @ X
    return sparse.csr_matrix(X.log1p(), dtype=np.float32)


def top_hvg(
    adata: ad.AnnData, *, n: int = 50, rows=None, method: str = "log1p-cp10k", min_spots: float = 0.1
) -> list[str]:
    """Select the `n` most variable genes using the given rows only, so that held-out spots cause no leakage.

    Ranks by scanpy's dispersion (Seurat flavor) the genes that are expressed in at least the fraction `min_spots` of
    the rows (HEST-bench's filter).

    Parameters
    ----------
    adata
        Raw counts (N, G).
    n
        Number of genes.
    rows
        Training rows (indices or mask); None means all.
    method
        Normalization before ranking, as in `normalize`.
    min_spots
        Smallest fraction of rows in which a gene is expressed.

    Returns
    -------
    list of str
        Gene names, most variable first; ``fitted_on_`` holds the `row_ids` of the rows used.

    Raises
    ------
    ValueError
        If fewer than `n` genes pass the filter.

    Examples
    --------
    Held-out spots are not used, and the list records the rows that were:

    >>> import peka_lite as pk
    >>> adata = pk.open_cohort("mini", slides=["MINI1"]).adata
    >>> genes = pk.data.top_hvg(adata, n=3, rows=range(100))
    >>> genes, len(genes.fitted_on_)
    (['BANK1', 'DDIT4', 'HSPB8'], 100)
    """
    import scanpy as sc

    train = adata if rows is None else adata[rows]
    X = sparse.csr_matrix(train.X)
    seen = np.asarray((X > 0).sum(0)).ravel() >= max(1, math.ceil(min_spots * X.shape[0]))
    if seen.sum() < n:
        raise ValueError(
            f"{seen.sum()} genes are expressed in at least {min_spots:.0%} of {X.shape[0]} spots, fewer than n={n}: "
            "lower n or min_spots"
        )
    # Normalize over all genes first: the filter must not change a spot's total.
    work = ad.AnnData(normalize(train, method=method)[:, seen], var=pd.DataFrame(index=adata.var_names[seen]))
    work.uns["log1p"] = {"base": None}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        table = sc.pp.highly_variable_genes(work, n_top_genes=n, flavor="seurat", inplace=False)
    table.index = work.var_names
    # Constant genes have no dispersion (NaN) and are ranked last.
    ranked = table.sort_values("dispersions_norm", ascending=False, kind="stable")
    genes = GeneList(ranked.index[:n])
    genes.fitted_on_ = row_ids(X)
    return genes


def expression_targets(adata: ad.AnnData, genes: Sequence[str], *, method: str = "log1p-cp10k") -> np.ndarray:
    """Return the probe's targets: normalized expression of `genes`, (N, len(genes)) float32.

    Totals are computed over all genes of `adata`.

    Examples
    --------
    >>> import peka_lite as pk
    >>> adata = pk.open_cohort("mini", slides=["MINI1"]).adata
    >>> pk.data.expression_targets(adata, ["KRT8", "CD8A"]).shape
    (190, 2)
    >>> pk.data.expression_targets(adata, ["KRT8", "CD8"])
    Traceback (most recent call last):
        ...
    KeyError: 'genes not in the data: CD8'
    """
    if missing := [g for g in genes if g not in adata.var_names]:
        raise KeyError(f"genes not in the data: {', '.join(missing[:10])}")
    return normalize(adata, method=method)[:, adata.var_names.get_indexer(genes)].toarray()


def load_in_memory(adata: ad.AnnData) -> ad.AnnData:
    """Return `adata` with X in memory: read it if it is backed, raise ValueError if X is missing."""
    if adata.X is None:
        raise ValueError("X is missing; set it to expression values, for example `adata.X = adata.layers[...]`")
    return adata.to_memory() if adata.isbacked else adata


def align_genes(
    adata: ad.AnnData, genes: Sequence[str], *, names: Sequence[str] | None = None
) -> tuple[sparse.csr_matrix, float]:
    """Reorder the columns of counts to `genes`; genes that were not measured become zeros.

    Parameters
    ----------
    adata
        Counts (N, G).
    genes
        Genes of the result, in order.
    names
        Gene of each column; None uses var_names. Columns of the same gene are summed.

    Returns
    -------
    scipy.sparse.csr_matrix
        (N, len(genes)) float32.
    float
        Coverage: the fraction of the data's genes that are in `genes`, among those with a count in any row
        (among all if there is no count).

    Examples
    --------
    >>> import anndata as ad
    >>> import numpy as np
    >>> import pandas as pd
    >>> import peka_lite as pk
    >>> genes = pd.DataFrame(index=["TP53", "ACTB", "NEW1"])
    >>> counts = ad.AnnData(np.array([[3.0, 1.0, 4.0], [0.0, 2.0, 5.0]]), var=genes)
    >>> X, coverage = pk.data.align_genes(counts, ["ACTB", "GAPDH", "TP53"])  # GAPDH was not measured
    >>> X.toarray().tolist(), round(coverage, 2)
    ([[1.0, 0.0, 3.0], [2.0, 0.0, 0.0]], 0.67)
    """
    genes = pd.Index(genes)
    if not genes.is_unique:
        raise ValueError(f"gene {genes[genes.duplicated()][0]!r} is duplicated in genes")
    X = sparse.csr_matrix(load_in_memory(adata).X, dtype=np.float64)
    to = genes.get_indexer(adata.var_names if names is None else pd.Index(names))  # (G,), -1 if not in genes
    known = np.flatnonzero(to >= 0)
    pick = sparse.csr_matrix((np.ones(len(known)), (known, to[known])), shape=(len(to), len(genes)))
    expressed = np.asarray((X != 0).sum(0)).ravel() > 0
    counted = to[expressed] if expressed.any() else to
    coverage = float((counted >= 0).mean()) if len(counted) else 0.0
    return sparse.csr_matrix(X @ pick, dtype=np.float32), coverage


def hash_counts(adata: ad.AnnData) -> str:
    """Return a hash of counts, barcodes and gene names, as 16 hex digits."""
    X = sparse.csr_matrix(load_in_memory(adata).X)
    digest = hashlib.sha256("\n".join([*map(str, adata.obs_names), *map(str, adata.var_names)]).encode())
    for part in (X.indptr.astype(np.int64), X.indices.astype(np.int64), X.data.astype(np.float32)):
        digest.update(part)
    return digest.hexdigest()[:16]


def _count_explicit_zeros(X: sparse.csr_matrix) -> np.ndarray:
    zeros = sparse.csr_matrix((X.data == 0, X.indices, X.indptr), shape=X.shape)
    return np.asarray(zeros.sum(1)).ravel()


def _compute_mito_fraction(adata: ad.AnnData) -> np.ndarray:
    mito = adata.var_names.str.upper().str.startswith("MT-")
    if not mito.any():
        raise ValueError("max_mito was given, but no gene is named MT-*; omit max_mito for such data")
    total = np.asarray(adata.X.sum(1)).ravel()
    return np.asarray(adata.X[:, mito].sum(1)).ravel() / np.maximum(total, 1)
