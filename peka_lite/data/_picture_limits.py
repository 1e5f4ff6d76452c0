"""Limits on what a received picture declares, checked before a reader follows it."""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

if TYPE_CHECKING:
    import openslide

WHOLE = 2**30  # bytes that a file of any size may take in memory at once: 16,384 x 16,384 px
DENSEST = 500  # bytes in memory for one in the file; of glass, hard compressed, there are about 250
LAID_OUT = 2**28  # pixels that a slide of any size may lay out in tiles
SPARSEST = 4096  # pixels in tiles for a byte in the file: one entry of a tile of 256 x 256 px takes 16
PAGES = 10_000  # of a TIFF
LARGEST_TAG = 2**24  # bytes of a description
LARGEST_TABLE = 2**28  # bytes of the places of tiles
KINDS = {
    1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4, 16: 8, 17: 8, 18: 8,
}  # TIFF's types, and the bytes of a value  # fmt: skip
WHOLE_NUMBERS = {1: "B", 3: "H", 4: "I", 13: "I", 16: "Q", 18: "Q"}
SUB_IFDS, TILE_WIDTH, TILE_LENGTH, BITS, SAMPLES = 330, 322, 323, 258, 277  # tags
BYTE_COUNTS = (279, 325)
NAMED_FILE = rb"^[ \t]*(?:ImageFile[^=\n]*|MapFile|OptimisationFile|MacroImage|INDEXFILE|FILE_\d+)[ \t]*=([^\r\n]*)"
IN_XML = (270, 700)  # ImageDescription, XMP
AGAIN = "Copy it again, or convert it with libvips: vips tiffsave IN OUT.tif --tile --pyramid"
FIX = "Give the H&E image at full scale in RGB, with 8 bits a channel"


class PictureError(ValueError):
    """A file that does not hold one picture in RGB; `what` was seen, `fix` would do."""

    def __init__(self, what: str, fix: str = FIX):
        super().__init__(f"{what}. {fix}")
        self.what, self.fix = what, fix


def check_in_memory(declared: int, path: Path, *, needed: int | None = None) -> None:
    """Refuse pixels that are decoded at once where the file cannot hold so many, or memory does not.

    Parameters
    ----------
    declared
        Bytes of the pixels.
    path
        The file.
    needed
        Bytes of memory that decoding takes; None: as many.
    """
    import psutil

    needed, size = declared if needed is None else needed, path.stat().st_size
    if declared > max(WHOLE, DENSEST * size):
        raise PictureError(_cannot_hold(f"{declared / 2**30:.1f} GB of pixels at once", size), AGAIN)
    if needed > (free := psutil.virtual_memory().available):
        raise PictureError(
            f"it is read whole, which takes {needed / 2**30:.1f} GB of memory, and {free / 2**30:.1f} GB are free",
            "Save it as a tiled TIFF: vips tiffsave IN OUT.tif --tile --pyramid",
        )


def check_slide(slide: openslide.OpenSlide, path: Path, files: Sequence[Path]) -> None:
    """Refuse what OpenSlide is to read part by part where its `files` cannot hold so much, or a part is beyond memory.

    A level that has no tiles by OpenSlide's account may be one JPEG, which is decoded at once.
    """
    (width, height), properties = slide.dimensions, slide.properties
    size = sum(file.stat().st_size for file in files)
    if min(width, height) < 1:
        raise PictureError(f"it is {width} x {height} px", AGAIN)
    sparsest = DENSEST // 4 if properties.get("openslide.vendor") == "hamamatsu" else SPARSEST
    if width * height > max(LAID_OUT, sparsest * size):
        raise PictureError(_cannot_hold(f"{width} x {height} px", size), AGAIN)
    for level in range(slide.level_count):
        sides = [properties.get(f"openslide.level[{level}].tile-{side}", "0") for side in ("width", "height")]
        check_in_memory(4 * int(sides[0]) * int(sides[1]), path)


def _cannot_hold(what: str, size: int) -> str:
    return f"it declares {what}, more than is read from a file of {size:,} bytes"


def slide_files(path: Path) -> list[Path]:
    """Return the files of a slide: one, or those beside it that its index names.

    Raises
    ------
    PictureError
        For an index that names a file in another folder, and for what is no file among them.
    """
    with path.open("rb") as file:
        index = file.read(2**20)
    folder, found = path.parent, [path]
    if path.suffix.lower() == ".mrxs":
        folder = path.with_suffix("")
        if (slidedat := folder / "Slidedat.ini").is_file():
            with slidedat.open("rb") as file:
                index = file.read(2**20)
            found.append(slidedat)
            sides = [
                int(side) for side in re.findall(rb"^DIGITIZER_(?:WIDTH|HEIGHT)[ \t]*=[ \t]*(\d{1,18})", index, re.M)
            ]
            check_in_memory(4 * max(sides, default=0) ** 2, path)
    if path.suffix.lower() == ".mrxs" or b"Virtual Microscope Specimen]" in index:
        for name in re.findall(NAMED_FILE, index, re.M):
            plain = name.decode(errors="replace").strip()
            if re.search(r"[/\\]|^\.+$", plain):
                raise PictureError(f"its index names {plain!r}, a file elsewhere", "Copy the slide's files again")
            found += [folder / plain] if plain else []
    elif index[128:132] == b"DICM":
        found = [other for other in folder.iterdir() if not other.is_dir()]  # OpenSlide looks for its series in all
    for other in found:
        if other.exists() and not other.is_file():
            raise PictureError(f"{other.name} beside it is no file", "Copy the slide's files again")
    return [other for other in found if other.is_file()]


