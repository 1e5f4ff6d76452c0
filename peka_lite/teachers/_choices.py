"""Names of the teachers and of the ways to make pseudo-labels."""

from __future__ import annotations

TEACHERS = ("pca", "scfoundation", "scfoundation-mini")

LABEL_METHODS = {
    "knn-leiden": {"n_neighbors": 15, "resolution": 1.0},
    "kmeans": {"n_clusters": 100, "n_neighbors": 15},
}
