"""Write files completely or not at all, after checking for free disk space."""

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

_SPACE = "free some space there, or choose another place (--out, or PEKA_LITE_CACHE for the cache)"
WHY = {  # reason and fix
    errno.ENOSPC: ("no space left on its disk", _SPACE),
    errno.EDQUOT: ("no space left in its disk quota", _SPACE),
    errno.EFBIG: ("files may not grow that large here", "raise the limit (ulimit -f), or use another file system"),
}
# Errors of Rust, Arrow and HDF5 have their number only in the text.
_NUMBER = re.compile(r"\b(?:os error |errno = |errno )(\d+)", re.IGNORECASE)


class DiskFull(OSError):
    """Report that a file does not fit: the disk or a quota is full, or files may not grow that large."""


def as_full_disk(
    error: BaseException | None, path: str | os.PathLike | None = None, n_bytes: int = 0
) -> DiskFull | None:
    """Return a `DiskFull` if a full disk caused an error, or a cause of it, else None.

    The message names `path` (by default the error's) and the `n_bytes` that it needs, 0 if unknown.
    """
    while error is not None:
        if isinstance(error, DiskFull):
            return error
        number = getattr(error, "errno", None)
        if number is None and (match := _NUMBER.search(str(error))):
            number = int(match[1])
        if number in WHY:
            return _disk_full_error(number, path or getattr(error, "filename", None), n_bytes)
        error = error.__cause__ or error.__context__
    return None


def require_space(path: str | os.PathLike, n_bytes: int) -> None:
    """Raise `DiskFull` if the disk of `path`, which need not exist, has fewer bytes free."""
    if (free := _free(path)) is not None and n_bytes > free:
        raise _disk_full_error(errno.ENOSPC, path, n_bytes)


@contextlib.contextmanager
def report_full_disk(path: str | os.PathLike, n_bytes: int = 0) -> Iterator[None]:
    """Check for free space, and raise errors of a full disk as a `DiskFull` that names `path`."""
    require_space(path, n_bytes)
    try:
        yield
    except Exception as error:
        if (full := as_full_disk(error, path, n_bytes)) is None or full is error:
            raise
        raise full from error


def reserve_blocks(path: str | os.PathLike, *, of: str | os.PathLike | None = None) -> None:
    """Allocate disk blocks for all of a file, so that writes to its memory map cannot fail.

    If the file system cannot, only the free space is checked. Errors name `of`, by default `path`.
    """
    with open(path, "r+b") as file, report_full_disk(of or path):
        status = os.fstat(file.fileno())
        try:
            if status.st_size:
                os.posix_fallocate(file.fileno(), 0, status.st_size)
        except (AttributeError, OSError) as error:  # macOS and Windows have no such call
            if getattr(error, "errno", None) in WHY:
                raise _disk_full_error(error.errno, of or path, status.st_size) from error
            require_space(of or path, status.st_size - getattr(status, "st_blocks", 0) * 512)


class _Sink:
    """Write to a file without raising: store the first error, and then buffer writes in memory.

    HDF5 ends the process if a file cannot be closed because a write fails, or if it cannot read back what it wrote.
    """

    MOST = 2**21  # bytes of a buffered write; longer ones are array values, which are never read back

    def __init__(self, file, raise_deferred):
        self._file, self._error, self._raise_deferred = file, None, raise_deferred
        self._buffered: list[tuple[int, bytes]] = []  # position, data
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
                self._buffered.append((self._file.tell(), bytes(rest)))
            self._file.seek(len(rest), os.SEEK_CUR)
        return size

    def readinto(self, buffer) -> int:
        begin, view = self._file.tell(), memoryview(buffer).cast("B")
        n = self._file.readinto(view)
        if not self._buffered:
            return n
        view[n:] = bytes(len(view) - n)
        for start, late in self._buffered:
            low, high = max(begin, start), min(begin + len(view), start + len(late))
            if low < high:
                view[low - begin : high - begin] = late[low - start : high - start]
        return len(view)

    def truncate(self, size: int | None = None) -> int | None:
        try:
            return size if self._error else self._file.truncate(size)
        except OSError as error:
            self._error = error
            return size

    def flush(self) -> None:
        """Do nothing: writes to the system are not buffered."""

    def check(self) -> None:
        """Raise the first write error or a deferred signal; call this where both are safe."""
        if self._error is not None:
            raise self._error
        self._raise_deferred()


