"""Recognize the type of a file by its content, and read small text files."""

from __future__ import annotations

import gzip
import html
import io
import json
import pickletools
import re
import zipfile
import zlib
from collections.abc import Collection
from pathlib import Path

HEAD = 2**16  # bytes that are inspected
LONGEST = 2**24  # most bytes of a text file that is read; a gene list takes about a megabyte
_PAGE = re.compile(
    r"\s*(<!--.*?-->\s*|<\?xml.*?\?>\s*)*<(!doctype\s+html|html|head|body|meta|title|script)\b", re.I | re.S
)
_POINTER = re.compile(r"version https://git-lfs\.github\.com/spec/.*?^size (\d+)$", re.M | re.S)
_BOMS = ((b"\xef\xbb\xbf", "utf-8-sig"), (b"\xff\xfe", "utf-16"), (b"\xfe\xff", "utf-16"))
_MAGIC = (
    (b"\x89HDF\r\n\x1a\n", "hdf5", "an HDF5 file"),
    (b"\x93NUMPY", "numpy", "a NumPy file (.npy)"),
    (b"\x1f\x8b", "packed", "compressed by gzip"),
    (b"BZh", "packed", "compressed by bzip2"),
    (b"\xfd7zXZ\x00", "packed", "compressed by xz"),
    (b"\x28\xb5\x2f\xfd", "packed", "compressed by zstd"),
    (b"7z\xbc\xaf\x27\x1c", "packed", "a 7-Zip archive"),
    (b"Rar!", "packed", "a RAR archive"),
    (b"%PDF-", "picture", "a PDF document"),
    (b"\x89PNG", "picture", "a PNG image"),
    (b"\xff\xd8\xff", "picture", "a JPEG image"),
    (b"II*\x00", "picture", "a TIFF image"),
    (b"MM\x00*", "picture", "a TIFF image"),
)


def file_kind(path: Path) -> tuple[str, str, str]:
    """Return a file's kind, its description, and the fix if another kind is expected.

    Kinds are empty, page, pointer, text, torch (a zip of torch.save), torchscript, pickle (torch.save before PyTorch
    1.6 too), safetensors, hdf5, numpy, zip, cut (a zip without its end), packed, picture and unknown.
    """
    with path.open("rb") as file:
        head = file.read(HEAD)
    text = _text(head)
    if not head:
        return "empty", "empty (0 bytes)", "fetch it again"
    if text is not None and (pointer := _POINTER.match(text)):
        fix = "run `git lfs pull` in its clone, or download the file itself"
        return "pointer", f"a Git LFS pointer to a file of {int(pointer[1]):,} bytes", fix
    if text is not None and _PAGE.match(text):
        title = re.search(r"<title[^>]*>(.*?)</title", text, re.I | re.S)
        named = f" with the title {' '.join(html.unescape(title[1]).split())[:60]!r}" if title else ""
        fix = "log in on its website, then download the file itself"
        return "page", f"a web page (HTML){named}, such as a log-in or error page saved under this name", fix
    if head.startswith(b"PK\x03\x04"):
        return _zip_kind(path)
    if head[8:9] == b"{" and 2 <= int.from_bytes(head[:8], "little") < 10**8:
        return "safetensors", "a safetensors file", "use it as weights, with the suffix .safetensors"
    if re.match(rb"\x80[\x02-\x05]", head) or (text is not None and _is_pickle(head)):
        return "pickle", "a pickle", "save it with torch.save in the code that created it"
    for magic, kind, words in _MAGIC:
        if head.startswith(magic):
            return kind, words, "unpack it first" if kind == "packed" else "give the right file"
    if head[257:262] == b"ustar":
        return "packed", "a tar archive", "unpack it first"
    if text is not None:
        return "text", "text", "give the right file"
    return "unknown", "of an unknown kind", "fetch it again"


def describe_mismatch(path: Path, expected: Collection[str]) -> str | None:
    """Describe a file that is of none of the expected kinds, with the fix; None if it may be one of them."""
    if not path.is_file():
        return None
    kind, words, fix = file_kind(path)
    return None if kind in expected or kind == "unknown" else f"it is {words}; {fix}"


def read_text(path: Path, *, longest: int = LONGEST) -> str:
    """Read a UTF-8 text file of at most `longest` bytes, decompressing ``.gz``; line ends are unchanged."""
    try:
        return read_bytes(path, longest=longest).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: is not UTF-8 text ({error})") from None


def read_bytes(path: Path, *, longest: int = LONGEST) -> bytes:
    """Read a file of at most `longest` bytes, as `read_text` does."""
    if not path.is_file():  # reading a named pipe would never end
        raise FileNotFoundError(f"{path}: no such file")
    if (size := path.stat().st_size) > longest:
        raise ValueError(f"{path}: has {size:,} bytes, more than are read (at most {longest:,})")
    if path.suffix != ".gz":
        return path.read_bytes()
    try:
        with gzip.open(path) as file:
            data = file.read(longest + 1)
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{path}: cannot be decompressed ({error})") from None
    if len(data) > longest:
        raise ValueError(f"{path}: unpacks to more than is read (at most {longest:,} bytes)")
    return data


def parse_json(text: str):
    r"""Parse JSON; lone surrogates and NUL, which files and terminals cannot take, become U+FFFD."""
    try:
        value = json.loads(text)
        return _storable(value) if "\\u" in text else value
    except RecursionError:
        raise ValueError("its values are nested too deeply") from None


def _storable(value):
    if isinstance(value, str):
        return value.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace").replace("\0", "\ufffd")
    if isinstance(value, list):
        return [_storable(one) for one in value]
    return {_storable(k): _storable(v) for k, v in value.items()} if isinstance(value, dict) else value


def _text(head: bytes) -> str | None:
    encoding = next((name for bom, name in _BOMS if head.startswith(bom)), "utf-8")
    end = max(head.rfind(b"\n"), len(head) - 4) if len(head) == HEAD else len(head)  # a character may be split
    try:
        text = head[:end].decode(encoding)
    except UnicodeDecodeError:
        return None
    return None if re.search(r"[\x00-\x08\x0e-\x1a\x1c-\x1f]", text) else text


def _zip_kind(path: Path) -> tuple[str, str, str]:
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError):
        size = f"{path.stat().st_size:,} bytes"
        return "cut", f"truncated or damaged: it starts like a PyTorch file and has no end ({size})", "fetch it again"
    parts = {name.rpartition("/")[2] for name in names}
    if "constants.pkl" in parts or any("/code/" in f"/{name}" for name in names):
        fix = "load it in the code that created it and save its state_dict() with torch.save"
        return "torchscript", "a TorchScript archive (code and weights)", fix
    if "data.pkl" in parts:
        return "torch", "a torch.save file", "give the right file"
    entries = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
    return "zip", f"a zip archive of {entries or 'no files'}", "unpack it and give the right file"


def _is_pickle(head: bytes) -> bool:
    """Return whether text is a pickle of protocol 0: only opcodes, at least one of which builds a value."""
    try:
        return len({op.name for op, *_ in pickletools.genops(io.BytesIO(head))} - {"STOP", "MARK", "NONE"}) > 0
    except Exception:  # other text raises many kinds of errors
        return False
