"""Read files of received folders (runs, models, sweeps) without following links out of them."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

from peka_lite._core._file_kinds import parse_json
from peka_lite._core._yaml import read_yaml

LONGEST = 4096  # characters of a text in a record; a path is no longer
DEEPEST = 32  # nested lists and mappings of a record
_NOT_THERE = (errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG)


def file_inside(
    folder: str | os.PathLike, *names: str, within: str | os.PathLike | None = None, largest: int | None = None
) -> Path:
    """Return the path of a file in a folder, given by plain names, after checking that it is a regular file inside.

    The folder itself may be a link; links in it may lead anywhere in `within` (by default the folder). Raises
    FileNotFoundError if nothing is there, else ValueError, also for a pipe (reading it would hang) and for more than
    `largest` bytes.
    """
    path, real = _resolve(folder, names, within)
    status = real.stat()
    if not stat.S_ISREG(status.st_mode):
        raise ValueError(f"{path} is not a regular file; remove it, or put the file there")
    if largest is not None and status.st_size > largest:
        raise ValueError(f"{path}: has {status.st_size:,} bytes, more than are read (at most {largest:,})")
    return path


def folder_inside(folder: str | os.PathLike, *names: str, within: str | os.PathLike | None = None) -> Path:
    """Return the path of a folder inside a folder; parameters and errors are those of `file_inside`."""
    path, real = _resolve(folder, names, within)
    if not real.is_dir():
        raise ValueError(f"{path} is not a folder")
    return path


def read_json_inside(
    folder: str | os.PathLike, *names: str, within: str | os.PathLike | None = None, largest: int = 2**24
):
    """Read a JSON file of a folder, after `file_inside` and `check_values`."""
    path = file_inside(folder, *names, within=within, largest=largest)
    try:
        return check_values(parse_json(path.read_text("utf-8")))
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON ({error})") from None


def read_yaml_inside(
    folder: str | os.PathLike, *names: str, within: str | os.PathLike | None = None, largest: int = 2**20
):
    """Read a YAML file of a folder, after `file_inside` and `check_values`."""
    path = file_inside(folder, *names, within=within, largest=largest)
    value = read_yaml(path, largest=largest)
    try:
        return check_values(value)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def check_name(name: object) -> str:
    """Return a plain name of a file or folder; ValueError if it could lead to another folder."""
    if not isinstance(name, str) or not name or name in (".", "..") or any(sign in name for sign in "/\\\0"):
        raise ValueError(f"{name!r} is not a plain name: use a name without slashes, and not '..'")
    return name


def check_values(value, *, deep: int = 0):
    """Return a value without large integers, long text, lone surrogates and deep nesting, which no record has."""
    if isinstance(value, str):
        if len(value) > LONGEST:
            raise ValueError(f"a text has {len(value):,} characters; at most {LONGEST:,} are read")
        if any("\ud800" <= letter <= "\udfff" for letter in value):
            raise ValueError(f"{value!r} has a lone surrogate")
    elif isinstance(value, int) and not -(2**63) <= value < 2**63:
        raise ValueError("an integer has more than 64 bits")
    elif isinstance(value, dict | list):
        if deep == DEEPEST:
            raise ValueError(f"nested more than {DEEPEST} levels deep")
        for part in [*value, *value.values()] if isinstance(value, dict) else value:
            check_values(part, deep=deep + 1)
    return value


def _resolve(folder, names: tuple[str, ...], within) -> tuple[Path, Path]:
    """Return a path, and its target after following links."""
    path, allowed = Path(folder, *map(check_name, names)), Path(folder if within is None else within)
    try:
        real = path.resolve(strict=True)
    except (OSError, RuntimeError) as error:  # Python 3.11 raises RuntimeError for a loop of links
        if getattr(error, "errno", None) in _NOT_THERE:
            raise FileNotFoundError(f"{path}: no such file or folder") from None
        if isinstance(error, PermissionError):
            raise
        raise ValueError(f"{path} is a broken link; put the file itself there") from None
    root = allowed.resolve()
    # Hugging Face's cache, where every file is a link to a blob of the same repository
    blobs = [(root.parents[1] / "blobs").resolve()] if root.parent.name == "snapshots" else []
    if not any(map(real.is_relative_to, [root, *blobs])):
        fix = "give that folder itself" if real.is_dir() else "put the file itself there"
        raise ValueError(f"{path} is a link that leads out of {allowed}; {fix}")
    return path, real
