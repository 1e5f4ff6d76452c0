"""Files that commands write at a user's path: never in the place of an input, or of what they did not write.

Each file ends in a mark: who wrote it, and how long it was before. A file that another program wrote, or wrote again,
has none, or has it elsewhere or with another length, so that a user's changes are not lost either. Readers of HDF5,
.npy and pictures take no notice of bytes after the end.
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from peka_lite._core.io import report_full_disk
from peka_lite._core.locks import lock, move_if_absent, partial_path

LONGEST = 200  # bytes of an output's name, to which that of a file in preparation adds some
_UNMARKED = (".svgz", ".raw", ".rgba")  # nothing may follow their content


def check_free(out: Path) -> None:
    """Refuse a folder to be made where something is, a link that leads nowhere too, or where none can be."""
    _check_above(out)
    if os.path.lexists(out):
        raise FileExistsError(f"{out} is there already: give another --out, or remove it")


def check_file(
    out: Path, by: str, *, inputs: Iterable[str | os.PathLike] = (), own: Callable[[Path], bool] | None = None
) -> None:
    """Refuse a file to be written where an input is, what `by` did not write, or where no file can be.

    A link is judged by what it leads to, and is itself what is replaced.

    Parameters
    ----------
    by
        Who writes, such as ``"peka-lite map"`` or ``"TileStore.to_memmap"``.
    inputs
        Files that are read: never written over, whoever made them and under whatever name.
    own
        Tells of a file whether `by` wrote it; None: whether it ends in the mark.

    Raises
    ------
    FileExistsError, IsADirectoryError, NotADirectoryError
        With the fix in the message.
    """
    _check_above(out)
    if not os.path.lexists(out):
        return
    fix = f"give another {'--out' if by.startswith('peka-lite') else 'path'}"
    if os.path.isdir(out):
        raise IsADirectoryError(f"{out} is a folder: give the name of a file")
    if not os.path.isfile(out):
        raise FileExistsError(f"{out} is a pipe, a device or a link that leads nowhere, and no file: {fix}")
    for path in inputs:
        if os.path.exists(path) and os.path.samefile(out, path):
            raise FileExistsError(f"{out} is what `{by}` reads ({path}): {fix}")
    if not (own or (lambda path: _bears_mark(path, by)))(out):
        raise FileExistsError(
            f"{out} is there already and was not written by `{by}`, or was changed since: {fix}, or remove it"
        )


def find_link(folder: Path) -> Path | None:
    """Return a symbolic link at or in a folder to go on with, through which a file elsewhere would be written."""
    return next((path for path in (folder, *folder.rglob("*")) if path.is_symlink()), None)


def check_work(work: Path, names: Iterable[str] | None = None) -> None:
    """Refuse a place to work in that no stopped command left.

    `names` are those of a command's files there, without their endings; None takes any. A pipe would hang its removal.
    """
    if not os.path.lexists(work):
        return
    if work.is_symlink() or not work.is_dir():
        raise FileExistsError(f"{work} is a link or no folder, where files are to be prepared: remove it")
    for path in sorted(work.iterdir()) if names is not None else ():
        if path.name.lstrip(".").split(".")[0] not in names:
            raise FileExistsError(f"{path} lies where files are to be prepared, and no command left it: move it away")


@contextlib.contextmanager
def write_output(
    out: Path, by: str, *, inputs: Iterable[str | os.PathLike] = (), own: Callable[[Path], bool] | None = None
) -> Iterator[Path]:
    """Hold a file to be written (`check_file`) and give where to write it; it takes its place when all is written."""
    inputs = tuple(inputs)
    check_file(out, by, inputs=inputs, own=own)
    with lock(out):
        check_file(out, by, inputs=inputs, own=own)  # before the work; another process may have been first
        partial = out.with_name(f".{out.name}.{secrets.token_hex(4)}.partial")
        try:
            yield partial
            place_file(partial, out, by, inputs=inputs, own=own)
        finally:
            partial.unlink(missing_ok=True)


@contextlib.contextmanager
def write_output_folder(out: Path) -> Iterator[Path]:
    """Hold a folder to be made (`check_free`) and give an empty one, which takes its place when all is written."""
    with lock(out):
        check_free(out)
        work = partial_path(out, held=False)
        work.mkdir()
        try:
            yield work
            move_if_absent(work, out)
        finally:
            shutil.rmtree(work, ignore_errors=True)


def place_file(
    partial: Path, out: Path, by: str, *, inputs: Iterable[str | os.PathLike] = (),
    own: Callable[[Path], bool] | None = None,
) -> None:  # fmt: skip
    """Mark a file that is written, and move it to its place where that is still free (`check_file`)."""
    if own is None and out.suffix.lower() not in _UNMARKED:
        size = partial.stat().st_size
        with report_full_disk(out), partial.open("ab") as file:
            file.write(_mark(out, by, size))
    check_file(out, by, inputs=inputs, own=own)
    os.replace(partial, out)


def _mark(out: Path, by: str, size: int) -> bytes:
    words = f"written by {by}, {size} bytes"
    return (f"\n<!-- {words} -->\n" if out.suffix.lower() in (".svg", ".html") else f"\n%{words}\n").encode()


def _bears_mark(path: Path, by: str) -> bool:
    with path.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - 256))
        tail = file.read(256)
    said = re.search(rb", (\d{1,18}) bytes(?: -->)?\n\Z", tail)
    mark = _mark(path, by, int(said[1])) if said else b""
    return said is not None and tail.endswith(mark) and int(said[1]) + len(mark) == size


def _check_above(out: Path) -> None:
    if len(os.fsencode(out.name)) > LONGEST:
        raise ValueError(f"{out}: a name of more than {LONGEST} bytes; give a shorter one")
    above = next((folder for folder in out.parents if os.path.lexists(folder)), None)
    if above is not None and not os.path.isdir(above):
        raise NotADirectoryError(f"{out} cannot be made: {above} is no folder")
