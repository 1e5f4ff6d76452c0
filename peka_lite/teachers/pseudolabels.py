"""Cluster teacher embeddings into pseudo-labels and assign new spots to the clusters."""

from __future__ import annotations

import warnings

import anndata as ad
import numpy as np
from sklearn.cluster import KMeans
from sklearn.neighbors import NearestNeighbors

from peka_lite._core.hashing import row_ids
from peka_lite.teachers._choices import LABEL_METHODS as METHODS


class PseudoLabeler:
    """Cluster teacher embeddings into pseudo-labels.

    ``"knn-leiden"`` clusters the k-nearest-neighbor graph of the embedding with Leiden, as the paper describes
    (arXiv:2504.07061). ``"kmeans"`` with 100 clusters is the method of the authors' code.

    Parameters
    ----------
    method
        ``"knn-leiden"`` or ``"kmeans"``.
    seed
        Random seed of Leiden and k-means.
    **options
        ``n_neighbors`` (15, both methods; also the number of neighbors that vote in `predict`), ``resolution`` (1.0,
        knn-leiden), ``n_clusters`` (100, kmeans). Options of the other method raise ValueError.

    Attributes
    ----------
    labels_
        (N,) int64, cluster of each row given to `fit`, numbered from 0 by decreasing size.
    n_labels_
        Number of clusters.
    fitted_on_
        `row_ids` of the rows given to `fit`.

    Examples
    --------
    >>> import numpy as np
    >>> import peka_lite as pk
    >>> E = np.repeat(np.eye(3, dtype=np.float32) * 9, (20, 40, 30), axis=0)  # three kinds of spots
    >>> E += np.random.default_rng(0).normal(0, 0.1, E.shape)
    >>> labeler = pk.PseudoLabeler("kmeans", n_clusters=3).fit(E)
    >>> np.bincount(labeler.labels_).tolist()
    [40, 30, 20]
    >>> labeler.predict(9 * np.eye(3)).tolist()
    [2, 0, 1]
    """

    def __init__(self, method: str = "knn-leiden", *, seed: int = 0, **options):
        if method not in METHODS:
            raise ValueError(f"unknown method {method!r}; known: {', '.join(METHODS)}")
        if unknown := options.keys() - METHODS[method].keys():
            has = ", ".join(METHODS[method])
            raise ValueError(f"{method!r} has no option {', '.join(sorted(unknown))}; it has {has}")
        self.method, self.seed, self.options = method, seed, METHODS[method] | options
        if invalid := [f"{k}={v}" for k, v in self.options.items() if v is None or v <= 0]:
            raise ValueError(f"must be above 0: {', '.join(invalid)}")

    def __repr__(self) -> str:
        shown = ", ".join(f"{k}={v}" for k, v in self.options.items())
        return f"PseudoLabeler({self.method!r}, {shown}, seed={self.seed})"

    def fit(self, E: np.ndarray) -> PseudoLabeler:
        """Cluster the rows of `E` (N, D_t) and set ``labels_`` and ``n_labels_``."""
        E = _check(E)
        k = self.options["n_neighbors"]
        if len(E) <= k:
            raise ValueError(f"{len(E)} spots cannot have {k} neighbors each; lower n_neighbors")
        labels = self._leiden(E) if self.method == "knn-leiden" else self._kmeans(E)
        # Number clusters by size, so that label 0 is the largest.
        order = np.argsort(-np.bincount(labels), kind="stable")
        self.labels_ = np.argsort(order)[labels].astype(np.int64)
        self.n_labels_ = int(self.labels_.max()) + 1
        self.fitted_on_ = row_ids(E)
        self._neighbors = NearestNeighbors(n_neighbors=k).fit(E)
        return self

    def predict(self, E: np.ndarray) -> np.ndarray:
        """Return for new rows (M, D_t) the majority label of their nearest fitted neighbors, (M,) int64.

        Ties go to the label with the nearer neighbors: the larger sum of 1 / (1 + distance).
        """
        if not hasattr(self, "labels_"):
            raise RuntimeError("this PseudoLabeler is not fitted; call fit(E) first")
        distance, index = self._neighbors.kneighbors(_check(E))  # (M, k)
        rows, votes = np.arange(len(index)), np.zeros((len(index), self.n_labels_))
        nearness = np.zeros_like(votes)
        for labels, away in zip(self.labels_[index].T, distance.T, strict=True):
            votes[rows, labels] += 1
            nearness[rows, labels] += 1 / (1 + away)
        # Divided by k + 1, nearness sums to less than one vote, so it only breaks ties.
        return np.argmax(votes + nearness / (index.shape[1] + 1), axis=1).astype(np.int64)

    def _leiden(self, E: np.ndarray) -> np.ndarray:
        import scanpy as sc

        graph = ad.AnnData(E)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            # Exact neighbors: scanpy 1.11 cannot read the approximate graph of newer pynndescent versions.
            options = {"use_rep": "X", "transformer": "sklearn", "random_state": self.seed}
            sc.pp.neighbors(graph, n_neighbors=self.options["n_neighbors"], **options)
            options = {"flavor": "leidenalg", "n_iterations": -1, "random_state": self.seed}
            sc.tl.leiden(graph, resolution=self.options["resolution"], **options)
        return graph.obs["leiden"].astype(int).to_numpy()

    def _kmeans(self, E: np.ndarray) -> np.ndarray:
        k = self.options["n_clusters"]
        if k > len(E):
            raise ValueError(f"{len(E)} spots cannot make {k} clusters; lower n_clusters")
        return KMeans(k, n_init=10, random_state=self.seed).fit(E).labels_


def _check(E: np.ndarray) -> np.ndarray:
    E = np.ascontiguousarray(E, dtype=np.float32)
    if E.ndim != 2 or not np.isfinite(E).all():
        raise ValueError(f"embeddings must be finite and two-dimensional (spots, width), not {E.shape}")
    return E