@contextlib.contextmanager
def open_new_file(path: str | os.PathLike, n_bytes: int = 0, *, of: str | os.PathLike | None = None) -> Iterator[_Sink]:
    """Open a file for a library to write; remove it on any error, and raise `DiskFull` for a full disk.

    It gets at least `n_bytes`. Errors name `of`, by default `path`.
    """
    path = Path(path)
    require_space(of or path, n_bytes)
    with defer_signals() as raise_deferred:
        try:
            with path.open("w+b", buffering=0) as file:
                sink = _Sink(file, raise_deferred)
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
    """Write a file that no process reads yet; remove it on any error. `of` is as in `open_new_file`."""
    path = Path(path)
    with report_full_disk(of or path, len(content)):
        try:
            path.write_bytes(content)
        except BaseException:
            path.unlink(missing_ok=True)
            raise


def write_file_atomically(path: str | os.PathLike, content: bytes) -> None:
    """Write a file atomically, also with concurrent writers."""
    path = Path(path)
    partial = path.with_name(f".{path.name}.{secrets.token_hex(4)}")  # process ids are not unique across machines
    try:
        write_file(partial, content, of=path)
        if path.is_dir():
            raise IsADirectoryError(f"{path} is a folder, but a file must be written there: remove it")
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def save_array(path: str | os.PathLike, array: np.ndarray) -> None:
    """Write an array as ``.npy``."""
    with open_new_file(path, array.nbytes) as file:
        np.lib.format.write_array(file, array, allow_pickle=False)


def new_array(path: str | os.PathLike, shape: tuple[int, ...], dtype) -> None:
    """Create a ``.npy`` file of zeros for a memory map, with allocated blocks (`reserve_blocks`)."""
    path = Path(path)
    with report_full_disk(path, int(np.prod(shape)) * np.dtype(dtype).itemsize):
        try:
            np.lib.format.open_memmap(path, "w+", dtype, shape).flush()
            reserve_blocks(path)
        except BaseException:
            path.unlink(missing_ok=True)
            raise


def figure_bytes(figure: Figure, *, kind: str = "png", dpi: int) -> bytes:
    """Return a figure as the bytes of an image file."""
    figure.savefig(buffer := io.BytesIO(), format=kind, dpi=dpi)
    return buffer.getvalue()


def write_h5ad(
    adata: ad.AnnData, path: str | os.PathLike, *, compression: str | None = None, of: str | os.PathLike | None = None
) -> None:
    """Write AnnData as `AnnData.write_h5ad` does, but without crashing on a full disk."""
    import anndata as ad
    import h5py

    adata.strings_to_categoricals()
    arrays = [] if compression else [a for a in (adata.X, *adata.layers.values()) if isinstance(a, np.ndarray)]
    with open_new_file(path, sum(array.nbytes for array in arrays), of=of) as opened, h5py.File(opened, "w") as file:
        ad.io.write_elem(file, "/", adata, dataset_kwargs={"compression": compression})
        if adata.raw is None:
            file.pop("raw", None)  # a null entry, which anndata before 0.12 cannot read


def format_size(n_bytes: int) -> str:
    """Return a number of bytes as text."""
    for unit in ("B", "kB", "MB", "GB"):
        if n_bytes < 1000 or unit == "GB":
            return f"{n_bytes:.{0 if unit == 'B' else 1}f} {unit}"
        n_bytes /= 1000


def _disk_full_error(number: int, path: str | os.PathLike | None, n_bytes: int) -> DiskFull:
    free = None if path is None else _free(path)
    why, fix = WHY[number]
    sizes = [f"at least {format_size(n_bytes)} needed"] if n_bytes else []
    sizes += [] if free is None else [f"{format_size(free)} free"]
    error = DiskFull(f"{path or 'a file'}: {', '.join([why, *sizes])}; {fix}")
    error.errno = number
    return error


def _free(path: str | os.PathLike) -> int | None:
    """Return the free bytes on the disk of a path, which need not exist; None if unknown."""
    path = Path(os.path.abspath(path))
    with contextlib.suppress(OSError):
        usage = shutil.disk_usage(next(place for place in (path, *path.parents) if place.exists()))
        return usage.free if usage.free or usage.total else None  # some network disks report zero for both
    return None
