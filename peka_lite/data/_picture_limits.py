"""Check the sizes and file names that an image file declares before a decoder relies on them."""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

if TYPE_CHECKING:
    import openslide

MAX_DECODED = 2**30  # bytes that a file of any size may decode to at once: 16,384 x 16,384 px
MAX_RATIO = 500  # decoded bytes per byte of the file; about 250 for glass at high compression
MAX_TILED = 2**28  # tiled pixels that a file of any size may declare
MAX_TILED_RATIO = 4096  # tiled pixels per byte of the file; the entry of a tile of 256 x 256 px takes 16 bytes
MAX_PAGES = 10_000  # of a TIFF
MAX_TAG = 2**24  # bytes of a description
MAX_TABLE = 2**28  # bytes of a table of tile offsets
TYPE_SIZES = {
    1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4, 16: 8, 17: 8, 18: 8,
}  # TIFF type -> bytes of a value  # fmt: skip
INTEGERS = {1: "B", 3: "H", 4: "I", 13: "I", 16: "Q", 18: "Q"}
SUB_IFDS, TILE_WIDTH, TILE_LENGTH, BITS, SAMPLES = 330, 322, 323, 258, 277  # tags
BYTE_COUNTS = (279, 325)
FILE_KEYS = rb"^[ \t]*(?:ImageFile[^=\n]*|MapFile|OptimisationFile|MacroImage|INDEXFILE|FILE_\d+)[ \t]*=([^\r\n]*)"
IN_XML = (270, 700)  # ImageDescription, XMP
CONVERT = "Copy it again, or convert it with libvips: vips tiffsave IN OUT.tif --tile --pyramid"
FIX = "Give the H&E image at full scale in RGB, with 8 bits per channel"


class PictureError(ValueError):
    """Raised for a file without exactly one RGB image that can be read."""

    def __init__(self, problem: str, fix: str = FIX):
        super().__init__(f"{problem}. {fix}")
        self.problem, self.fix = problem, fix


def check_in_memory(declared: int, path: Path, *, needed: int | None = None) -> None:
    """Check that pixels decoded at once are plausible for the file's size and fit into memory.

    The pixels have `declared` bytes, and decoding takes `needed` bytes of memory (by default as many).
    """
    import psutil

    needed, size = declared if needed is None else needed, path.stat().st_size
    if declared > max(MAX_DECODED, MAX_RATIO * size):
        raise PictureError(_describe_excess(f"{declared / 2**30:.1f} GB of pixels at once", size), CONVERT)
    if needed > (free := psutil.virtual_memory().available):
        raise PictureError(
            f"decoding it takes {needed / 2**30:.1f} GB of memory, but only {free / 2**30:.1f} GB are free",
            "Save it as a tiled TIFF: vips tiffsave IN OUT.tif --tile --pyramid",
        )


def check_slide(slide: openslide.OpenSlide, path: Path, files: Sequence[Path]) -> None:
    """Check that a slide's size is plausible for its `files` and that its tiles fit into memory.

    A level without tile sizes in OpenSlide's properties may be one JPEG, which is decoded at once.
    """
    (width, height), properties = slide.dimensions, slide.properties
    size = sum(file.stat().st_size for file in files)
    if min(width, height) < 1:
        raise PictureError(f"it is {width} x {height} px", CONVERT)
    ratio = MAX_RATIO // 4 if properties.get("openslide.vendor") == "hamamatsu" else MAX_TILED_RATIO
    if width * height > max(MAX_TILED, ratio * size):
        raise PictureError(_describe_excess(f"{width} x {height} px", size), CONVERT)
    for level in range(slide.level_count):
        sides = [properties.get(f"openslide.level[{level}].tile-{side}", "0") for side in ("width", "height")]
        check_in_memory(4 * int(sides[0]) * int(sides[1]), path)


def _describe_excess(amount: str, size: int) -> str:
    return f"it declares {amount}, more than is plausible for a file of {size:,} bytes"


def find_slide_files(path: Path) -> list[Path]:
    """Return the files of a slide: itself, and those of its index, which must be regular files of the same folder."""
    with path.open("rb") as file:
        index = file.read(2**20)
    folder, files = path.parent, [path]
    if path.suffix.lower() == ".mrxs":
        folder = path.with_suffix("")
        if (slidedat := folder / "Slidedat.ini").is_file():
            with slidedat.open("rb") as file:
                index = file.read(2**20)
            files.append(slidedat)
            sides = re.findall(rb"^DIGITIZER_(?:WIDTH|HEIGHT)[ \t]*=[ \t]*(\d{1,18})", index, re.M)
            check_in_memory(4 * max(map(int, sides), default=0) ** 2, path)
    if path.suffix.lower() == ".mrxs" or b"Virtual Microscope Specimen]" in index:
        for name in re.findall(FILE_KEYS, index, re.M):
            name = name.decode(errors="replace").strip()
            if re.search(r"[/\\]|^\.+$", name):
                raise PictureError(f"its index lists {name!r} in another folder", "Copy the slide's files again")
            files += [folder / name] if name else []
    elif index[128:132] == b"DICM":
        files = [file for file in folder.iterdir() if not file.is_dir()]  # OpenSlide opens all to find the series
    for file in files:
        if file.exists() and not file.is_file():
            raise PictureError(f"{file.name} in its folder is not a regular file", "Copy the slide's files again")
    return [file for file in files if file.is_file()]


