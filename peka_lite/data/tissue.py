"""Detect tissue on a slide's thumbnail and select the grid tiles with enough of it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy.ndimage import binary_fill_holes, gaussian_filter
from skimage.filters import threshold_otsu
from skimage.measure import label

from peka_lite.data._picture_limits import FIX
from peka_lite.data.wsi import TILE, TILE_MPP, SlideError, WholeSlide

TILE_AREA = (TILE * TILE_MPP) ** 2  # um2
BLUR_UM = 4.0  # standard deviation of the blur against scanner noise
DARK = 45  # highest channel of scanner borders and black ink
INK = 20  # green minus red of blue and green ink; negative in H&E
MIN_SATURATION = 0.05  # glass is below
MIN_CONTRAST = 0.05  # least difference in mean saturation between tissue and glass, if both exist
GLASS_LEVEL = 200  # lowest channel of glass is above
MIN_GLASS = 0.01  # least share of glass for the tissue mask to be reliable
MIN_DENSITY = 0.1  # mean optical density; glass is below
MIN_COLORED = 0.01  # least share of non-black pixels more saturated than glass; above 0.9 in H&E tissue
BLACK = 30  # lowest channel of images on a black background is below; in H&E it is above 100


@dataclass(frozen=True)
class TissueTiles:
    """Tissue tiles of a slide, with the thumbnail and mask that they were selected by.

    Attributes
    ----------
    obs
        One row per tile, in row-major order: array_row, array_col (from 0) and tissue_share (0 to 1).
    picture
        (h, w, 3) uint8 thumbnail.
    mask
        (h, w) bool, tissue on the thumbnail.
    scale
        Thumbnail pixels per pixel of level 0.
    """

    obs: pd.DataFrame
    picture: np.ndarray
    mask: np.ndarray
    scale: float


def tissue_tiles(slide: WholeSlide, *, min_tissue: float = 0.5) -> TissueTiles:
    """Select the tiles with enough tissue from a gapless grid that starts at the upper left corner.

    Parameters
    ----------
    slide
        From `open_slide`.
    min_tissue
        Least tissue share of a tile, above 0 and at most 1. Area outside the slide is not tissue.

    Raises
    ------
    SlideError
        If no tile has enough; the message gives the largest share.

    Examples
    --------
    >>> import numpy as np
    >>> from PIL import Image
    >>> import peka_lite as pk
    >>> pixels = np.full((672, 672, 3), 240, np.uint8)
    >>> pixels[224:448, 224:560] = (200, 120, 180)  # the middle tile and half of its right neighbor
    >>> Image.fromarray(pixels).save("slide.png")
    >>> with pk.data.open_slide("slide.png", mpp=0.5) as slide:
    ...     pk.data.tissue_tiles(slide, min_tissue=0.4).obs.round(1)
              array_row  array_col  tissue_share
    tile_1_1          1          1           1.0
    tile_1_2          1          2           0.5
    """
    if not 0 < min_tissue <= 1:
        raise ValueError(f"min_tissue must be a share above 0 and at most 1, not {min_tissue}")
    picture, scale = slide.thumbnail()
    mask = find_tissue(picture, um_per_px=float(np.sqrt(np.prod(slide.mpp))) / scale)
    glass = picture.min(-1) > GLASS_LEVEL
    check_stain(slide, picture[mask] if mask.any() and glass.mean() > MIN_GLASS else picture[~glass])
    if not mask.any():
        problem = f"no tissue found on its thumbnail at {slide.mpp[0]:.4g} um/px"
        raise SlideError(slide.path, problem, "Is it an H&E slide, and is the resolution right? If not, give --mpp")
    share = tissue_share(mask, tile=(slide.tile[0] * scale, slide.tile[1] * scale))  # (rows, cols)
    rows, cols = np.nonzero(share >= min_tissue)
    if not len(rows):
        problem = f"no tile has {min_tissue:.0%} tissue or more (the largest share is {share.max():.1%})"
        raise SlideError(slide.path, problem, "Give a lower --min-tissue")
    obs = pd.DataFrame(
        {"array_row": rows, "array_col": cols, "tissue_share": share[rows, cols].astype(np.float32)},
        index=[f"tile_{row}_{col}" for row, col in zip(rows, cols, strict=True)],
    )
    return TissueTiles(obs, picture, mask, scale)


def check_stain(slide: WholeSlide, pixels: np.ndarray) -> None:
    """Raise a `SlideError` if the tissue's `pixels` (n, 3) uint8 are gray, on black or inverted, unlike H&E."""
    pixels = pixels[pixels.max(-1) > DARK].astype(int) if (pixels > DARK).any() else pixels.astype(int)
    if not len(pixels):
        return
    red, green, blue = pixels.T
    high, low = pixels.max(-1), pixels.min(-1)
    colored = 1 - low / np.maximum(high, 1) > MIN_SATURATION  # (n,)
    problem = None
    if colored.mean() < MIN_COLORED:
        problem = f"red, green and blue of its tissue differ by {np.median(high - low):.0f} of 255: it has no color"
    elif np.median(low[colored]) < BLACK:
        problem = f"the lowest channel of its tissue is {np.median(low[colored]):.0f} of 255: it has a black background"
    elif np.median((green - np.maximum(red, blue))[colored]) > INK:
        problem = "green is the highest channel of its tissue: it looks inverted"
    if problem:
        raise SlideError(slide.path, f"{problem}, unlike H&E", FIX)


