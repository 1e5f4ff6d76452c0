"""Names of teachers and of pseudo-label methods, with the default options of each method."""

TEACHERS = ("pca", "scfoundation", "scfoundation-mini")
LABEL_METHODS = {"knn-leiden": {"n_neighbors": 15, "resolution": 1.0}, "kmeans": {"n_clusters": 100, "n_neighbors": 15}}
