"""The PCA teacher: principal components of normalized counts."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import anndata as ad
import numpy as np
import pandas as pd
from sklearn.decomposition import PCA

from peka_lite._core.hashing import row_ids
from peka_lite.data.expression import normalize, top_hvg


class PCATeacher:
    """PCA of log-normalized counts over highly variable genes, fitted on training spots.

    Each slide is normalized over all its genes. The scores are divided by a single number, their standard deviation
    over the training spots. Distances keep their proportions, and a softmax temperature has the same meaning for every
    teacher.

    Parameters
    ----------
    n_components
        Dimensions D_t of the embedding. Capped at what the training data allow, with a warning.
    n_genes
        Number of highly variable genes. Capped at the number of genes.
    seed
        Seed of the randomized solver, used on large cohorts. Sign and order of components are fixed by the data.

    Attributes
    ----------
    fitted_on_
        `row_ids` of the counts given to `fit`.

    Examples
    --------
    >>> import peka_lite as pk
    >>> cohort = pk.open_cohort("mini", slides=["MINI1"])
    >>> teacher = pk.load_teacher("pca", n_components=8, n_genes=100).fit(cohort.by_slide(range(100)))
    >>> E = teacher.embed(cohort.adata)
    >>> E.shape, round(float(E[:100].std()), 2)
    ((190, 8), 1.0)
    """

    def __init__(self, *, n_components: int = 50, n_genes: int = 2000, seed: int = 0):
        if n_components < 2 or n_genes < n_components:
            raise ValueError(f"need n_genes >= n_components >= 2, not {n_genes} and {n_components}")
        self.n_components, self.n_genes, self.seed = n_components, n_genes, seed

    def __repr__(self) -> str:
        return f"PCATeacher(n_components={self.n_components}, n_genes={self.n_genes}, seed={self.seed})"

    def fit(self, adata: ad.AnnData | Sequence[ad.AnnData]) -> PCATeacher:
        """Fit on raw counts of training spots: one AnnData, or one per slide (only shared genes are used)."""
        slides = [adata] if isinstance(adata, ad.AnnData) else list(adata)
        shared = set.intersection(*(set(a.var_names) for a in slides))
        genes = slides[0].var_names[slides[0].var_names.isin(list(shared))]
        normal = np.concatenate([self._normalize(a, genes) for a in slides])  # (n_train, n_shared)
        counts = ad.concat([a[:, genes] for a in slides], index_unique="/")
        n_expressed = int(np.sum((counts.X > 0).sum(0) > 0))
        hvg = top_hvg(counts, n=min(self.n_genes, n_expressed), min_spots=0.0)
        self.genes_ = pd.Index(hvg)
        X = normal[:, genes.get_indexer(self.genes_)]
        width = min(self.n_components, X.shape[0] - 1, X.shape[1])
        if width < self.n_components:
            warnings.warn(f"{X.shape[0]} spots x {X.shape[1]} genes allow {width} components", stacklevel=2)
        self.pca_ = PCA(width, random_state=self.seed).fit(X)
        self.scale_ = float(self.pca_.transform(X).std())
        self.fitted_on_ = np.concatenate([row_ids(a.X) for a in slides])
        return self

    def embed(self, adata: ad.AnnData, *, batch_size: int | None = None, device: str | None = None) -> np.ndarray:
        """Embed raw counts (N, G) as (N, D_t) float32. Missing genes are set to their training mean.

        `batch_size` limits the spots that are dense at once (None: 4096). `device` is ignored.
        """
        if not hasattr(self, "pca_"):
            raise RuntimeError("this PCATeacher is not fitted; call fit(training AnnData) first")
        columns = adata.var_names.get_indexer(self.genes_)
        if (share := float(np.mean(columns >= 0))) < 0.5:
            genes = f"only {share:.0%} of the teacher's {len(columns)} genes"
            raise ValueError(f"{genes} are in the data; at least half must be")
        step, parts = batch_size or 4096, []
        for start in range(0, adata.n_obs, step):
            part = adata[start : start + step]
            X = np.tile(self.pca_.mean_, (part.n_obs, 1))  # (n, n_genes)
            X[:, columns >= 0] = self._normalize(part, self.genes_[columns >= 0])
            parts.append(self.pca_.transform(X) / self.scale_)
        return np.concatenate(parts).astype(np.float32)

    @staticmethod
    def _normalize(adata: ad.AnnData, genes: pd.Index) -> np.ndarray:
        return normalize(adata)[:, adata.var_names.get_indexer(genes)].toarray()
