"""Compute baseline features without a network: color and texture, coordinates, and sequencing depth."""

from __future__ import annotations

import numpy as np
from skimage.color import hed_from_rgb
from skimage.feature import local_binary_pattern

from peka_lite._core.progress import progress_bar

PERCENTILES = (10, 50, 90)
WORKING_SIZE = 112  # px: a 224 px tile is first averaged over 2 x 2 pixels
BRIGHT = 220  # of 255: a pixel above this in every channel is background
DEGREE = 5  # of the polynomials in x and y: (5 + 1)(5 + 2) / 2 = 21 terms


def color_features(tiles, *, progress: bool = False) -> np.ndarray:
    """Compute stain, brightness and texture features of each tile.

    Each tile is processed independently, averaged to about 112 px per side. The columns are mean, standard
    deviation and 10th, 50th and 90th percentile of red, green and blue (15) and of the hematoxylin and eosin optical
    densities after Ruifrok and Johnston 2001 (10); the share of bright pixels (1); mean and standard deviation of the
    gray gradient at three scales (6); and the histograms of uniform local binary patterns of the gray image at two
    scales (Ojala et al. 2002; 20).

    Parameters
    ----------
    tiles
        `TileStore` or uint8 array (N, H, W, 3), at least 16 px per side; read in batches.
    progress
        Show a progress bar.

    Returns
    -------
    numpy.ndarray
        (N, 52) float32, finite, in the order of `tiles`.

    Raises
    ------
    ValueError
        If the tiles are not uint8 RGB of at least 16 px per side.

    Examples
    --------
    >>> import numpy as np
    >>> from peka_lite.evaluation.controls import color_features
    >>> tiles = np.full((2, 224, 224, 3), 255, np.uint8)
    >>> tiles[1] = (200, 120, 180)
    >>> X = color_features(tiles)
    >>> X.shape, X[:, 25].tolist()  # the share of bright pixels
    ((2, 52), [1.0, 0.0])
    """
    shape, dtype = tuple(tiles.shape), getattr(tiles, "dtype", np.dtype(np.uint8))  # a TileStore is always uint8
    if len(shape) != 4 or shape[3] != 3 or dtype != np.uint8 or min(shape[1:3]) < 16:
        raise ValueError(f"tiles must be uint8 (N, H, W, 3) of at least 16 px per side, not {dtype} {shape}")
    out = np.empty((len(tiles), 52), dtype=np.float32)
    for start in progress_bar(
        range(0, len(tiles), 16), desc="color and texture", unit=" batches", enabled=progress, leave=False
    ):
        out[start : start + 16] = _describe(np.asarray(tiles[start : start + 16]))
    return out


def coordinate_features(cohort) -> np.ndarray:
    """Compute polynomials up to degree 5 in the x and y of each spot on its slide, 21 terms.

    The spot centers of ``obsm["spatial"]`` are scaled to [-1, 1] by slide and axis. The first 21 columns hold the terms
    for all slides together. Then each slide has 21 separate columns, zero for every other slide. If spots of a slide
    are in training and test, these columns measure the effect of interpolation within the slide. For a slide without
    training spots only the shared columns are used, which contain little beyond its outline.

    Returns
    -------
    numpy.ndarray
        (N, 21 * (1 + slides)) float32 in the cohort's row order.

    Examples
    --------
    >>> import peka_lite as pk
    >>> from peka_lite.evaluation.controls import coordinate_features
    >>> coordinate_features(pk.open_cohort("mini", slides=["MINI1", "MINI2"])).shape
    (395, 63)
    """
    sizes = [s.n_spots for s in cohort.slides]
    ends = np.cumsum([0, *sizes])
    terms = np.concatenate([_surface(s.adata.obsm["spatial"]) for s in cohort.slides])  # (N, 21)
    width = terms.shape[1]
    out = np.zeros((len(terms), width * (1 + len(sizes))), dtype=np.float32)
    out[:, :width] = terms
    for i in range(len(sizes)):
        rows = slice(ends[i], ends[i + 1])
        out[rows, width * (i + 1) : width * (i + 2)] = terms[rows]
    return out


