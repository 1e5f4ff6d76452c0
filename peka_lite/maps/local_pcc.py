"""Compute and map the correlation around each spot."""

from __future__ import annotations

import warnings

import anndata as ad
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from sklearn.neighbors import NearestNeighbors

from peka_lite.maps.tissue import draw_spots
from peka_lite.probe.metrics import pearson

OVER = ("neighbors", "genes")


def local_pcc(
    coords: np.ndarray, measured: np.ndarray, predicted: np.ndarray, *, over: str = "neighbors", n_neighbors: int = 18
) -> np.ndarray:
    """Compute the Pearson correlation between measured and predicted expression at every spot.

    Parameters
    ----------
    coords
        (N, 2) spot centers, any unit.
    measured, predicted
        (N, G) normalized expression. With ``over="genes"``, each gene is first standardized over the spots, so that
        highly expressed genes do not dominate.
    over
        ``"neighbors"``: per gene over the spot and its `n_neighbors` nearest neighbors, then the mean over genes (18:
        the two rings around a spot of Visium's hexagonal grid). ``"genes"``: over the genes at the spot.

    Returns
    -------
    numpy.ndarray
        (N,) float64; NaN where it is undefined (no gene varies).

    Examples
    --------
    >>> import numpy as np
    >>> import peka_lite as pk
    >>> rng = np.random.default_rng(0)
    >>> xy, Y = rng.random((50, 2)), rng.random((50, 4))  # 50 spots, four genes
    >>> bool(np.allclose(pk.maps.local_pcc(xy, Y, 2 * Y + 1), 1))
    True
    """
    Y, P = np.asarray(measured, dtype=np.float64), np.asarray(predicted, dtype=np.float64)
    if over not in OVER:
        raise ValueError(f"unknown over={over!r}; known: {', '.join(OVER)}")
    if Y.shape != P.shape or len(coords) != len(Y):
        raise ValueError(f"shapes do not match: coords {np.shape(coords)}, measured {Y.shape}, predicted {P.shape}")
    if over == "genes":
        if Y.shape[1] < 3:
            raise ValueError(f"over='genes' needs at least 3 genes, not {Y.shape[1]}")
        return pearson(_zscore(Y).T, _zscore(P).T)
    near = find_neighbors(coords, n_neighbors)
    per_gene = np.stack([pearson(Y[rows], P[rows]) for rows in near])  # (N, G)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # NaN where no gene varies
        return np.nanmean(per_gene, axis=1)


def find_neighbors(coords: np.ndarray, n_neighbors: int) -> np.ndarray:
    """Return the rows of each spot and its nearest neighbors, (N, n_neighbors + 1)."""
    if not 3 <= n_neighbors < len(coords):
        raise ValueError(f"n_neighbors must be at least 3 and below the {len(coords)} spots, not {n_neighbors}")
    return NearestNeighbors(n_neighbors=n_neighbors + 1).fit(coords).kneighbors(coords, return_distance=False)


def pcc_map(adata: ad.AnnData, measured: np.ndarray, predicted: np.ndarray, *, n_neighbors: int = 18) -> Figure:
    """Map the local agreement of a prediction: `local_pcc` over neighborhoods and over genes, beside the H&E.

    `measured` and `predicted` are (N, G) normalized expression at the slide's spots.

    Examples
    --------
    >>> import peka_lite as pk
    >>> adata = pk.open_cohort("mini", slides=["MINI1"]).slides[0].adata
    >>> measured = pk.data.expression_targets(adata, ["KRT8", "CD8A", "ACACB"])
    >>> figure = pk.maps.pcc_map(adata, measured, measured + 1)
    >>> [ax.get_ylabel() for ax in figure.axes]  # three panels, two color bars
    ['', '', '', 'PCC', 'PCC']
    """
    coords = np.asarray(adata.obsm["spatial"])[:, :2]
    fig, axes = plt.subplots(1, 3, figsize=(13, 4.4), layout="constrained")
    draw_spots(axes[0], adata, None, title="H&E")
    shared = {"cmap": "RdBu_r", "norm": Normalize(-1, 1), "label": "PCC"}
    for ax, over, label in ((axes[1], "neighbors", "neighborhoods"), (axes[2], "genes", "genes")):
        values = local_pcc(coords, measured, predicted, over=over, n_neighbors=n_neighbors)
        draw_spots(ax, adata, values, title=f"PCC over {label} (mean {pd.Series(values).mean():.2f})", **shared)
    return fig


def _zscore(A: np.ndarray) -> np.ndarray:
    mean, std = A.mean(0), A.std(0)
    varies = std > 1e-10 * np.abs(mean)  # rounding gives a constant gene a tiny standard deviation
    return np.where(varies, A - mean, 0) / np.where(varies, std, 1)
