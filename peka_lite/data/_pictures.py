"""The one picture in RGB at full scale that an image file holds: read rightly, or refused with what was seen."""

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

from peka_lite.data._picture_limits import PAGES, PictureError, check_in_memory

if TYPE_CHECKING:
    import openslide
    from tifffile import TiffFile, TiffPage, TiffPageSeries

MODES = ("RGB", "RGBA", "P", "PA", "CMYK", "YCbCr")  # Pillow's modes with colors of 8 bits
RGB, YCBCR = 2, 6  # TIFF's PhotometricInterpretation
BRIGHT = 1  # gray whose highest value is the brightest
GRAYS = (0, BRIGHT, 4)  # the first has it the other way about, the last is a mask
JPEG = (6, 7)  # TIFF's Compression; its decoder turns YCbCr into RGB
IGNORED, PREMULTIPLIED = 0, 1  # TIFF's ExtraSamples: of no stated meaning; alpha that colors are multiplied by
UNITS = {2: "inch", 3: "centimeter"}  # TIFF's ResolutionUnit
DEPTHS = (8, 10, 12, 14, 16)  # bits that cameras write into 16
ROWS = 512  # converted at once, to spare memory
BLOCK = 2048  # pixels of a side read at once
SCANS = 200  # of a progressive JPEG; programs write about 10
PLAIN = ("PNG", "JPEG", "JPEG2000", "TIFF", "BMP", "GIF", "WEBP", "PPM")  # no EPS, which runs a program
OF_OTHERS = ("lsm", "mmstack", "ndtiff", "fluoview", "stk", "sis", "avs", "eer", "scanimage", "nih", "mdgel")
NUMBERED = r"(c|ch|channel|band|plane|sample|image)?[\s:_/#-]*(\d+[\s:_/#-]*)*"  # names that say nothing of colors
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}  # fmt: skip


@dataclass(frozen=True)
class Picture:
    """A picture in memory.

    Attributes
    ----------
    image
        Of mode RGB, upright.
    orientation
        The file's Orientation tag (1 to 8), by which the picture was turned; 1: as stored.
    properties
        Resolution by the names of OpenSlide's properties.
    """

    image: Image.Image
    orientation: int
    properties: dict


def read_picture(path: Path, slide: openslide.OpenSlide | None) -> Picture | None:
    """Read the largest picture of a file whole; None where `slide`, OpenSlide's view of the file, shows the same.

    Raises
    ------
    PictureError
        For several pictures of that size, channels that are not red, green and blue, and values of unknown range.
    OSError, SyntaxError, ValueError
        For a file that cannot be decoded.
    """
    import tifffile

    try:
        # Formats of fluorescence take numbers of images and names of other files from text in the file.
        others = {f"is_{kind}": False for kind in OF_OTHERS if kind in tifffile.TIFF.FILE_FLAGS}
        tiff = tifffile.TiffFile(path, _multifile=False, **others)
    except Exception:  # of many kinds, where bytes are not a TIFF's
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
            chosen, order = _choose(series, tiff)
        except PictureError:
            if slide is None and len(tiff.pages) == 1:
                return _read_plain(path)  # Pillow reads more depths, and says what it sees
            raise
        page = chosen.keyframe
        orientation = _code(_tag(page, 274, 1))
        extra = [int(kind) for kind in page.extrasamples]
        first = page.offset == tiff.pages.first.offset  # a SubIFD's page has an index of its own
        usual = order is None and page.dtype == np.uint8 and _depth(page) == 8
        if slide is not None and first and usual and orientation not in TURNS and slide.dimensions == _size(chosen):
            alpha = extra and extra[0] != IGNORED
            if not extra or (alpha and not _is_transparent(slide)):
                return None
        if first and usual and not extra:
            try:
                return _read_plain(path)
            except (OSError, SyntaxError):  # of a compression that Pillow does not know
                pass
        colors_are = _code(page.photometric)
        in_rgb = colors_are == RGB or (colors_are == YCBCR and _code(page.compression) in JPEG)
        if order is None and not in_rgb:
            raise PictureError(f"its colors are no plain RGB ({_describe(chosen)})")
        array = _channels_last(chosen, path)  # (h, w, channels)
        if not array.size or array.shape[-1] < 3:
            raise PictureError(f"its colors are no plain RGB ({_describe(chosen)})")
        has_alpha = order is None and extra and extra[0] != IGNORED and array.shape[-1] > 3
        alpha = array[..., 3] if has_alpha else None
        if alpha is not None and not alpha.any():  # nothing of the picture would be seen: it was never filled in
            alpha = None
        colors = array[..., list(order or (0, 1, 2))]
        image = Image.fromarray(_to_8_bits(colors, alpha, _depth(page), premultiplied=extra[:1] == [PREMULTIPLIED]))
        properties = {f"tiff.{axis}Resolution": _tag(page, tag, None) for axis, tag in (("X", 282), ("Y", 283))}
        pairs = {name: value for name, value in properties.items() if isinstance(value, tuple) and len(value) == 2}
        properties = {name: str(above / below) for name, (above, below) in pairs.items() if below}
        properties["tiff.ResolutionUnit"] = UNITS.get(_code(_tag(page, 296, 2)), "")
        if first and slide is not None:
            properties |= slide.properties
        return _upright(image, orientation, properties)


