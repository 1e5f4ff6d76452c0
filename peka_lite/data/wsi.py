"""Read whole-slide images: resolution, thumbnail, and tiles of 224 px at 0.5 um/px from any pyramid."""

from __future__ import annotations

import functools
import hashlib
import math
import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from peka_lite.data._picture_limits import CONVERT, PictureError, check_slide, check_tags, find_slide_files
from peka_lite.data._pictures import read_picture
from peka_lite.data.tiles import TILE_SHAPE

TILE = TILE_SHAPE[0]
TILE_MPP = 0.5  # um/px, as HEST-1k's tiles
COARSEST_MPP = 1.0  # um/px; a coarser tile is upsampled from less than a quarter of its pixels
TOLERANCE = 1.02  # 0.5 um/px scanners write values from 0.49 to 0.51
PLAUSIBLE_MPP = (0.05, 50.0)  # um/px; the common default of 72 dpi would be 353
MAX_STRETCH = 1.05  # ratio of a level's downsampling in x and y
MAX_ASPECT = 1.1  # ratio of a pixel's sides
LANCZOS_RADIUS = 3  # pixels of the coarser grid
BLOCK = 2048  # pixels of a level read at once for a thumbnail
PER_UNIT = {"centimeter": 1e4, "inch": 25400.0}  # um
TIFFS = ("generic-tiff", "aperio")  # OpenSlide formats that other programs write too


class SlideError(ValueError):
    """Raised for an unusable slide; the message names the file, the problem and the fix.

    Examples
    --------
    >>> from PIL import Image
    >>> import peka_lite as pk
    >>> Image.new("RGB", (448, 448), "white").save("slide.png")
    >>> with pk.data.open_slide("slide.png", mpp=0.5) as slide:
    ...     pk.data.tissue_tiles(slide)  # doctest: +ELLIPSIS
    Traceback (most recent call last):
        ...
    peka_lite.data.wsi.SlideError: slide.png: no tissue found on its thumbnail at 0.5 um/px. Is it an H&E slide, ...
    """

    def __init__(self, path, problem: str, fix: str):
        super().__init__(f"{path}: {problem}. {fix}")
        self.path, self.problem, self.fix = path, problem, fix


class ResolutionError(SlideError):
    """Raised for a slide with an unknown or implausible resolution."""


