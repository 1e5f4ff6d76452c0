"""Room on a disk: asked for before a write, and one sentence where a write fails for want of it."""

from __future__ import annotations

import contextlib
import errno
import io
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from peka_lite._core._signals import defer_signals

if TYPE_CHECKING:
    import anndata as ad
    from matplotlib.figure import Figure

_ROOM = "free some space there, or take another place (--out, or PEKA_LITE_CACHE for the cache)"
WHY = {  # and the fix
    errno.ENOSPC: ("no room on its disk", _ROOM),
    errno.EDQUOT: ("no room in the quota on its disk", _ROOM),
    errno.EFBIG: ("files may not grow that large here", "raise the limit (ulimit -f), or take another file system"),
}
# Rust, Arrow and HDF5 spell an error's number in its text alone.
_NUMBER = re.compile(r"\b(?:os error |errno = |errno )(\d+)", re.IGNORECASE)


class DiskFull(OSError):
    """There is no room for a file: the disk is full, a quota is used up, or files may not grow that large."""


def as_full_disk(
    error: BaseException | None, path: str | os.PathLike | None = None, n_bytes: int = 0
) -> DiskFull | None:
    """Return what to raise where a disk without room is behind an error, else None.

    Parameters
    ----------
    error
        Any exception; those that led to it count too.
    path
        What was being written; None takes the error's own.
    n_bytes
        Bytes that it needs, 0 where that is not known.
    """
    while error is not None:
        if isinstance(error, DiskFull):
            return error
        number = getattr(error, "errno", None)
        if number is None and (found := _NUMBER.search(str(error))):
            number = int(found[1])
        if number in WHY:
            return _refusal(number, path or getattr(error, "filename", None), n_bytes)
        error = error.__cause__ or error.__context__
    return None


def require_room(path: str | os.PathLike, n_bytes: int) -> None:
    """Raise `DiskFull` where the disk of `path`, which need not be there, has fewer bytes free."""
    free = _free(path)
    if free is not None and n_bytes > free:
        raise _refusal(errno.ENOSPC, path, n_bytes)


@contextlib.contextmanager
def report_full_disk(path: str | os.PathLike, n_bytes: int = 0) -> Iterator[None]:
    """Ask for room, and raise `DiskFull`, which names `path`, for what fails inside for want of it."""
    require_room(path, n_bytes)
    try:
        yield
    except Exception as error:
        if (full := as_full_disk(error, path, n_bytes)) is None or full is error:
            raise
        raise full from error


def reserve_blocks(path: str | os.PathLike, *, of: str | os.PathLike | None = None) -> None:
    """Give a file that is there blocks for all of its length, so that no write to its memory map can fail.

    A file system that cannot promise them is only asked what is free. `of` is what the error names, `path` itself if
    None.
    """
    with open(path, "r+b") as file, report_full_disk(of or path):
        status = os.fstat(file.fileno())
        try:
            if status.st_size:
                os.posix_fallocate(file.fileno(), 0, status.st_size)
        except (AttributeError, OSError) as error:  # macOS and Windows have no such call
            if getattr(error, "errno", None) in WHY:
                raise _refusal(error.errno, of or path, status.st_size) from error
            require_room(of or path, status.st_size - getattr(status, "st_blocks", 0) * 512)


class _Sink:
    """A file that lets no write fail: it keeps the first error, and from then on what comes in memory.

    HDF5 ends the process where a file cannot be closed because a write fails, or where what it wrote is not to be read
    again.
    """

    MOST = 2**21  # bytes of one late write; what is longer is values, which are never read back

    def __init__(self, file, let_through):
        self._file, self._error, self._let_through = file, None, let_through
        self._late: list[tuple[int, bytes]] = []  # where, what
        self.seek, self.tell, self.read = file.seek, file.tell, file.read

    def write(self, data) -> int:
        rest = memoryview(data).cast("B")
        size = len(rest)
        try:
            while len(rest) and self._error is None:
                rest = rest[self._file.write(rest) :]
        except OSError as error:
            self._error = error
        if len(rest):
            if len(rest) <= self.MOST:
                self._late.append((self._file.tell(), bytes(rest)))
            self._file.seek(len(rest), os.SEEK_CUR)
        return size

    def readinto(self, buffer) -> int:
        begin, found = self._file.tell(), memoryview(buffer).cast("B")
        n = self._file.readinto(found)
        if not self._late:
            return n
        found[n:] = bytes(len(found) - n)
        for start, late in self._late:
            low, high = max(begin, start), min(begin + len(found), start + len(late))
            if low < high:
                found[low - begin : high - begin] = late[low - start : high - start]
        return len(found)

    def truncate(self, size: int | None = None) -> int | None:
        try:
            return size if self._error else self._file.truncate(size)
        except OSError as error:
            self._error = error
            return size

    def flush(self) -> None:
        """Do nothing: no buffer lies between this and the system."""

    def check(self) -> None:
        """Raise the error that a write met, or what a signal puts off: to be called where both do no harm."""
        if self._error is not None:
            raise self._error
        self._let_through()


