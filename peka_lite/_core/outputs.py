"""Write output files without overwriting inputs or files of other programs.

Each file ends in a mark with its writer and its length. Files that another program wrote or changed have no valid mark,
so that a user's changes are not lost either. Readers of HDF5, .npy and images ignore bytes after the end.
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

LONGEST = 200  # bytes of an output's name; names of temporary files are longer
_UNMARKED = (".svgz", ".raw", ".rgba")  # nothing may follow the content of these files


def check_free(out: Path) -> None:
    """Check that a folder can be created at `out`: nothing is there, not even a broken link."""
    _check_parents(out)
    if os.path.lexists(out):
        raise FileExistsError(f"{out} is there already: give another --out, or remove it")


def check_file(
    out: Path, by: str, *, inputs: Iterable[str | os.PathLike] = (), may_replace: Callable[[Path], bool] | None = None
) -> None:
    """Check that `by` may write a file at `out`: it is no input, and is absent or was written by `by`.

    `inputs` are never overwritten, under any name. `may_replace` returns whether `by` (``"peka-lite map"``, ...) wrote
    a file; by default, whether the file ends in its mark. A link is checked by its target, and is itself replaced.
    """
    _check_parents(out)
    if not os.path.lexists(out):
        return
    fix = f"give another {'--out' if by.startswith('peka-lite') else 'path'}"
    if os.path.isdir(out):
        raise IsADirectoryError(f"{out} is a folder: give the name of a file")
    if not os.path.isfile(out):
        raise FileExistsError(f"{out} is a pipe, a device or a broken link, not a file: {fix}")
    for path in inputs:
        if os.path.exists(path) and os.path.samefile(out, path):
            raise FileExistsError(f"{out} is an input of `{by}` ({path}): {fix}")
    if not (may_replace or (lambda path: _has_mark(path, by)))(out):
        problem = f"is there already and was not written by `{by}`, or was changed since"
        raise FileExistsError(f"{out} {problem}: {fix}, or remove it")


def find_link(folder: Path) -> Path | None:
    """Return a symbolic link at or in a work folder, through which another file would be overwritten."""
    return next((path for path in (folder, *folder.rglob("*")) if path.is_symlink()), None)


def check_work(work: Path, names: Iterable[str] | None = None) -> None:
    """Check that a work folder is absent, or was left by a stopped command.

    `names` are the command's files in it, without suffixes; None allows any. Removing a pipe would hang.
    """
    why = "temporary files must be written there"
    if not os.path.lexists(work):
        return
    if work.is_symlink() or not work.is_dir():
        raise FileExistsError(f"{work} is a link or not a folder, but {why}: remove it")
    for path in sorted(work.iterdir()) if names is not None else ():
        if path.name.lstrip(".").split(".")[0] not in names:
            raise FileExistsError(f"{path} is no command's file, but {why}: move it away")


@contextlib.contextmanager
def write_output(out: Path, by: str, **allowed) -> Iterator[Path]:
    """Lock an output file (`check_file`) and yield a temporary path; move it into place when it is complete."""
    check_file(out, by, **allowed)
    with lock(out):
        check_file(out, by, **allowed)  # again, since another process may have been first
        partial = out.with_name(f".{out.name}.{secrets.token_hex(4)}.partial")
        try:
            yield partial
            place_file(partial, out, by, **allowed)
        finally:
            partial.unlink(missing_ok=True)


@contextlib.contextmanager
def write_output_folder(out: Path) -> Iterator[Path]:
    """Lock an output folder (`check_free`) and yield an empty one; move it into place when it is complete."""
    with lock(out):
        check_free(out)
        work = partial_path(out, locked=False)
        work.mkdir()
        try:
            yield work
            move_if_absent(work, out)
        finally:
            shutil.rmtree(work, ignore_errors=True)


def place_file(partial: Path, out: Path, by: str, **allowed) -> None:
    """Mark a complete file, and move it into place if that is still allowed (`check_file`)."""
    if "may_replace" not in allowed and out.suffix.lower() not in _UNMARKED:
        size = partial.stat().st_size
        with report_full_disk(out), partial.open("ab") as file:
            file.write(_mark(out, by, size))
    check_file(out, by, **allowed)
    os.replace(partial, out)


def _mark(out: Path, by: str, size: int) -> bytes:
    words = f"written by {by}, {size} bytes"
    return (f"\n<!-- {words} -->\n" if out.suffix.lower() in (".svg", ".html") else f"\n%{words}\n").encode()


def _has_mark(path: Path, by: str) -> bool:
    with path.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - 256))
        tail = file.read(256)
    match = re.search(rb", (\d{1,18}) bytes(?: -->)?\n\Z", tail)
    mark = _mark(path, by, int(match[1])) if match else b""
    return match is not None and tail.endswith(mark) and int(match[1]) + len(mark) == size


def _check_parents(out: Path) -> None:
    if len(os.fsencode(out.name)) > LONGEST:
        raise ValueError(f"{out}: its name has more than {LONGEST} bytes; give a shorter one")
    parent = next((folder for folder in out.parents if os.path.lexists(folder)), None)
    if parent is not None and not os.path.isdir(parent):
        raise NotADirectoryError(f"{out} cannot be created: {parent} is not a folder")