@dataclass(frozen=True, repr=False)
class WholeSlide:
    """Read tiles and thumbnails of a whole-slide image; `open_slide` returns it, ``with`` or `close` closes it.

    Reading is thread-safe. Coordinates are in pixels of level 0, the finest, from the upper left corner.

    Attributes
    ----------
    path
        The file.
    mpp
        (x, y) um/px of level 0.
    size
        (width, height) of level 0.
    levels
        For each level, finest first: its downsampling in x and in y, and the factor by which OpenSlide converts
        coordinates of level 0.
    fingerprint
        Hash of the file's size, modification time and OpenSlide's quickhash; 16 hex digits.
    orientation
        The file's Orientation tag, which has been applied; 1: as stored.

    Examples
    --------
    >>> from PIL import Image
    >>> import peka_lite as pk
    >>> Image.new("RGB", (900, 500), (200, 120, 180)).save("slide.png")
    >>> with pk.data.open_slide("slide.png", mpp=0.25) as slide:
    ...     slide, slide.tile, slide.read_tile(0, 1).shape
    (WholeSlide slide.png: 900 x 500 px at 0.25 um/px, 1 level(s), (448.0, 448.0), (224, 224, 3))
    """

    path: Path
    mpp: tuple[float, float]
    size: tuple[int, int]
    levels: tuple[tuple[float, float, float], ...]
    fingerprint: str
    orientation: int
    _open: Callable[[], object] = field(compare=False)
    _idle: list = field(default_factory=list, compare=False)

    @property
    def tile(self) -> tuple[float, float]:
        """(width, height) of a tile: 224 px at 0.5 um/px, 112 um, in pixels of level 0."""
        return TILE * TILE_MPP / self.mpp[0], TILE * TILE_MPP / self.mpp[1]

    def read_tile(self, row: int, col: int) -> np.ndarray:
        """Read a tile of the grid that starts at the upper left corner; (224, 224, 3) uint8, white outside the slide.

        Raises
        ------
        SlideError
            If the file is damaged at this tile.
        """
        width, height = self.tile
        return self._read(col * width, row * height, width, height, (TILE, TILE))

    def read_around(self, x: float, y: float) -> np.ndarray:
        """Read the tile centered at (x, y), as `read_tile`."""
        width, height = self.tile
        return self._read(x - width / 2, y - height / 2, width, height, (TILE, TILE))

    def thumbnail(self, most: int = 2000) -> tuple[np.ndarray, float]:
        """Downsample the slide to at most `most` pixels on its longer side.

        Returns
        -------
        image
            (h, w, 3) uint8.
        scale
            Thumbnail pixels per pixel of level 0, the same in x and y.
        """
        scale = min(1.0, most / max(self.size))
        width, height = (math.ceil(side * scale - 1e-6) for side in self.size)
        image = np.empty((height, width, 3), dtype=np.uint8)
        rx, ry, _ = self.levels[self._choose_level(1 / scale, 1 / scale)]
        step = max(1, int(BLOCK * min(rx, ry) * scale))  # bounds memory for a slide of one huge level
        for y in range(0, height, step):
            for x in range(0, width, step):
                w, h = min(step, width - x), min(step, height - y)
                image[y : y + h, x : x + w] = self._read(x / scale, y / scale, w / scale, h / scale, (w, h))
        return image, scale

    def close(self) -> None:
        """Close the file."""
        while self._idle:
            self._idle.pop().close()

    def __enter__(self) -> WholeSlide:
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def __repr__(self) -> str:
        return (
            f"WholeSlide {self.path.name}: {self.size[0]} x {self.size[1]} px at {self.mpp[0]:.4g} um/px, "
            f"{len(self.levels)} level(s)"
        )

    def _choose_level(self, x: float, y: float) -> int:
        """Return the coarsest level downsampled by at most (x, y), or level 0."""
        fine_enough = [
            i
            for i, (rx, ry, _) in enumerate(self.levels)
            if rx <= x * TOLERANCE and ry <= y * TOLERANCE and max(rx, ry) <= min(rx, ry) * MAX_STRETCH  # else a label
        ]
        return max(fine_enough, default=0)

    def _read(self, x: float, y: float, width: float, height: float, shape: tuple[int, int]) -> np.ndarray:
        """Resample a rectangle of level 0 to `shape` (w, h) with subpixel accuracy; (h, w, 3) uint8."""
        level = self._choose_level(width / shape[0], height / shape[1])
        *ratio, factor = self.levels[level]
        corner, size, padding, box = [], [], [], []
        for start, length, r, n in zip((x, y), (width, height), ratio, shape, strict=True):
            first, last = start / r, (start + length) / r  # in pixels of the level
            margin = math.ceil(LANCZOS_RADIUS * max(1.0, (last - first) / n))
            begin = math.floor(first) - margin
            pixel = round(max(begin, 0) * factor)  # of level 0; OpenSlide misplaces negative coordinates
            origin = pixel / factor if begin >= 0 else begin
            corner.append(pixel)
            padding.append(max(-begin, 0))
            size.append(math.ceil(last - origin) + margin - padding[-1])
            box.append((first - origin, last - origin))
        region = self._read_region(tuple(corner), level, tuple(size), origin=(x, y))
        if any(padding):
            region = ImageOps.expand(region, border=(*padding, 0, 0), fill="white")
        (left, right), (top, bottom) = box
        return np.array(region.resize(shape, Image.Resampling.LANCZOS, box=(left, top, right, bottom)))

    def _read_region(self, corner, level: int, size, *, origin) -> Image.Image:
        """Read pixels of a level over white; errors name `origin`, the corner of the tile in level 0."""
        import openslide

        try:
            try:
                handle = self._idle.pop()
            except IndexError:  # one handle per concurrent thread
                handle = self._open()
            region = handle.read_region(corner, level, size)
        except openslide.OpenSlideError as error:  # drop the handle: later reads would fail
            place = "x={:.0f}, y={:.0f}".format(*origin)
            problem = f"cannot be read around pixel {place} of level 0, from level {level} ({error})"
            fix = "The file is damaged: copy it again or repeat the conversion"
            raise SlideError(self.path, problem, fix) from None
        self._idle.append(handle)
        if region.getextrema()[3][0] == 255:
            return region.convert("RGB")
        white = Image.new("RGB", region.size, "white")
        white.paste(region, mask=region)
        return white