def check_tags(path: Path) -> None:
    """Check that a TIFF has at most 10,000 pages without a cycle, tags and tiles that fit, and XML without entities."""
    size, declared = path.stat().st_size, 0
    with path.open("rb") as file:
        if (layout := _read_layout(file.read(4), ndpi=path.suffix.lower() == ".ndpi")) is None:
            return
        for page in _iterate_pages(file, layout, size):
            declared += sum(TYPE_SIZES.get(kind, 0) * count for kind, count, _ in page.values())
            if declared > 4 * size + MAX_TAG:
                raise PictureError("its tags are larger than the file", CONVERT)
            for code in IN_XML:
                if re.search(rb"<!(DOCTYPE|ENTITY)", _read_value(file, layout, page, code)):
                    raise PictureError("its description is XML that declares entities", CONVERT)
            for code in BYTE_COUNTS:  # OpenSlide allocates as much memory
                if max(_read_integers(file, layout, page, code), default=0) > size:
                    raise PictureError("it declares a tile or strip larger than the file", CONVERT)
            tile = [_read_integers(file, layout, page, code)[:1] for code in (TILE_WIDTH, TILE_LENGTH)]
            if all(tile):
                bits = max(_read_integers(file, layout, page, BITS), default=1)
                samples = max(_read_integers(file, layout, page, SAMPLES), default=1)
                check_in_memory(tile[0][0] * tile[1][0] * max(4, samples * bits // 8), path)


@dataclass(frozen=True)
class _Layout:
    """A TIFF's `struct` formats of tag count, tag, tag offset and page offset, and where the first page offset is."""

    n_tags: str
    tag: str
    offset: str
    page: str
    first: int


def _read_layout(head: bytes, *, ndpi: bool) -> _Layout | None:
    order = {b"II": "<", b"MM": ">"}.get(head[:2])
    version = struct.unpack(f"{order}H", head[2:])[0] if order and len(head) == 4 else None
    if version == 43:
        return _Layout(f"{order}Q", f"{order}HHQ8s", f"{order}Q", f"{order}Q", first=8)
    # NDPI files are plain TIFFs, but for page offsets of 8 bytes.
    page = "Q" if ndpi and order == "<" else "I"
    return _Layout(f"{order}H", f"{order}HHI4s", f"{order}I", f"{order}{page}", first=4) if version == 42 else None


def _iterate_pages(file: BinaryIO, layout: _Layout, size: int) -> Iterator[dict[int, tuple[int, int, bytes]]]:
    """Yield the tags of each page, including SubIFDs: code -> (type, count, value or its offset)."""
    file.seek(layout.first)
    pending, seen = [(_unpack(layout.page, file), False)], set()
    while pending:
        offset, is_sub = pending.pop()
        if is_sub and offset in seen:
            continue
        if offset in seen:
            raise PictureError("its pages form a cycle", CONVERT)
        if not 0 < offset < size:
            continue
        seen.add(offset)
        if len(seen) > MAX_PAGES:
            raise PictureError(f"it has more than {MAX_PAGES:,} pages", "Give a file with only the H&E image")
        file.seek(offset)
        count = _unpack(layout.n_tags, file)
        if count > 4096:  # readers do not accept it as a page
            continue
        body = file.read(count * struct.calcsize(layout.tag))
        next_page = _unpack(layout.page, file)
        if len(body) < count * struct.calcsize(layout.tag):
            continue
        page = {code: rest for code, *rest in struct.iter_unpack(layout.tag, body)}
        yield page
        pending += [(sub, True) for sub in _read_integers(file, layout, page, SUB_IFDS)]
        pending.append((next_page, is_sub))


def _unpack(fmt: str, file: BinaryIO) -> int:
    raw = file.read(struct.calcsize(fmt))
    return struct.unpack(fmt, raw)[0] if len(raw) == struct.calcsize(fmt) else 0


def _read_value(file: BinaryIO, layout: _Layout, page: dict, code: int, *, limit: int = MAX_TAG) -> bytes:
    """Return the bytes of a tag; none if it is absent or of an unknown type."""
    kind, count, value = page.get(code, (0, 0, b""))
    n_bytes = TYPE_SIZES.get(kind, 0) * count
    if n_bytes > limit:
        raise PictureError(f"its tag {code} has {n_bytes:,} bytes, more than the limit of {limit:,}", CONVERT)
    if n_bytes <= len(value):
        return value[:n_bytes]
    file.seek(struct.unpack(layout.offset, value)[0])
    return file.read(n_bytes)


def _read_integers(file: BinaryIO, layout: _Layout, page: dict, code: int) -> list[int]:
    """Return the integers of a tag; none if it has another type."""
    kind = page.get(code, (0,))[0]
    if kind not in INTEGERS:
        return []
    raw = _read_value(file, layout, page, code, limit=MAX_TABLE)
    n = len(raw) // TYPE_SIZES[kind]
    return list(struct.unpack_from(f"{layout.tag[0]}{n}{INTEGERS[kind]}", raw))
