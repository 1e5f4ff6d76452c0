"""Tissue on a whole-slide image: where it is on the thumbnail, and which tiles of the grid hold enough of it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy.ndimage import binary_fill_holes, gaussian_filter
from skimage.filters import threshold_otsu
from skimage.measure import label

from peka_lite.data.wsi import TILE, TILE_MPP, SlideError, WholeSlide

TILE_AREA = (TILE * TILE_MPP) ** 2  # um2
SMOOTH = 4.0  # um, standard deviation of the blur that takes scanner noise away
DARK = 45  # brightest channel of a scanner's border or black ink
INK = 20  # by how much green exceeds red: in H&E it is the weaker of the two, in blue and green ink it is not
LEAST_SATURATION = 0.05  # glass stays below
APART = 0.05  # difference in mean saturation between tissue and glass, where both are there
GRAY = 200  # weakest channel of anything but glass
GLASS = 0.01  # least share of glass where it is what tissue is told from
DENSE = 0.1  # mean optical density that glass does not reach
COLORED = 0.01  # least share of what is not black that is more saturated than glass; of H&E's tissue it is above 0.9
BLACK = 30  # weakest channel of pictures on a black ground; in H&E, stained on bright glass, it is above 100


@dataclass(frozen=True)
class TissueTiles:
    """The tiles of a slide that hold tissue, and the picture that says so.

    Attributes
    ----------
    obs
        One row a tile, by rows: array_row, array_col (place in the grid, from 0) and tissue_share (0 to 1).
    picture
        (h, w, 3) uint8 thumbnail.
    mask
        (h, w) bool, tissue on the picture.
    scale
        Pixels of the picture in one of level 0.
    """

    obs: pd.DataFrame
    picture: np.ndarray
    mask: np.ndarray
    scale: float


def tissue_tiles(slide: WholeSlide, *, min_tissue: float = 0.5) -> TissueTiles:
    """Lay a grid of tiles without gaps or overlap from the upper left corner, and keep those with enough tissue.

    Parameters
    ----------
    slide
        From `open_slide`.
    min_tissue
        Least share of a tile's area, above 0 and at most 1. What reaches over the slide's edge is not tissue.

    Raises
    ------
    SlideError
        Where no tile holds so much; the message says how much the fullest holds.

    Examples
    --------
    >>> import numpy as np
    >>> from PIL import Image
    >>> import peka_lite as pk
    >>> pixels = np.full((672, 672, 3), 240, np.uint8)
    >>> pixels[224:448, 224:560] = (200, 120, 180)  # the middle tile, and half of the one beside it
    >>> Image.fromarray(pixels).save("slide.png")
    >>> with pk.data.open_slide("slide.png", mpp=0.5) as slide:
    ...     pk.data.tissue_tiles(slide, min_tissue=0.4).obs.round(1)
              array_row  array_col  tissue_share
    tile_1_1          1          1           1.0
    tile_1_2          1          2           0.5
    """
    if not 0 < min_tissue <= 1:
        raise ValueError(f"min_tissue is a share above 0 and at most 1, not {min_tissue}")
    picture, scale = slide.thumbnail()
    mask = find_tissue(picture, um_per_px=float(np.sqrt(np.prod(slide.mpp))) / scale)
    glass = picture.min(-1) > GRAY
    check_stain(slide, picture[mask] if mask.any() and glass.mean() > GLASS else picture[~glass])
    if not mask.any():
        raise SlideError(
            slide.path,
            f"no tissue found on its thumbnail at {slide.mpp[0]:.4g} um/px",
            "Is it an H&E slide, and is the resolution right? If not, give --mpp",
        )
    share = tissue_share(mask, tile=(slide.tile[0] * scale, slide.tile[1] * scale))  # (rows, cols)
    rows, cols = np.nonzero(share >= min_tissue)
    if not len(rows):
        raise SlideError(
            slide.path,
            f"no tile is tissue by {min_tissue:.0%} or more (the fullest is by {share.max():.1%})",
            "Give a lower --min-tissue",
        )
    obs = pd.DataFrame(
        {"array_row": rows, "array_col": cols, "tissue_share": share[rows, cols].astype(np.float32)},
        index=[f"tile_{row}_{col}" for row, col in zip(rows, cols, strict=True)],
    )
    return TissueTiles(obs, picture, mask, scale)


def check_stain(slide: WholeSlide, pixels: np.ndarray) -> None:
    """Refuse colors that H&E cannot have: none, those of a picture on black ground, inverted ones.

    Parameters
    ----------
    slide
        Named in the error.
    pixels
        (n, 3) uint8, from where tissue lies on the thumbnail.

    Raises
    ------
    SlideError
        With the colors that were seen.
    """
    pixels = pixels[pixels.max(-1) > DARK].astype(int) if (pixels > DARK).any() else pixels.astype(int)
    if not len(pixels):
        return
    red, green, blue = pixels.T
    high, low = pixels.max(-1), pixels.min(-1)
    colored = 1 - low / np.maximum(high, 1) > LEAST_SATURATION  # (n,)
    seen = None
    if colored.mean() < COLORED:
        seen = (
            f"red, green and blue differ by {np.median(high - low):.0f} of 255 where tissue should be: it has no color"
        )
    elif np.median(low[colored]) < BLACK:
        seen = f"the weakest color of its tissue is {np.median(low[colored]):.0f} of 255: it lies on black ground"
    elif np.median((green - np.maximum(red, blue))[colored]) > INK:
        seen = "green is the strongest color of its tissue: it looks inverted"
    if seen:
        raise SlideError(
            slide.path, f"{seen}, unlike H&E", "Give the H&E image at full scale in RGB, with 8 bits a channel"
        )


def find_tissue(image: np.ndarray, *, um_per_px: float) -> np.ndarray:
    """Tell tissue from glass on a thumbnail of an H&E slide.

    Tissue is more saturated than Otsu's threshold (Otsu 1979, doi:10.1109/TSMC.1979.4310076), or dense and at least
    faintly colored: that keeps pale stroma, and all of a slide with little or no glass. Black borders and ink in
    black, blue or green are left out, and do not move the threshold; red ink passes for tissue. Specks below half a
    tile are removed, holes below four tiles filled.

    Parameters
    ----------
    image
        (h, w, 3) uint8.
    um_per_px
        Its resolution.

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
    smooth = [gaussian_filter(image[..., c], SMOOTH / um_per_px, output=np.float32) for c in range(3)]
    red, green, blue = smooth
    high = np.maximum(np.maximum(red, green), blue)
    saturation = 1 - np.minimum(np.minimum(red, green), blue) / np.maximum(high, 1)  # (h, w)
    density = -np.log10((red + 1) / 256 * ((green + 1) / 256) * ((blue + 1) / 256)) / 3  # (h, w)
    seen = (high > DARK) & (green - red < INK)
    mask = seen & (density > DENSE) & (saturation > LEAST_SATURATION)
    values = saturation[seen]
    if values.size and np.ptp(values) > 0:
        threshold = threshold_otsu(values)
        if values[values > threshold].mean() - values[values <= threshold].mean() > APART:
            mask |= seen & (saturation > max(threshold, LEAST_SATURATION))
    tile = TILE_AREA / um_per_px**2  # in pixels of the image
    mask = _without_small(mask, tile / 2)
    holes = binary_fill_holes(mask) & ~mask
    return mask | (holes & ~_without_small(holes, 4 * tile))