def open_slide(path: str | os.PathLike, *, mpp: float | None = None) -> WholeSlide:
    """Open a whole-slide image that OpenSlide reads (Goode et al. 2013, doi:10.4103/2153-3539.119005), or a plain one.

    Parameters
    ----------
    path
        SVS, NDPI, MRXS, SCN, tiled TIFF, ...; with any pyramid or one level. Images that OpenSlide cannot read
        correctly are loaded into memory (4 bytes per pixel): PNG, JPEG, and TIFF without tiles, with 16 bits per
        channel, separate red, green and blue planes, the full-scale image after the first page, or an Orientation tag
        (which is applied). Transparent pixels become white; an alpha channel of zeros is ignored.
    mpp
        Microns per pixel of level 0 in x and y; overrides the file's value. None: from the file.

    Raises
    ------
    FileNotFoundError
        If the file does not exist.
    SlideError
        If the file cannot be read, declares more pixels than its size or memory allows, or its largest image is not
        RGB. Also if the resolution is unknown, implausible or coarser than 1 um/px, or a pixel's sides differ by more
        than 10 %. Coarser than 0.5 um/px only warns: tiles are upsampled.

    Examples
    --------
    A file without resolution metadata needs `mpp`:

    >>> from PIL import Image
    >>> import peka_lite as pk
    >>> Image.new("RGB", (900, 500), (200, 120, 180)).save("slide.png")
    >>> pk.data.open_slide("slide.png")  # doctest: +ELLIPSIS
    Traceback (most recent call last):
        ...
    peka_lite.data.wsi.ResolutionError: slide.png: the file has no resolution metadata. Give the microns per pixel ...
    >>> pk.data.open_slide("slide.png", mpp=0.5)
    WholeSlide slide.png: 900 x 500 px at 0.5 um/px, 1 level(s)
    """
    import openslide

    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: {'a folder' if path.is_dir() else 'no such file'}; give a whole-slide image")
    reopen, handle, properties, reason, orientation = functools.partial(openslide.OpenSlide, path), None, {}, "", 1
    try:
        check_tags(path)
        files = find_slide_files(path)
        try:
            handle = reopen()
            properties = dict(handle.properties)
        except openslide.OpenSlideError as error:
            reason = f"OpenSlide cannot read it ({error}), nor can Pillow or tifffile"
        if handle is not None:
            check_slide(handle, path, files)
        if handle is None or properties.get("openslide.vendor") in TIFFS:
            picture = read_picture(path, handle)
            if picture is not None:
                reopen = functools.partial(openslide.ImageSlide, picture.image)
                handle, properties, orientation = reopen(), picture.properties, picture.orientation
    except PictureError as error:
        raise SlideError(path, error.problem, error.fix) from None
    except MemoryError:
        raise SlideError(path, "it does not fit into memory", f"Is it damaged? {CONVERT}") from None
    except (OSError, SyntaxError, ValueError) as error:
        raise SlideError(path, reason or f"its full-scale image cannot be read ({error})", CONVERT) from None
    size, levels = handle.dimensions, tuple(zip(handle.level_dimensions, handle.level_downsamples, strict=True))
    resolution = _find_resolution(path, properties, mpp)
    if max(resolution) > TILE_MPP * TOLERANCE:
        coarse = f"level 0 has {max(resolution):.3g} um/px, coarser than the {TILE_MPP} um/px of tiles"
        if max(resolution) > COARSEST_MPP * TOLERANCE:
            raise SlideError(path, coarse, f"Give a scan of at most {COARSEST_MPP} um/px; if this is wrong, give --mpp")
        warnings.warn(f"{path}: {coarse}; tiles are upsampled, and predictions may be worse", stacklevel=2)
    stat = path.stat()
    parts = (stat.st_size, stat.st_mtime_ns, properties.get("openslide.quickhash-1"))
    return WholeSlide(
        path=path,
        mpp=resolution,
        size=size,
        levels=tuple((*_compute_downsampling(size, dimensions), factor) for dimensions, factor in levels),
        fingerprint=hashlib.sha256(repr(parts).encode()).hexdigest()[:16],
        orientation=orientation,
        _open=reopen,
        _idle=[handle],
    )


def _find_resolution(path: Path, properties: dict, mpp: float | None) -> tuple[float, float]:
    """Return um/px (x, y): `mpp`, OpenSlide's value, or that of the TIFF tags."""
    low, high = PLAUSIBLE_MPP
    if mpp is not None:
        if not low <= mpp <= high:
            raise ValueError(f"mpp must be microns per pixel from {low} to {high:g}, not {mpp}")
        return float(mpp), float(mpp)
    unit = PER_UNIT.get(properties.get("tiff.ResolutionUnit", ""), math.nan)
    resolution = []
    for axis in "xy":
        value = _parse_number(properties.get(f"openslide.mpp-{axis}"))
        dots = _parse_number(properties.get(f"tiff.{axis.upper()}Resolution")) or math.nan  # per unit
        resolution.append(value or unit / dots)
    fix = "Give the microns per pixel of its finest level with --mpp (mpp= in Python)"
    if any(math.isnan(value) for value in resolution):
        raise ResolutionError(path, "the file has no resolution metadata", fix)
    text = f"{resolution[0]:.4g} x {resolution[1]:.4g} um/px"
    if not all(low <= value <= high for value in resolution):
        raise ResolutionError(path, f"its resolution of {text} is not plausible", fix)
    if max(resolution) > MAX_ASPECT * min(resolution):
        fix += ", or scale the image to square pixels"
        raise ResolutionError(path, f"its pixels are not square ({text})", fix)
    return resolution[0], resolution[1]


def _parse_number(text: str | None) -> float | None:
    try:
        return float(text or 0) or None
    except ValueError:
        return None


def _compute_downsampling(size: tuple[int, int], level: tuple[int, int]) -> tuple[float, float]:
    """Return the downsampling of a level (x, y).

    A level's size is rounded: 4567 px downsampled by 4 give 1141 or 1142. A whole factor is returned if it fits.
    """
    factor = max(1, round(size[0] / level[0]))
    if all(n in (side // factor, -(-side // factor)) for side, n in zip(size, level, strict=True)):
        return float(factor), float(factor)
    return size[0] / level[0], size[1] / level[1]
