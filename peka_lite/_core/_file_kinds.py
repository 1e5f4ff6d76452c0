"""What a file really holds, recognized by its bytes and not by its name."""

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

HEAD = 2**16  # bytes that are looked at
LONGEST = 2**24  # bytes of a text file that is read whole; a gene list takes about a megabyte
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
    """Return a file's kind, what it is in words, and the fix where something else is wanted.

    Returns
    -------
    tuple of str
        Kind: ``"empty"``, ``"page"``, ``"pointer"``, ``"text"``, ``"torch"`` (a zip of torch.save), ``"torchscript"``,
        ``"pickle"`` (torch.save before PyTorch 1.6 too), ``"safetensors"``, ``"hdf5"``, ``"numpy"``, ``"zip"``,
        ``"cut"`` (a zip without its end), ``"packed"``, ``"picture"`` or ``"unknown"``.
    """
    with path.open("rb") as file:
        head = file.read(HEAD)
    text = _text(head)
    if not head:
        return "empty", "empty (0 bytes)", "fetch it again"
    if text is not None and (pointer := _POINTER.match(text)):
        fix = "run `git lfs pull` in its clone, or download the file itself"
        return "pointer", f"a Git LFS pointer, which stands for a file of {int(pointer[1]):,} bytes", fix
    if text is not None and _PAGE.match(text):
        title = re.search(r"<title[^>]*>(.*?)</title", text, re.I | re.S)
        named = f" with the title {' '.join(html.unescape(title[1]).split())[:60]!r}" if title else ""
        fix = "log in on the site where it lies, then download the file itself"
        return "page", f"a web page (HTML){named}, such as a log-in or error page saved under this name", fix
    if head.startswith(b"PK\x03\x04"):
        return _zip_kind(path)
    if head[8:9] == b"{" and 2 <= int.from_bytes(head[:8], "little") < 10**8:
        return "safetensors", "a safetensors file", "give it as .safetensors where weights are read"
    if re.match(rb"\x80[\x02-\x05]", head) or (text is not None and _is_pickle(head)):
        return "pickle", "a pickle", "save it with torch.save where it was made"
    for magic, kind, words in _MAGIC:
        if head.startswith(magic):
            return kind, words, "unpack it first" if kind == "packed" else "give the file that is meant"
    if head[257:262] == b"ustar":
        return "packed", "a tar archive", "unpack it first"
    if text is not None:
        return "text", "text", "give the file that is meant"
    return "unknown", "of a kind that is not known", "fetch it again"


def describe_mismatch(path: Path, wanted: Collection[str]) -> str | None:
    """Say what a file is where it is of none of the kinds wanted, with the fix; None where it may be one of them."""
    if not path.is_file():
        return None
    kind, words, fix = file_kind(path)
    return None if kind in wanted or kind == "unknown" else f"it is {words}; {fix}"


def read_text(path: Path, *, longest: int = LONGEST) -> str:
    """Read a text file in UTF-8, packed by gzip where its name ends in ``.gz``; line ends stay as they are.

    Raises
    ------
    FileNotFoundError
        For what is no file.
    ValueError
        Naming the file, for one that is larger than `longest` bytes, or no text in UTF-8.
    """
    try:
        return read_bytes(path, longest=longest).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: is no text in UTF-8 ({error})") from None


def read_bytes(path: Path, *, longest: int = LONGEST) -> bytes:
    """Read a file of at most `longest` bytes; otherwise as `read_text`."""
    if not path.is_file():  # a named pipe would never end
        raise FileNotFoundError(f"{path}: no such file")
    if (size := path.stat().st_size) > longest:
        raise ValueError(f"{path}: has {size:,} bytes, more than are read of such a file ({longest:,})")
    if path.suffix != ".gz":
        return path.read_bytes()
    try:
        with gzip.open(path) as file:
            data = file.read(longest + 1)
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{path}: cannot be unpacked ({error})") from None
    if len(data) > longest:
        raise ValueError(f"{path}: unpacks to more than is read of such a file ({longest:,} bytes)")
    return data


def parse_json(text: str):
    r"""Return what JSON holds; halves of characters and NUL, which no file or terminal takes, become U+FFFD.

    Raises
    ------
    ValueError
        Also for values nested too deeply, and whole numbers of thousands of digits.

    Examples
    --------
    >>> from peka_lite._core._file_kinds import parse_json
    >>> parse_json(r'{"organ": "breast \ud83d"}') == {"organ": "breast \ufffd"}
    True
    """
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
    end = max(head.rfind(b"\n"), len(head) - 4) if len(head) == HEAD else len(head)  # a letter may be cut in two
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
        return "cut", f"cut short or damaged: it begins as PyTorch's files do and has no end ({size})", "fetch it again"
    parts = {name.rpartition("/")[2] for name in names}
    if "constants.pkl" in parts or any("/code/" in f"/{name}" for name in names):
        fix = "load it where it was made and save its state_dict() with torch.save"
        return "torchscript", "a TorchScript archive, a program with its weights", fix
    if "data.pkl" in parts:
        return "torch", "a file of torch.save", "give the file that is meant"
    held = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
    return "zip", f"a zip archive that holds {held or 'nothing'}", "unpack it and give the file that is meant"


def _is_pickle(head: bytes) -> bool:
    """Say whether text is a pickle of protocol 0: opcodes to the end, one of which builds something."""
    try:
        return len({op.name for op, *_ in pickletools.genops(io.BytesIO(head))} - {"STOP", "MARK", "NONE"}) > 0
    except Exception:  # whatever text is no pickle fails somewhere
        return False
