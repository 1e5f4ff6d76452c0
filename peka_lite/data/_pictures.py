"""Read the one full-scale RGB image of a file, from any layout; other files raise an error with what they contain."""

from __future__ import annotations

import contextlib
import io
import math
import mmap
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING
from xml.etree import ElementTree

import numpy as np
from PIL import Image

from peka_lite.data._picture_limits import MAX_PAGES, PictureError, check_in_memory

if TYPE_CHECKING:
    import openslide
    from tifffile import TiffFile, TiffPage, TiffPageSeries

MODES = ("RGB", "RGBA", "P", "PA", "CMYK", "YCbCr")  # Pillow's 8-bit color modes
RGB, YCBCR = 2, 6  # TIFF's PhotometricInterpretation
BLACK_IS_ZERO = 1  # grayscale
GRAYS = (0, BLACK_IS_ZERO, 4)  # the first is inverted grayscale, the last a mask
JPEG = (6, 7)  # TIFF's Compression; its decoder converts YCbCr to RGB
UNSPECIFIED, PREMULTIPLIED = 0, 1  # TIFF's ExtraSamples: no alpha; alpha that the colors are multiplied by
UNITS = {2: "inch", 3: "centimeter"}  # TIFF's ResolutionUnit
DEPTHS = (8, 10, 12, 14, 16)  # bits that cameras use of 16
ROWS = 512  # converted at once, to limit memory
BLOCK = 2048  # side of a block that is read at once, in pixels
MAX_SCANS = 200  # of a progressive JPEG; programs write about 10
FORMATS = ("PNG", "JPEG", "JPEG2000", "TIFF", "BMP", "GIF", "WEBP", "PPM")  # not EPS, which runs a program
SPECIAL_TIFFS = ("lsm", "mmstack", "ndtiff", "fluoview", "stk", "sis", "avs", "eer", "scanimage", "nih", "mdgel")
NUMBERED = r"(c|ch|channel|band|plane|sample|image)?[\s:_/#-]*(\d+[\s:_/#-]*)*"  # channel names without a color
TRANSPOSE = {
    2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}  # fmt: skip


@dataclass(frozen=True)
class Picture:
    """Hold an image, RGB and upright, the file's Orientation tag (applied; 1: as stored), and its resolution."""

    image: Image.Image
    orientation: int
    properties: dict  # names as OpenSlide's


def read_picture(path: Path, slide: openslide.OpenSlide | None) -> Picture | None:
    """Read the largest image of a file into memory; return None if `slide`, the file in OpenSlide, reads it correctly.

    A file with several images of that size, or whose image is not RGB or has an unknown range of values, is a
    `PictureError`; one that cannot be decoded an OSError, SyntaxError or ValueError.
    """
    import tifffile

    try:
        # Readers of fluorescence formats trust image counts and names of other files in the metadata: switch them off.
        flags = {f"is_{kind}": False for kind in SPECIAL_TIFFS if kind in tifffile.TIFF.FILE_FLAGS}
        tiff = tifffile.TiffFile(path, _multifile=False, **flags)
    except Exception:  # tifffile raises many types for other files
        return _read_plain(path) if slide is None else None
    with tiff:
        _check_ome(tiff)
        try:
            series = list(tiff.series)
        except Exception:
            series = []
        if not series:
            return _read_plain(path) if slide is None else None
        try:
            chosen, order = _choose_image(series, tiff)
        except PictureError:
            if slide is None and len(tiff.pages) == 1:
                return _read_plain(path)  # Pillow reads more depths, and its errors name the mode
            raise
        page = chosen.keyframe
        orientation = _code(page.tags.valueof(274, 1))
        extra = [int(kind) for kind in page.extrasamples]
        first = page.offset == tiff.pages.first.offset  # page.index restarts in SubIFDs
        plain = order is None and page.dtype == np.uint8 and _depth(page) == 8
        if slide is not None and first and plain and orientation not in TRANSPOSE and slide.dimensions == _size(chosen):
            has_alpha = extra and extra[0] != UNSPECIFIED
            if not extra or (has_alpha and not _is_transparent(slide)):
                return None
        if first and plain and not extra:
            try:
                return _read_plain(path)
            except (OSError, SyntaxError):  # compression unknown to Pillow
                pass
        photometric = _code(page.photometric)
        in_rgb = photometric == RGB or (photometric == YCBCR and _code(page.compression) in JPEG)
        array = _channels_last(chosen, path) if order or in_rgb else np.empty(0)  # (h, w, channels)
        if not array.size or array.shape[-1] < 3:
            raise PictureError(f"its largest image is not plain RGB ({_describe(chosen)})")
        has_alpha = order is None and extra and extra[0] != UNSPECIFIED and array.shape[-1] > 3
        alpha = array[..., 3] if has_alpha else None
        if alpha is not None and not alpha.any():  # an unused channel: the image would be all white
            alpha = None
        colors = array[..., list(order or (0, 1, 2))]
        image = Image.fromarray(_to_8_bits(colors, alpha, _depth(page), premultiplied=extra[:1] == [PREMULTIPLIED]))
        properties = {"tiff.ResolutionUnit": UNITS.get(_code(page.tags.valueof(296, 2)), "")}
        for axis, tag in (("X", 282), ("Y", 283)):
            dots = page.tags.valueof(tag)
            if isinstance(dots, tuple) and len(dots) == 2 and dots[1]:
                properties[f"tiff.{axis}Resolution"] = str(dots[0] / dots[1])
        if first and slide is not None:
            properties |= slide.properties
        return _make_picture(image, orientation, properties)