def tissue_share(mask: np.ndarray, *, tile: tuple[float, float]) -> np.ndarray:
    """Return how much of each tile of a grid is tissue, (rows, cols) float64 from 0 to 1.

    `tile` is (width, height) in pixels of the mask, whole or not; tiles at the right and lower edges may reach over.

    Examples
    --------
    >>> tissue_share(np.array([[True, True, False]]), tile=(1.5, 1))
    array([[1.        , 0.33333333]])
    """
    sums = np.pad(mask.astype(np.int64).cumsum(0).cumsum(1), ((1, 0), (1, 0)))  # (h + 1, w + 1)
    for axis, side in ((0, tile[1]), (1, tile[0])):
        most = mask.shape[axis]
        edges = np.minimum(np.arange(int(np.ceil(most / side - 1e-6)) + 1) * side, most)
        low = np.minimum(edges.astype(int), most - 1)
        part = np.expand_dims(edges - low, 1 - axis)  # sums grow linearly inside a pixel
        sums = sums.take(low, axis) * (1 - part) + sums.take(low + 1, axis) * part
    return np.clip(np.diff(np.diff(sums, axis=0), axis=1) / (tile[0] * tile[1]), 0, 1)


def _without_small(mask: np.ndarray, area: float) -> np.ndarray:
    """Remove connected regions of fewer than `area` pixels."""
    regions = label(mask, connectivity=1)
    large = np.bincount(regions.ravel()) >= area
    large[0] = False
    return large[regions]