def _read_plain(path: Path) -> Picture:
    """Read an image with Pillow."""
    try:
        with _of_any_size(), Image.open(path, formats=PLAIN) as image:
            if image.mode not in MODES:
                raise PictureError(f"its pixels are of mode {image.mode}, not 8-bit colors")
            declared = 4 * image.width * image.height
            copies = 1 if image.mode == "RGB" and image.format != "JPEG2000" else 4
            check_in_memory(declared, path, needed=copies * declared)
            if "progressive" in image.info:  # each scan goes over the whole image once more
                with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                    if (scans := sum(1 for _ in re.finditer(b"\xff\xda", data))) > SCANS:
                        raise PictureError(f"it is a progressive JPEG of {scans:,} scans", "Save it as a plain JPEG")
            orientation = image.getexif().get(274, 1)
            dots = dict(zip("XY", image.info.get("dpi", ()), strict=False))
            image.load()
            left = image.getexif().get(274, 1)  # Pillow turns a TIFF itself
            whole = image
            if image.mode in ("RGBA", "PA") or "transparency" in image.info:
                whole = image.convert("RGBA")
                alpha = whole.getchannel("A")
                if alpha.getextrema()[1]:  # as in `read_picture`
                    white = Image.new("RGB", whole.size, "white")
                    white.paste(whole, mask=alpha)
                    whole = white
            whole = whole.convert("RGB") if whole.mode != "RGB" else whole
    except (PictureError, MemoryError, OSError):
        raise
    except Exception as error:  # each decoder has errors of its own
        raise OSError(f"{type(error).__name__}: {error}") from None
    properties = {f"tiff.{axis}Resolution": str(value) for axis, value in dots.items()}
    return _upright(whole, orientation, properties | {"tiff.ResolutionUnit": "inch"}, left=left)


@contextlib.contextmanager
def _of_any_size() -> Iterator[None]:
    """Let Pillow open images larger than photographs, as microscopes' are."""
    most, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
    try:
        yield
    finally:
        Image.MAX_IMAGE_PIXELS = most