def depth_features(cohort) -> np.ndarray:
    """Compute the sequencing depth of each spot: log1p of its total count over the cohort's shared genes.

    It is part of the measurement and unknown for a new tile: its score shows how much the counts alone explain.

    Returns
    -------
    numpy.ndarray
        (N, 1) float32 in the cohort's row order.

    Examples
    --------
    >>> import numpy as np
    >>> import peka_lite as pk
    >>> from peka_lite.evaluation.controls import depth_features
    >>> cohort = pk.open_cohort("mini", slides=["MINI1"])
    >>> np.allclose(np.expm1(depth_features(cohort)), cohort.adata.X.sum(1))
    True
    """
    total = np.asarray(cohort.adata.X.sum(1, dtype=np.float64)).reshape(-1, 1)
    return np.log1p(total).astype(np.float32)


def _describe(tiles: np.ndarray) -> np.ndarray:
    """Return the features (n, 52) of a batch of uint8 tiles (n, H, W, 3)."""
    rgb = _pool(tiles.astype(np.float32), max(1, min(tiles.shape[1:3]) // WORKING_SIZE))  # (n, h, w, 3) in 0 to 255
    # Optical density is the negative log of transmitted light; adding 1 keeps black pixels finite.
    stains = -np.log((rgb + 1) / 256) @ hed_from_rgb[:, :2].astype(np.float32)  # (n, h, w, 2)
    gray = rgb @ np.array([0.299, 0.587, 0.114], dtype=np.float32)
    half = _pool(gray[..., None], 2)[..., 0]
    quarter = _pool(half[..., None], 2)[..., 0]
    parts = [
        _summary(rgb),
        _summary(stains),
        (rgb.min(3) > BRIGHT).mean((1, 2))[:, None],
        *(_gradient(image) for image in (gray, half, quarter)),
        *(_patterns(image) for image in (gray, half)),
    ]
    return np.concatenate(parts, axis=1)


def _pool(image: np.ndarray, factor: int) -> np.ndarray:
    """Average blocks of factor x factor pixels of (n, h, w, channels); the remainder at the far edges is dropped."""
    h, w = image.shape[1] // factor, image.shape[2] // factor
    image = image[:, : h * factor, : w * factor]
    # Strided sums are much faster than a mean over the axes of blocks.
    total = sum(image[:, i::factor, j::factor] for i in range(factor) for j in range(factor))
    return total / factor**2


def _summary(image: np.ndarray) -> np.ndarray:
    """Return mean, standard deviation and percentiles of each channel of (n, h, w, channels); (n, 5 * channels)."""
    flat = np.ascontiguousarray(image.reshape(len(image), -1, image.shape[3]).transpose(0, 2, 1))  # (n, channels, px)
    percentiles = np.percentile(flat, PERCENTILES, axis=2)  # (3, n, channels)
    return np.concatenate([flat.mean(2), flat.std(2), *percentiles], axis=1)


def _gradient(gray: np.ndarray) -> np.ndarray:
    """Return mean and standard deviation of the gradient magnitude of (n, h, w); (n, 2)."""
    down, right = gray[:, 1:, :-1] - gray[:, :-1, :-1], gray[:, :-1, 1:] - gray[:, :-1, :-1]
    size = np.sqrt(down**2 + right**2)
    return np.stack([size.mean((1, 2)), size.std((1, 2))], axis=1)


def _patterns(gray: np.ndarray) -> np.ndarray:
    """Return histograms of the uniform patterns of 8 neighbors at 1 px, of (n, h, w); (n, 10), rows sum to 1."""
    # Integer gray levels, so that rounding does not break ties between equal neighbors.
    codes = [local_binary_pattern(image, 8, 1, method="uniform") for image in np.rint(gray).astype(np.uint8)]
    return np.stack([np.bincount(c.astype(np.int64).ravel(), minlength=10) / c.size for c in codes])


def _surface(xy) -> np.ndarray:
    """Return polynomials of one slide's positions (n, 2), scaled to [-1, 1]; (n, 21), the first column is 1."""
    xy = np.asarray(xy, dtype=np.float64)
    low, high = xy.min(0), xy.max(0)
    # An axis without extent (one row or column of spots) is 0.
    x, y = (2 * (xy - (low + high) / 2) / np.where(high > low, high - low, 1)).T
    # Legendre polynomials span the same surfaces as powers and are far less correlated.
    px, py = (np.polynomial.legendre.legvander(v, DEGREE) for v in (x, y))  # (n, 6)
    return np.stack([px[:, i] * py[:, d - i] for d in range(DEGREE + 1) for i in range(d + 1)], axis=1)