def _read_plain(path: Path) -> Picture:
    """Read an image with Pillow."""
    try:
        with _allow_any_size(), Image.open(path, formats=FORMATS) as image:
            if image.mode not in MODES:
                raise PictureError(f"its pixels are of mode {image.mode}, not 8-bit colors")
            declared = 4 * image.width * image.height
            copies = 1 if image.mode == "RGB" and image.format != "JPEG2000" else 4
            check_in_memory(declared, path, needed=copies * declared)
            if "progressive" in image.info:  # each scan decodes the whole image again
                with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                    if (scans := sum(1 for _ in re.finditer(b"\xff\xda", data))) > MAX_SCANS:
                        raise PictureError(f"it is a progressive JPEG of {scans:,} scans", "Save it as a plain JPEG")
            orientation = image.getexif().get(274, 1)
            dots = dict(zip("XY", image.info.get("dpi", ()), strict=False))
            image.load()
            remaining = image.getexif().get(274, 1)  # Pillow applies a TIFF's orientation itself
            rgb = image
            if image.mode in ("RGBA", "PA") or "transparency" in image.info:
                rgb = image.convert("RGBA")
                alpha = rgb.getchannel("A")
                if alpha.getextrema()[1]:  # an alpha channel of zeros is ignored, as in `read_picture`
                    white = Image.new("RGB", rgb.size, "white")
                    white.paste(rgb, mask=alpha)
                    rgb = white
            rgb = rgb.convert("RGB") if rgb.mode != "RGB" else rgb
    except (PictureError, MemoryError, OSError):
        raise
    except Exception as error:  # decoders raise various types
        raise OSError(f"{type(error).__name__}: {error}") from None
    properties = {f"tiff.{axis}Resolution": str(value) for axis, value in dots.items()}
    return _make_picture(rgb, orientation, properties | {"tiff.ResolutionUnit": "inch"}, remaining=remaining)


@contextlib.contextmanager
def _allow_any_size() -> Iterator[None]:
    """Switch off Pillow's size limit, which slides exceed."""
    limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
    try:
        yield
    finally:
        Image.MAX_IMAGE_PIXELS = limit


def _choose_image(series: list[TiffPageSeries], tiff: TiffFile) -> tuple[TiffPageSeries, tuple[int, ...] | None]:
    """Return the largest image and, if its channels are separate, the indices of red, green and blue."""
    n_pixels = max(np.prod(_size(s)) for s in series)
    largest = [s for s in series if np.prod(_size(s)) == n_pixels]
    width, height = _size(largest[0])
    flat = [s for s in largest if all(n == 1 or axis in "YXCS" for axis, n in zip(s.axes, s.shape, strict=True))]
    colored = [s for s in flat if _code(s.keyframe.photometric) not in GRAYS and _count(s, "C") == 1]
    several = len(colored) > 1 or any(_code(s.keyframe.photometric) not in GRAYS for s in largest if s not in colored)
    if several or (not colored and len(largest) > 1):
        images = "; ".join(_describe(s) for s in largest)
        raise PictureError(
            f"it holds more than one picture of {width} x {height} px, its largest size ({images})",
            "Give a file with only the H&E image, in RGB",
        )
    if colored:
        return colored[0], None
    gray = largest[0]
    names = _channel_names(tiff, series.index(gray))
    separate = flat and _code(gray.keyframe.photometric) == BLACK_IS_ZERO
    order = _find_rgb(names, _count(gray, "C") * _count(gray, "S")) if separate else None
    if order is None:
        named = f", channels {', '.join(names)}" if any(names) else ""
        raise PictureError(f"its largest image, {width} x {height} px, is not a color image ({_describe(gray)}{named})")
    return gray, order