@contextlib.contextmanager
def open_new_file(path: str | os.PathLike, n_bytes: int = 0, *, of: str | os.PathLike | None = None) -> Iterator[_Sink]:
    """Open a file for a library to write; on any error it goes, and a full disk is a `DiskFull` that names it.

    Parameters
    ----------
    n_bytes
        Bytes that it takes at least.
    of
        What the error names; None is `path` itself.
    """
    path = Path(path)
    require_room(of or path, n_bytes)
    with defer_signals() as let_through:
        try:
            with path.open("w+b", buffering=0) as file:
                sink = _Sink(file, let_through)
                try:
                    yield sink
                finally:
                    sink.check()
        except BaseException as error:
            with contextlib.suppress(FileNotFoundError):
                n_bytes = max(n_bytes, path.stat().st_size)
                path.unlink()
            if (full := as_full_disk(error, of or path, n_bytes)) is None:
                raise
            raise full from error


def write_file(path: str | os.PathLike, content: bytes, *, of: str | os.PathLike | None = None) -> None:
    """Write a file of a folder that nobody reads yet; on any error it goes. `of` is as in `open_new_file`."""
    path = Path(path)
    with report_full_disk(of or path, len(content)):
        try:
            path.write_bytes(content)
        except BaseException:
            path.unlink(missing_ok=True)
            raise


def write_file_atomically(path: str | os.PathLike, content: bytes) -> None:
    """Write a file that appears when it is complete, whoever else writes it."""
    path = Path(path)
    own = path.with_name(f".{path.name}.{secrets.token_hex(4)}")  # another machine may have this process's number
    try:
        write_file(own, content, of=path)
        if path.is_dir():
            raise IsADirectoryError(f"{path} is a folder, where a file is to be written: remove it")
        os.replace(own, path)
    finally:
        own.unlink(missing_ok=True)


def save_array(path: str | os.PathLike, array: np.ndarray) -> None:
    """Write an array as ``.npy``."""
    with open_new_file(path, array.nbytes) as file:
        np.lib.format.write_array(file, array, allow_pickle=False)


def new_array(path: str | os.PathLike, shape: tuple[int, ...], dtype) -> None:
    """Make a ``.npy`` file of zeros to write by a memory map: it has its blocks already (`reserve_blocks`)."""
    path = Path(path)
    with report_full_disk(path, int(np.prod(shape)) * np.dtype(dtype).itemsize):
        try:
            np.lib.format.open_memmap(path, "w+", dtype, shape).flush()
            reserve_blocks(path)
        except BaseException:
            path.unlink(missing_ok=True)
            raise


def figure_bytes(figure: Figure, *, kind: str = "png", dpi: int) -> bytes:
    """Return what a figure's file holds."""
    figure.savefig(picture := io.BytesIO(), format=kind, dpi=dpi)
    return picture.getvalue()


def write_h5ad(
    adata: ad.AnnData, path: str | os.PathLike, *, compression: str | None = None, of: str | os.PathLike | None = None
) -> None:
    """Write AnnData as its own `write_h5ad` does, without that function's crash on a full disk."""
    import anndata as ad
    import h5py

    adata.strings_to_categoricals()
    arrays = [] if compression else [a for a in (adata.X, *adata.layers.values()) if isinstance(a, np.ndarray)]
    with open_new_file(path, sum(array.nbytes for array in arrays), of=of) as opened, h5py.File(opened, "w") as file:
        ad.io.write_elem(file, "/", adata, dataset_kwargs={"compression": compression})
        if adata.raw is None:
            file.pop("raw", None)  # "there is none", which versions before 0.12 cannot read


def format_size(n_bytes: int) -> str:
    """Return a number of bytes as a reader says it.

    Examples
    --------
    >>> from peka_lite._core.io import format_size
    >>> format_size(512), format_size(2_500_000)
    ('512 B', '2.5 MB')
    """
    for unit in ("B", "kB", "MB", "GB"):
        if n_bytes < 1000 or unit == "GB":
            return f"{n_bytes:.{0 if unit == 'B' else 1}f} {unit}"
        n_bytes /= 1000


def _refusal(number: int, path: str | os.PathLike | None, n_bytes: int) -> DiskFull:
    free = None if path is None else _free(path)
    why, fix = WHY[number]
    sizes = [f"at least {format_size(n_bytes)} needed"] if n_bytes else []
    sizes += [] if free is None else [f"{format_size(free)} free"]
    error = DiskFull(f"{path or 'a file'}: {', '.join([why, *sizes])}; {fix}")
    error.errno = number
    return error


def _free(path: str | os.PathLike) -> int | None:
    """Return the bytes free on the disk of a path that need not be there; None where the system does not say."""
    path = Path(os.path.abspath(path))
    with contextlib.suppress(OSError):
        usage = shutil.disk_usage(next(place for place in (path, *path.parents) if place.exists()))
        return usage.free if usage.free or usage.total else None  # some network disks do not say
    return None
