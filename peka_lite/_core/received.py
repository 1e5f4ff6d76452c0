"""Files of a folder that others made: a received run, model or sweep shows what lies in it and nothing else."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

from peka_lite._core._file_kinds import parse_json
from peka_lite._core._yaml import read_yaml

LONGEST = 4096  # letters of one text in a record: a path is no longer
DEEPEST = 32  # nested lists and mappings of a record
_NOT_THERE = (errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG)


def file_inside(
    folder: str | os.PathLike, *names: str, within: str | os.PathLike | None = None, largest: int | None = None
) -> Path:
    """Return the path of a file of a folder, after a look that it is one and lies inside.

    Parameters
    ----------
    folder
        As the user gave it; it may be a link itself.
    names
        Of the file, or of the folders on the way to it and the file: plain names.
    within
        Folder that links may lead to; by default `folder`.
    largest
        Bytes that it may have.

    Raises
    ------
    FileNotFoundError
        Where nothing is there.
    ValueError
        For a name that is no plain one, a link that leads out of `within`, what is no regular file (a pipe or a device
        would hang whoever reads it), and a file that is too large.

    Examples
    --------
    >>> from pathlib import Path
    >>> from peka_lite._core.received import file_inside
    >>> Path("run").mkdir()
    >>> Path("run/metrics.csv").symlink_to("/etc/hostname")
    >>> file_inside("run", "metrics.csv")
    Traceback (most recent call last):
    ValueError: run/metrics.csv is a link that leads out of run; put the file itself there
    """
    path, real = _located(folder, names, within)
    about = real.stat()
    if not stat.S_ISREG(about.st_mode):
        raise ValueError(f"{path} is no regular file; remove it, or put the file there")
    if largest is not None and about.st_size > largest:
        raise ValueError(f"{path}: {about.st_size:,} bytes are more than such a file holds ({largest:,})")
    return path


def folder_inside(folder: str | os.PathLike, *names: str, within: str | os.PathLike | None = None) -> Path:
    """Return the path of a folder inside a folder; parameters and errors are those of `file_inside`."""
    path, real = _located(folder, names, within)
    if not real.is_dir():
        raise ValueError(f"{path} is no folder")
    return path


def read_json_inside(
    folder: str | os.PathLike, *names: str, within: str | os.PathLike | None = None, largest: int = 2**24
):
    """Read a JSON file of a folder, after `file_inside` and `check_values`."""
    path = file_inside(folder, *names, within=within, largest=largest)
    try:
        found = parse_json(path.read_text("utf-8"))
        check_values(found)
    except ValueError as error:
        raise ValueError(f"{path} is no JSON that can be read here ({error})") from None
    return found


def read_yaml_inside(
    folder: str | os.PathLike, *names: str, within: str | os.PathLike | None = None, largest: int = 2**20
):
    """Read a YAML file of a folder, after `file_inside` and `check_values`."""
    path = file_inside(folder, *names, within=within, largest=largest)
    found = read_yaml(path, largest=largest)
    try:
        check_values(found)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    return found


def check_name(name: object) -> str:
    """Return a name of one file or folder; anything that could lead elsewhere is a ValueError."""
    if not isinstance(name, str) or not name or name in (".", "..") or any(sign in name for sign in "/\\\0"):
        raise ValueError(f"{name!r} is no plain name: a file or folder is named without a slash, and not '..'")
    return name


def check_values(value: object, *, deep: int = 0) -> None:
    """Refuse what no record here holds: whole numbers of more than 64 bits, endless text, half letters, depth."""
    if isinstance(value, str):
        if len(value) > LONGEST:
            raise ValueError(f"a text of {len(value):,} letters; {LONGEST:,} are the most")
        if any("\ud800" <= letter <= "\udfff" for letter in value):
            raise ValueError(f"{value!r} holds half a letter (a lone surrogate)")
    elif isinstance(value, int) and not -(2**63) <= value < 2**63:
        raise ValueError("a whole number of more than 64 bits")
    elif isinstance(value, dict | list):
        if deep == DEEPEST:
            raise ValueError(f"nested more than {DEEPEST} levels deep")
        for part in [*value, *value.values()] if isinstance(value, dict) else value:
            check_values(part, deep=deep + 1)


def _located(folder, names: tuple[str, ...], within) -> tuple[Path, Path]:
    """Return the path and what it is once links are followed."""
    path, around = Path(folder, *map(check_name, names)), Path(folder if within is None else within)
    try:
        real = path.resolve(strict=True)
    except (OSError, RuntimeError) as error:  # Python 3.11 has RuntimeError for links in a circle
        if getattr(error, "errno", None) in _NOT_THERE:
            raise FileNotFoundError(f"{path}: no such file or folder") from None
        if isinstance(error, PermissionError):
            raise
        raise ValueError(f"{path} is a link that leads nowhere; put the file itself there") from None
    root = around.resolve()
    if root.parent.name == "snapshots" and (blobs := root.parent.parent / "blobs").is_dir() and _lies_in(real, blobs):
        return path, real  # Hugging Face's cache, where every file is a link to a blob of the same repository
    if not _lies_in(real, root):
        fix = "give that folder itself" if real.is_dir() else "put the file itself there"
        raise ValueError(f"{path} is a link that leads out of {around}; {fix}")
    return path, real


def _lies_in(real: Path, root: Path) -> bool:
    return real.is_relative_to(root.resolve())