def check_tags(path: Path) -> None:
    """Refuse a TIFF whose tags would keep a reader busy without end; other files pass.

    Raises
    ------
    PictureError
        For pages in a circle or more than 10,000, tags larger than the file, tiles beyond memory, and XML with entities
        of its own.
    """
    size, declared = path.stat().st_size, 0
    with path.open("rb") as file:
        if (form := _form(file.read(4), ndpi=path.suffix.lower() == ".ndpi")) is None:
            return
        for page in _pages(file, form, size):
            declared += sum(KINDS.get(kind, 0) * count for kind, count, _ in page.values())
            if declared > 4 * size + LARGEST_TAG:
                raise PictureError("its tags are larger than the file", AGAIN)
            for code in IN_XML:
                if re.search(rb"<!(DOCTYPE|ENTITY)", _value(file, form, page, code)):
                    raise PictureError("its description is XML with entities of its own", AGAIN)
            for code in BYTE_COUNTS:  # OpenSlide asks for so much memory
                if max(_numbers(file, form, page, code), default=0) > size:
                    raise PictureError("it declares a tile or strip larger than the file", AGAIN)
            tile = [_numbers(file, form, page, code)[:1] for code in (TILE_WIDTH, TILE_LENGTH)]
            if all(tile):
                bits = max(_numbers(file, form, page, BITS), default=1)
                samples = max(_numbers(file, form, page, SAMPLES), default=1)
                check_in_memory(tile[0][0] * tile[1][0] * max(4, samples * bits // 8), path)


@dataclass(frozen=True)
class _Form:
    """How a TIFF writes numbers, as struct's formats: tags in a page, one tag, an offset in it, that of a page."""

    n_tags: str
    tag: str
    offset: str
    page: str
    first: int


def _form(head: bytes, *, ndpi: bool) -> _Form | None:
    order = {b"II": "<", b"MM": ">"}.get(head[:2])
    version = struct.unpack(f"{order}H", head[2:])[0] if order and len(head) == 4 else None
    if version == 43:
        return _Form(f"{order}Q", f"{order}HHQ8s", f"{order}Q", f"{order}Q", first=8)
    # Hamamatsu writes 8 bytes into files that are otherwise plain TIFFs.
    page = "Q" if ndpi and order == "<" else "I"
    return _Form(f"{order}H", f"{order}HHI4s", f"{order}I", f"{order}{page}", first=4) if version == 42 else None


def _pages(file: BinaryIO, form: _Form, size: int) -> Iterator[dict[int, tuple[int, int, bytes]]]:
    """Give the tags of each page, of SubIFDs too: code -> (type, count, value or its offset)."""
    file.seek(form.first)
    ahead, seen = [(_unpack(form.page, file), False)], set()
    while ahead:
        at, is_sub = ahead.pop()
        if is_sub and at in seen:
            continue
        if at in seen:
            raise PictureError("its pages lead back to one before, without end", AGAIN)
        if not 0 < at < size:
            continue
        seen.add(at)
        if len(seen) > PAGES:
            raise PictureError(f"it holds more than {PAGES:,} pages", "Give a file with the one H&E image alone")
        file.seek(at)
        count = _unpack(form.n_tags, file)
        if count > 4096:  # no page, as readers see it
            continue
        body = file.read(count * struct.calcsize(form.tag))
        following = _unpack(form.page, file)
        if len(body) < count * struct.calcsize(form.tag):
            continue
        page = {code: rest for code, *rest in struct.iter_unpack(form.tag, body)}
        yield page
        ahead += [(sub, True) for sub in _numbers(file, form, page, SUB_IFDS)]
        ahead.append((following, is_sub))


def _unpack(form: str, file: BinaryIO) -> int:
    raw = file.read(struct.calcsize(form))
    return struct.unpack(form, raw)[0] if len(raw) == struct.calcsize(form) else 0


def _value(file: BinaryIO, form: _Form, page: dict, code: int, *, most: int = LARGEST_TAG) -> bytes:
    """Return the bytes of a tag; none where it is absent or of an unknown type."""
    kind, count, value = page.get(code, (0, 0, b""))
    n_bytes = KINDS.get(kind, 0) * count
    if n_bytes > most:
        raise PictureError(f"its tag {code} has {n_bytes:,} bytes, more than are read", AGAIN)
    if n_bytes <= len(value):
        return value[:n_bytes]
    file.seek(struct.unpack(form.offset, value)[0])
    return file.read(n_bytes)


def _numbers(file: BinaryIO, form: _Form, page: dict, code: int) -> list[int]:
    """Return the whole numbers of a tag; none where it holds something else."""
    kind = page.get(code, (0,))[0]
    if kind not in WHOLE_NUMBERS:
        return []
    raw = _value(file, form, page, code, most=LARGEST_TABLE)
    n = len(raw) // KINDS[kind]
    return list(struct.unpack_from(f"{form.tag[0]}{n}{WHOLE_NUMBERS[kind]}", raw))