def _choose(series: list[TiffPageSeries], tiff: TiffFile) -> tuple[TiffPageSeries, tuple[int, ...] | None]:
    """Return the largest picture and, where its channels stand for themselves, which are red, green and blue."""
    most = max(np.prod(_size(s)) for s in series)
    largest = [s for s in series if np.prod(_size(s)) == most]
    width, height = _size(largest[0])
    flat = [s for s in largest if all(n == 1 or axis in "YXCS" for axis, n in zip(s.axes, s.shape, strict=True))]
    colored = [s for s in flat if _code(s.keyframe.photometric) not in GRAYS and _count(s, "C") == 1]
    several = len(colored) > 1 or any(_code(s.keyframe.photometric) not in GRAYS for s in largest if s not in colored)
    if several or (not colored and len(largest) > 1):
        seen = "; ".join(_describe(s) for s in largest)
        raise PictureError(
            f"it holds more than one picture of {width} x {height} px, its largest size ({seen})",
            "Give a file with the one H&E image that is meant, in RGB",
        )
    if colored:
        return colored[0], None
    only = largest[0]
    names = _channel_names(tiff, series.index(only))
    bright = flat and _code(only.keyframe.photometric) == BRIGHT
    order = _order(names, _count(only, "C") * _count(only, "S")) if bright else None
    if order is None:
        named = f", channels {', '.join(names)}" if any(names) else ""
        raise PictureError(f"its largest picture, {width} x {height} px, is not in colors ({_describe(only)}{named})")
    return only, order


def _order(names: list[str], n: int) -> tuple[int, ...] | None:
    """Return the places of red, green and blue among `n` channels: by their names, or as they stand where none says."""
    known = [name.strip().lower() for name in names]
    for colors in (("red", "green", "blue"), ("r", "g", "b")):
        if all(known.count(color) == 1 for color in colors) and len(known) == n:
            return tuple(known.index(color) for color in colors)
    return (0, 1, 2) if n == 3 and all(re.fullmatch(NUMBERED, name) for name in known) else None


def _check_ome(tiff: TiffFile) -> None:
    """Refuse OME-XML that names other files for this one, or more planes than there are pages."""
    if not tiff.is_ome:
        return
    try:
        root = ElementTree.fromstring(tiff.ome_metadata or "")
    except ElementTree.ParseError:
        return
    planes = 0.0
    for part in root.iter():
        has = {name: _number(value) for name, value in part.attrib.items()}
        if part.tag.endswith("Pixels"):
            planes += has.get("SizeZ", 1) * has.get("SizeC", 1) * has.get("SizeT", 1)
        elif part.tag.endswith("TiffData"):
            planes += max(has.values(), default=0)
        elif "Start" in has:  # of a dimension that is not Z, C or T
            planes += (has["Start"] + has.get("End", 0)) / (has.get("Step", 1) or 1e-9)
    if not planes <= 4 * PAGES:
        raise PictureError("its OME-XML names more planes than a TIFF holds", "Give a file with the one H&E image")


def _channel_names(tiff: TiffFile, index: int) -> list[str]:
    """Return what OME-XML or ImageJ call the channels of a picture; empty where they do not."""
    if tiff.ome_metadata:
        try:
            images = ElementTree.fromstring(tiff.ome_metadata).findall("{*}Image")
        except ElementTree.ParseError:
            return []
        channels = images[index].findall("{*}Pixels/{*}Channel") if index < len(images) else []
        return [_channel_name(channel) for channel in channels]
    return list((tiff.imagej_metadata or {}).get("Labels", ()))


def _channel_name(channel: ElementTree.Element) -> str:
    """Return what OME-XML calls a channel: by its dye or wavelength where its name says nothing."""
    name, light = channel.get("Name", ""), channel.get("EmissionWavelength")
    if not re.fullmatch(NUMBERED, name.strip().lower()):
        return name
    return channel.get("Fluor") or (f"{name} at {light} nm".strip() if light else name)


def _number(text: str) -> float:
    """Return the size of a number in OME-XML; 0 for any other text."""
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


def _tag(page: TiffPage, code: int, default):
    return page.tags.valueof(code, default)


def _code(value) -> int:
    """Return what a tag of one whole number says; -1 where it holds something else."""
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
    except Exception as error:  # each codec has errors of its own
        raise OSError(str(error)) from None
    y, x = axes.index("Y"), axes.index("X")
    array = np.moveaxis(array, (y, x), (0, 1))
    return array.reshape(*array.shape[:2], -1)


