"""Whole-slide images: the file, its resolution, and tiles of 224 px at 0.5 um/px cut from its pyramid."""

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

from peka_lite.data._picture_limits import AGAIN, PictureError, check_slide, check_tags, slide_files
from peka_lite.data._pictures import read_picture
from peka_lite.data.tiles import TILE_SHAPE

TILE = TILE_SHAPE[0]
TILE_MPP = 0.5  # um/px, as HEST-1k's tiles
COARSEST = 1.0  # um/px: beyond, a tile would be made of fewer than a quarter of its pixels
NEAR = 1.02  # scanners of 0.5 um/px write anything from 0.49 to 0.51
PLAUSIBLE = (0.05, 50.0)  # um/px; 72 dpi, which many programs write for want of better, would be 353
ALIKE = 1.05  # most that a level may be shrunk more one way than the other
SQUARE = 1.1  # most that one side of a pixel may exceed the other
LANCZOS_REACH = 3  # the filter's reach to either side, in pixels of the coarser grid
BLOCK = 2048  # pixels of a level read at once for a thumbnail
PER_UNIT = {"centimeter": 1e4, "inch": 25400.0}  # um
TIFFS = ("generic-tiff", "aperio")  # OpenSlide's formats that programs other than scanners' write too


class SlideError(ValueError):
    """A slide that cannot be used; the message names the file, what is wrong and the fix.

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

    def __init__(self, path, what: str, fix: str):
        super().__init__(f"{path}: {what}. {fix}")
        self.path, self.what, self.fix = path, what, fix


class ResolutionError(SlideError):
    """A slide whose resolution is not known, or cannot be right."""


@dataclass(frozen=True, repr=False)
class WholeSlide:
    """A whole-slide image, open for reading; make one with `open_slide`, and close it or use it in a ``with``.

    Threads may read at the same time. Positions are in pixels of level 0, the finest, from the upper left corner.

    Attributes
    ----------
    path
        The file.
    mpp
        (x, y) um/px of level 0.
    size
        (width, height) of level 0.
    levels
        For each level, finest first: pixels of level 0 that one of its pixels spans, (x, y), and the factor by which
        OpenSlide turns positions into that level's.
    fingerprint
        Hash of the file's size, time and content as OpenSlide samples it; 16 hex digits.
    orientation
        The file's Orientation tag, by which the image was turned; 1: as stored.

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
        """Read a tile of the grid that starts at the upper left corner; (224, 224, 3) uint8, white off the slide.

        Raises
        ------
        SlideError
            Where the file cannot be read there.
        """
        width, height = self.tile
        return self._read(col * width, row * height, width, height, (TILE, TILE))

    def read_around(self, x: float, y: float) -> np.ndarray:
        """Read the tile whose center is at (x, y); otherwise as `read_tile`."""
        width, height = self.tile
        return self._read(x - width / 2, y - height / 2, width, height, (TILE, TILE))

    def thumbnail(self, most: int = 2000) -> tuple[np.ndarray, float]:
        """Shrink the slide so that its longer side has at most `most` pixels.

        Returns
        -------
        image
            (h, w, 3) uint8.
        scale
            Pixels of the image in one of level 0, in both directions.
        """
        scale = min(1.0, most / max(self.size))
        width, height = (math.ceil(side * scale - 1e-6) for side in self.size)
        image = np.empty((height, width, 3), dtype=np.uint8)
        rx, ry, _ = self.levels[self._level(1 / scale, 1 / scale)]
        step = max(1, int(BLOCK * min(rx, ry) * scale))  # a slide of one huge level is never whole in memory
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

    def _level(self, x: float, y: float) -> int:
        """Return the coarsest level whose pixels span at most (x, y) pixels of level 0, or the finest."""
        fine = [
            i
            for i, (rx, ry, _) in enumerate(self.levels)
            if rx <= x * NEAR and ry <= y * NEAR and max(rx, ry) <= min(rx, ry) * ALIKE  # else a label, not a level
        ]
        return max(fine, default=0)

    def _read(self, x: float, y: float, width: float, height: float, shape: tuple[int, int]) -> np.ndarray:
        """Resample a rectangle of level 0 to `shape` (w, h), exact to parts of a pixel; (h, w, 3) uint8."""
        level = self._level(width / shape[0], height / shape[1])
        *ratio, factor = self.levels[level]
        corner, size, white, box = [], [], [], []
        for start, length, r, n in zip((x, y), (width, height), ratio, shape, strict=True):
            first, last = start / r, (start + length) / r  # in pixels of the level
            margin = math.ceil(LANCZOS_REACH * max(1.0, (last - first) / n))
            begin = math.floor(first) - margin
            at = round(max(begin, 0) * factor)  # whole pixels of level 0; OpenSlide errs below 0
            origin = at / factor if begin >= 0 else begin
            corner.append(at)
            white.append(max(-begin, 0))
            size.append(math.ceil(last - origin) + margin - white[-1])
            box.append((first - origin, last - origin))
        region = self._region(tuple(corner), level, tuple(size), wanted=(x, y))
        if any(white):
            region = ImageOps.expand(region, border=(*white, 0, 0), fill="white")
        (left, right), (top, bottom) = box
        return np.array(region.resize(shape, Image.Resampling.LANCZOS, box=(left, top, right, bottom)))

    def _region(self, corner, level: int, size, *, wanted) -> Image.Image:
        """Read pixels of a level over white."""
        import openslide

        try:
            try:
                handle = self._idle.pop()
            except IndexError:  # as many handles as threads that read at once
                handle = self._open()
            region = handle.read_region(corner, level, size)
        except openslide.OpenSlideError as error:  # the handle is not put back: it would fail wherever it reads
            raise SlideError(
                self.path,
                f"cannot be read around pixel x={wanted[0]:.0f}, y={wanted[1]:.0f} of level 0, from level {level} "
                f"({error})",
                "The file is damaged there: copy it again or convert it anew",
            ) from None
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
        SVS, NDPI, MRXS, SCN, tiled TIFF, ...; with a pyramid of any kind, or one level. What OpenSlide cannot read, or
        not rightly, is held whole in memory (4 bytes a pixel): a TIFF without tiles, a PNG or a JPEG; of a TIFF also
        16 bits a channel, planes of red, green and blue, a full-scale image that is not the first page, and an
        Orientation tag, by which it is turned. Alpha shows white through, unless it is 0 throughout: then it is
        ignored.
    mpp
        Microns per pixel of level 0, both ways; None reads them from the file. Where given, what the file says
        does not count.

    Raises
    ------
    FileNotFoundError
        For a file that is not there.
    SlideError
        For a file that cannot be read, declares more pixels than its bytes or memory can hold, or whose largest
        image is not one in RGB; without a plausible resolution, with pixels more than 10 % longer one way than the
        other, or coarser than 1 um/px. Coarser than 0.5 um/px only warns: tiles are blown up.

    Examples
    --------
    A file that does not say how large its pixels are has to be told:

    >>> from PIL import Image
    >>> import peka_lite as pk
    >>> Image.new("RGB", (900, 500), (200, 120, 180)).save("slide.png")
    >>> pk.data.open_slide("slide.png")  # doctest: +ELLIPSIS
    Traceback (most recent call last):
        ...
    peka_lite.data.wsi.ResolutionError: slide.png: it does not say its resolution. Give the microns per pixel ...
    >>> pk.data.open_slide("slide.png", mpp=0.5)
    WholeSlide slide.png: 900 x 500 px at 0.5 um/px, 1 level(s)
    """
    import openslide

    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: {'a folder' if path.is_dir() else 'no such file'}; give a whole-slide image")
    again, handle, properties, why, orientation = functools.partial(openslide.OpenSlide, path), None, {}, "", 1
    try:
        check_tags(path)
        files = slide_files(path)
        try:
            handle = again()
            properties = dict(handle.properties)
        except openslide.OpenSlideError as error:
            why = f"OpenSlide cannot read it ({error}), nor can Pillow or tifffile"
        if handle is not None:
            check_slide(handle, path, files)
        if handle is None or properties.get("openslide.vendor") in TIFFS:
            picture = read_picture(path, handle)
            if picture is not None:
                again = functools.partial(openslide.ImageSlide, picture.image)
                handle, properties, orientation = again(), picture.properties, picture.orientation
    except PictureError as error:
        raise SlideError(path, error.what, error.fix) from None
    except MemoryError:
        raise SlideError(path, "it does not fit into memory", f"Is it damaged? {AGAIN}") from None
    except (OSError, SyntaxError, ValueError) as error:
        raise SlideError(path, why or f"its full scale cannot be read ({error})", AGAIN) from None
    size, levels = handle.dimensions, tuple(zip(handle.level_dimensions, handle.level_downsamples, strict=True))
    resolution = _resolution(path, properties, mpp)
    if max(resolution) > TILE_MPP * NEAR:
        coarse = f"level 0 has {max(resolution):.3g} um/px, coarser than the {TILE_MPP} um/px of tiles"
        if max(resolution) > COARSEST * NEAR:
            raise SlideError(path, coarse, f"Give a scan of at most {COARSEST} um/px; if the file errs, give --mpp")
        warnings.warn(f"{path}: {coarse}; they are blown up, and predictions may suffer", stacklevel=2)
    stat = path.stat()
    parts = (stat.st_size, stat.st_mtime_ns, properties.get("openslide.quickhash-1"))
    return WholeSlide(
        path=path,
        mpp=resolution,
        size=size,
        levels=tuple((*_ratio(size, dimensions), factor) for dimensions, factor in levels),
        fingerprint=hashlib.sha256(repr(parts).encode()).hexdigest()[:16],
        orientation=orientation,
        _open=again,
        _idle=[handle],
    )


def _resolution(path: Path, properties: dict, mpp: float | None) -> tuple[float, float]:
    """Return um/px (x, y): as given, as OpenSlide knows it, or from the TIFF's tags."""
    low, high = PLAUSIBLE
    if mpp is not None:
        if not low <= mpp <= high:
            raise ValueError(f"mpp is microns per pixel, from {low} to {high:g}, not {mpp}")
        return float(mpp), float(mpp)
    unit = PER_UNIT.get(properties.get("tiff.ResolutionUnit", ""), math.nan)
    found = []
    for axis in "xy":
        own = _number(properties.get(f"openslide.mpp-{axis}"))
        found.append(own or unit / (_number(properties.get(f"tiff.{axis.upper()}Resolution")) or math.nan))
    fix = "Give the microns per pixel of its finest level with --mpp (mpp= in Python)"
    if any(math.isnan(value) for value in found):
        raise ResolutionError(path, "it does not say its resolution", fix)
    says = f"{found[0]:.4g} x {found[1]:.4g} um/px"
    if not all(low <= value <= high for value in found):
        raise ResolutionError(path, f"its resolution of {says} is not plausible", fix)
    if max(found) > SQUARE * min(found):
        raise ResolutionError(
            path, f"its pixels are not square ({says})", f"{fix}, or scale the image to square pixels"
        )
    return found[0], found[1]


def _number(text: str | None) -> float | None:
    try:
        return float(text or 0) or None
    except ValueError:
        return None


def _ratio(size: tuple[int, int], level: tuple[int, int]) -> tuple[float, float]:
    """Return how many pixels of level 0 one of a level spans (x, y).

    A level's size is whole: 4567 px shrink fourfold to 1141 or 1142. The factor is still four where that explains it.
    """
    whole = max(1, round(size[0] / level[0]))
    if all(n in (side // whole, -(-side // whole)) for side, n in zip(size, level, strict=True)):
        return float(whole), float(whole)
    return size[0] / level[0], size[1] / level[1]