def find_tissue(image: np.ndarray, *, um_per_px: float) -> np.ndarray:
    """Segment the tissue on a thumbnail of an H&E slide.

    Tissue is more saturated than Otsu's threshold (Otsu 1979, doi:10.1109/TSMC.1979.4310076), or dense and faintly
    colored, which includes pale stroma and slides with little or no glass. Black borders and black, blue or green ink
    are excluded, also from the threshold; red ink counts as tissue. Specks below half a tile are removed, holes below
    four tiles are filled.

    Parameters
    ----------
    image
        (h, w, 3) uint8.
    um_per_px
        Resolution of the thumbnail.

    Returns
    -------
    numpy.ndarray
        (h, w) bool.

    Examples
    --------
    >>> import numpy as np
    >>> import peka_lite as pk
    >>> image = np.full((60, 60, 3), 240, np.uint8)
    >>> image[20:40, 20:40] = (200, 120, 180)
    >>> int(pk.data.find_tissue(image, um_per_px=20).sum())
    400
    """
    red, green, blue = (gaussian_filter(image[..., c], BLUR_UM / um_per_px, output=np.float32) for c in range(3))
    high = np.maximum(np.maximum(red, green), blue)
    saturation = 1 - np.minimum(np.minimum(red, green), blue) / np.maximum(high, 1)  # (h, w)
    density = -np.log10((red + 1) / 256 * ((green + 1) / 256) * ((blue + 1) / 256)) / 3  # (h, w)
    valid = (high > DARK) & (green - red < INK)  # neither border nor ink
    mask = valid & (density > MIN_DENSITY) & (saturation > MIN_SATURATION)
    values = saturation[valid]
    if values.size and np.ptp(values) > 0:
        threshold = threshold_otsu(values)
        if values[values > threshold].mean() - values[values <= threshold].mean() > MIN_CONTRAST:
            mask |= valid & (saturation > max(threshold, MIN_SATURATION))
    tile = TILE_AREA / um_per_px**2  # pixels of the thumbnail
    mask = _remove_small_regions(mask, tile / 2)
    holes = binary_fill_holes(mask) & ~mask
    return mask | (holes & ~_remove_small_regions(holes, 4 * tile))


def tissue_share(mask: np.ndarray, *, tile: tuple[float, float]) -> np.ndarray:
    """Compute the tissue share of each tile of a grid, (rows, cols) float64 from 0 to 1.

    `tile` is (width, height) in mask pixels and may be fractional. Tiles may cross the right and lower edges.
    """
    sums = np.pad(mask.astype(np.int64).cumsum(0).cumsum(1), ((1, 0), (1, 0)))  # (h + 1, w + 1)
    for axis, side in ((0, tile[1]), (1, tile[0])):
        n = mask.shape[axis]
        edges = np.minimum(np.arange(int(np.ceil(n / side - 1e-6)) + 1) * side, n)
        low = np.minimum(edges.astype(int), n - 1)
        weight = np.expand_dims(edges - low, 1 - axis)  # cumulative sums are linear within a pixel
        sums = sums.take(low, axis) * (1 - weight) + sums.take(low + 1, axis) * weight
    return np.clip(np.diff(np.diff(sums, axis=0), axis=1) / (tile[0] * tile[1]), 0, 1)


def _remove_small_regions(mask: np.ndarray, area: float) -> np.ndarray:
    """Remove connected regions of fewer than `area` pixels."""
    regions = label(mask, connectivity=1)
    large = np.bincount(regions.ravel()) >= area
    large[0] = False
    return large[regions]