def _find_rgb(names: list[str], n: int) -> tuple[int, ...] | None:
    """Return the indices of red, green and blue among `n` channels: by name, or in order if no name is informative."""
    known = [name.strip().lower() for name in names]
    for colors in (("red", "green", "blue"), ("r", "g", "b")):
        if all(known.count(color) == 1 for color in colors) and len(known) == n:
            return tuple(known.index(color) for color in colors)
    return (0, 1, 2) if n == 3 and all(re.fullmatch(NUMBERED, name) for name in known) else None


def _check_ome(tiff: TiffFile) -> None:
    """Check that OME-XML does not declare more planes than a TIFF can have."""
    if not tiff.is_ome:
        return
    try:
        root = ElementTree.fromstring(tiff.ome_metadata or "")
    except ElementTree.ParseError:
        return
    planes = 0.0
    for part in root.iter():
        numbers = {name: _parse_size(value) for name, value in part.attrib.items()}
        if part.tag.endswith("Pixels"):
            planes += numbers.get("SizeZ", 1) * numbers.get("SizeC", 1) * numbers.get("SizeT", 1)
        elif part.tag.endswith("TiffData"):
            planes += max(numbers.values(), default=0)
        elif "Start" in numbers:  # a dimension other than Z, C or T
            planes += (numbers["Start"] + numbers.get("End", 0)) / (numbers.get("Step", 1) or 1e-9)
    if not planes <= 4 * MAX_PAGES:
        raise PictureError("its OME-XML declares more planes than a TIFF can have", "Give a file of the H&E image")


def _channel_names(tiff: TiffFile, index: int) -> list[str]:
    """Return the channel names of an image from OME-XML or ImageJ metadata; empty if there are none."""
    if tiff.ome_metadata:
        try:
            images = ElementTree.fromstring(tiff.ome_metadata).findall("{*}Image")
        except ElementTree.ParseError:
            return []
        channels = images[index].findall("{*}Pixels/{*}Channel") if index < len(images) else []
        return [_channel_name(channel) for channel in channels]
    return list((tiff.imagej_metadata or {}).get("Labels", ()))


def _channel_name(channel: ElementTree.Element) -> str:
    """Return a channel's name in OME-XML; its dye or wavelength if the name is only a number."""
    name, wavelength = channel.get("Name", ""), channel.get("EmissionWavelength")
    if not re.fullmatch(NUMBERED, name.strip().lower()):
        return name
    return channel.get("Fluor") or (f"{name} at {wavelength} nm".strip() if wavelength else name)


def _parse_size(text: str) -> float:
    """Return the absolute value of a number in OME-XML; 0 for other text."""
    try:
        return abs(float(text))
    except ValueError:
        return 0.0


def _describe(series: TiffPageSeries) -> str:
    page = series.keyframe
    shape = " x ".join(map(str, series.shape))
    return f"axes {series.axes}, {shape}, {series.dtype}, {getattr(page.photometric, 'name', page.photometric)}"


def _size(series: TiffPageSeries) -> tuple[int, int]:
    return _count(series, "X"), _count(series, "Y")


def _count(series: TiffPageSeries, axis: str) -> int:
    return dict(zip(series.axes, series.shape, strict=True)).get(axis, 1)


def _code(value) -> int:
    """Return the integer of a tag; -1 if it has another type."""
    return int(value) if isinstance(value, (int, np.integer)) else -1


def _depth(page: TiffPage) -> int:
    bits = page.bitspersample
    return max(bits) if isinstance(bits, tuple) else bits