def _check_segments(level: TiffPageSeries, path: Path) -> None:
    """Refuse tiles and strips that are images of their own, of more pixels than their page gives them."""
    import tifffile

    page = level.keyframe
    if page.compression not in tifffile.TIFF.IMAGE_COMPRESSIONS:
        return
    sides = (page.tilewidth, page.tilelength) if page.is_tiled else (page.imagewidth, page.rowsperstrip)
    width, height = map(_code, sides)
    places = {place for one in level.pages if one for place in zip(one.dataoffsets, one.databytecounts, strict=False)}
    with path.open("rb") as file:
        for offset, n_bytes in places:
            file.seek(offset)
            try:
                with (
                    _of_any_size(),
                    Image.open(io.BytesIO(file.read(n_bytes)), formats=("JPEG", "JPEG2000", "PNG", "WEBP")) as image,
                ):
                    own = image.size
            except Exception:  # of another codec, or damaged: then decoding says so
                continue
            if math.prod(own) > 4 * width * height:
                raise PictureError(f"it holds {own[0]} x {own[1]} px in a tile of {width} x {height}")


def _to_8_bits(colors: np.ndarray, alpha: np.ndarray | None, depth: int, *, premultiplied: bool) -> np.ndarray:
    """Scale (h, w, 3) colors to uint8, over white where `alpha` (h, w) lets it through."""
    full = _full_scale(colors, depth)
    if alpha is None and full == 255 and colors.dtype == np.uint8:
        return np.ascontiguousarray(colors)
    opaque = None if alpha is None else _full_scale(alpha, depth)
    image = np.empty(colors.shape, dtype=np.uint8)
    for start in range(0, len(image), ROWS):
        rows = slice(start, start + ROWS)
        part = colors[rows] / np.float32(full)
        if opaque is not None:
            cover = (alpha[rows] / np.float32(opaque))[..., None]
            part = (part if premultiplied else part * cover) + 1 - cover
        image[rows] = np.rint(np.clip(part, 0, 1) * 255)
    return image


def _full_scale(values: np.ndarray, depth: int) -> float:
    """Return the value that stands for the brightest: of 16 bits often fewer are used, and of floats no type says."""
    low, high = float(values.min()), float(values.max())
    if values.dtype.kind == "u" and depth <= 16:
        return 2 ** (depth if depth < 16 else next(bits for bits in DEPTHS if high < 2**bits)) - 1
    if values.dtype.kind == "f" and low >= 0 and high <= 255:  # false for NaN
        return 1 if high <= 1 else 255
    raise PictureError(f"its values are {values.dtype} from {low:g} to {high:g}, of which nothing says what is white")


def _is_transparent(slide: openslide.OpenSlide) -> bool:
    """Tell whether alpha is 0 throughout the coarsest level."""
    level = slide.level_count - 1
    width, height = slide.level_dimensions[level]
    factor = slide.level_downsamples[level]
    for y in range(0, height, BLOCK):
        for x in range(0, width, BLOCK):
            size = min(BLOCK, width - x), min(BLOCK, height - y)
            if slide.read_region((round(x * factor), round(y * factor)), level, size).getextrema()[3][1]:
                return False
    return True


def _upright(image: Image.Image, orientation: int, properties: dict, *, left: int | None = None) -> Picture:
    """Turn an image as `left` says, by default its orientation; where rows become columns, so do their resolutions."""
    left = orientation if left is None else left
    if orientation in TURNS and orientation > 4:
        swap = {"x": "y", "y": "x", "X": "Y", "Y": "X"}
        axis = re.compile(r"(?<=tiff\.)[XY](?=Resolution)|(?<=openslide\.mpp-)[xy]")
        properties = {axis.sub(lambda found: swap[found[0]], name): value for name, value in properties.items()}
    image = image.transpose(TURNS[left]) if left in TURNS else image
    return Picture(image, orientation if orientation in TURNS else 1, properties)