def _channels_last(series: TiffPageSeries, path: Path) -> np.ndarray:
    """Read the finest level as (h, w, channels)."""
    level, axes = series.levels[0], series.axes
    n_bytes = math.prod(level.shape) * level.dtype.itemsize
    check_in_memory(n_bytes, path, needed=n_bytes + 4 * math.prod(_size(series)))
    _check_segments(level, path)
    try:
        array = level.asarray()
    except MemoryError:
        raise
    except Exception as error:  # codecs raise various types
        raise OSError(str(error)) from None
    y, x = axes.index("Y"), axes.index("X")
    array = np.moveaxis(array, (y, x), (0, 1))
    return array.reshape(*array.shape[:2], -1)


def _check_segments(level: TiffPageSeries, path: Path) -> None:
    """Check that the headers of compressed tiles and strips declare no larger images than their page does."""
    import tifffile

    page = level.keyframe
    if page.compression not in tifffile.TIFF.IMAGE_COMPRESSIONS:
        return
    sides = (page.tilewidth, page.tilelength) if page.is_tiled else (page.imagewidth, page.rowsperstrip)
    width, height = map(_code, sides)
    segments = {s for one in level.pages if one for s in zip(one.dataoffsets, one.databytecounts, strict=False)}
    with path.open("rb") as file:
        for offset, n_bytes in segments:
            file.seek(offset)
            try:
                with (
                    _allow_any_size(),
                    Image.open(io.BytesIO(file.read(n_bytes)), formats=("JPEG", "JPEG2000", "PNG", "WEBP")) as image,
                ):
                    size = image.size
            except Exception:  # another codec, or damaged, which decoding reports
                continue
            if math.prod(size) > 4 * width * height:
                raise PictureError(f"it holds {size[0]} x {size[1]} px in a tile of {width} x {height}")


def _to_8_bits(colors: np.ndarray, alpha: np.ndarray | None, depth: int, *, premultiplied: bool) -> np.ndarray:
    """Scale (h, w, 3) colors to uint8, blended with white by `alpha` (h, w)."""
    full = _full_scale(colors, depth)
    if alpha is None and full == 255 and colors.dtype == np.uint8:
        return np.ascontiguousarray(colors)
    opaque = None if alpha is None else _full_scale(alpha, depth)
    image = np.empty(colors.shape, dtype=np.uint8)
    for start in range(0, len(image), ROWS):
        rows = slice(start, start + ROWS)
        part = colors[rows] / np.float32(full)
        if opaque is not None:
            opacity = (alpha[rows] / np.float32(opaque))[..., None]
            part = (part if premultiplied else part * opacity) + 1 - opacity
        image[rows] = np.rint(np.clip(part, 0, 1) * 255)
    return image


def _full_scale(values: np.ndarray, depth: int) -> float:
    """Return the value of full brightness, guessed for floats and for 16-bit files that may use fewer bits."""
    low, high = float(values.min()), float(values.max())
    if values.dtype.kind == "u" and depth <= 16:
        return 2 ** (depth if depth < 16 else next(bits for bits in DEPTHS if high < 2**bits)) - 1
    if values.dtype.kind == "f" and low >= 0 and high <= 255:  # false for NaN
        return 1 if high <= 1 else 255
    raise PictureError(f"its values are {values.dtype} from {low:g} to {high:g}, so the value of white is unknown")


def _is_transparent(slide: openslide.OpenSlide) -> bool:
    """Return whether alpha is 0 in all of the coarsest level."""
    level = slide.level_count - 1
    width, height = slide.level_dimensions[level]
    factor = slide.level_downsamples[level]
    for y in range(0, height, BLOCK):
        for x in range(0, width, BLOCK):
            size = min(BLOCK, width - x), min(BLOCK, height - y)
            if slide.read_region((round(x * factor), round(y * factor)), level, size).getextrema()[3][1]:
                return False
    return True


def _make_picture(image: Image.Image, orientation: int, properties: dict, *, remaining: int | None = None) -> Picture:
    """Apply the orientation `remaining` (default: `orientation`); swap x and y resolution if it swaps the axes."""
    remaining = orientation if remaining is None else remaining
    if orientation in TRANSPOSE and orientation > 4:
        swap = {"x": "y", "y": "x", "X": "Y", "Y": "X"}
        axis = re.compile(r"(?<=tiff\.)[XY](?=Resolution)|(?<=openslide\.mpp-)[xy]")
        properties = {axis.sub(lambda match: swap[match[0]], name): value for name, value in properties.items()}
    image = image.transpose(TRANSPOSE[remaining]) if remaining in TRANSPOSE else image
    return Picture(image, orientation if orientation in TRANSPOSE else 1, properties)
