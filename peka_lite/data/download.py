"""Fetch the cohorts, weights and gene lists of a manifest, and find those already fetched."""

from __future__ import annotations

import functools
import os
import secrets
from pathlib import Path

from peka_lite._core.cache import cache_dir
from peka_lite._core.hashing import sha256
from peka_lite._core.locks import lock
from peka_lite.data._fetch import PARTIAL, RECORD, fetch_into, read_record
from peka_lite.data._manifest import Artifact, Manifest, parse_manifest

_FOLDERS = {"cohort": "cohorts", "checkpoint": "models", "student": "models", "genes": "genes"}


def read_manifest(path: str | os.PathLike | None = None) -> Manifest:
    """Read a manifest, by default the package's.

    Raises
    ------
    FileNotFoundError
        If the file is missing.
    ValueError
        If the manifest is invalid: unknown, missing or duplicate keys, or a value of the wrong type. The message names
        the file, the entry and the field.

    Examples
    --------
    >>> import peka_lite as pk
    >>> manifest = pk.data.read_manifest()
    >>> [name for name, entry in manifest.items() if entry.kind == "cohort"]
    ['breast', 'kidney', 'liver', 'lung']
    >>> manifest["breast"].license, len(manifest["breast"].slides)
    ('CC-BY-NC-SA-4.0', 8)
    """
    return _read_packaged_manifest() if path is None else parse_manifest(Path(path))


def find_fetched(name: str | Artifact, *, root: str | os.PathLike | None = None) -> Path | None:
    """Return the path of a fetched artifact (a cohort's folder, else the file), or None if absent or incomplete.

    Files are checked by size against the record of `fetch`, and the record against the manifest; nothing is hashed.

    Parameters
    ----------
    name
        A name in the manifest, or an `Artifact`.
    root
        Folder it was fetched to, as for `fetch`.

    Raises
    ------
    ValueError
        If the name is unknown or the record is not valid JSON.

    Examples
    --------
    >>> import peka_lite as pk
    >>> print(pk.data.find_fetched("scfoundation", root="not_fetched_yet"))
    None
    """
    artifact = _get_artifact(name)
    root = _get_folder(artifact, root)
    record = read_record(root)
    if record.get("name") != artifact.name or artifact.revision not in (None, record.get("commit")):
        return None
    recorded = {file["path"]: file for file in record["files"]}
    files = [file for file in artifact.files if file.path in recorded]
    if len(files) != (1 if artifact.any_of else len(artifact.files)):
        return None
    for file in files:
        entry, path = recorded[file.path], root / file.path
        if file.size not in (None, entry["size"]) or file.sha256 not in (None, entry["sha256"]):
            return None
        if not path.is_file() or path.stat().st_size != entry["size"]:
            return None
    return root if artifact.kind == "cohort" else root / files[0].path


def is_published(name: str | Artifact, path: Path) -> bool:
    """Return whether a file has a SHA-256 that the manifest or the record of `fetch` gives for an artifact's files."""
    artifact = _get_artifact(name)
    recorded = read_record(_get_folder(artifact, None))
    published = {file.sha256 for file in artifact.files} | {file["sha256"] for file in recorded.get("files", ())}
    return sha256(path) in published


def patients_of(name: str | Artifact) -> dict[str, str]:
    """Return slide id -> patient of a cohort; patients of a study that cannot be distinguished share one name.

    Raises
    ------
    ValueError
        If the name is unknown or not that of a cohort.
    """
    artifact = _get_artifact(name)
    if artifact.kind != "cohort":
        raise ValueError(f"{artifact.name} has no patients: it is a {artifact.kind}, not a cohort")
    return {slide.id: slide.patient for slide in artifact.slides}


def fetch(name: str | Artifact, *, root: str | os.PathLike | None = None, progress: bool = True) -> Path:
    """Download the missing files of an artifact, check them, and return its path as `find_fetched` does.

    Size and hash of each file come from the manifest, else from the hub. Each file is moved into place once it passes
    the checks, so an interrupted cohort keeps its finished files. ``fetched.json`` beside them records commit, sizes
    and hashes. After a kill or Ctrl-C the next call resumes; after an error no partial file remains.

    Parameters
    ----------
    name
        A name in the manifest, or an `Artifact`.
    root
        Folder to download to; by default a folder in the cache (`cache_dir`).
    progress
        Log name, size and license, and show progress bars in a terminal or a notebook.

    Raises
    ------
    ValueError
        For an unknown name, a folder with another artifact, a wrong hash, or a web page in place of data.
    PermissionError
        If access must be requested; the message names the page.
    FileNotFoundError
        If the source does not have a file or the commit.
    ConnectionError
        If the source cannot be reached.
    OSError
        If a file is truncated or the disk too small.

    Examples
    --------
    >>> import peka_lite as pk
    >>> path = pk.fetch("hgnc")  # doctest: +SKIP
    >>> pk.fetch("hgncs")  # doctest: +ELLIPSIS
    Traceback (most recent call last):
        ...
    ValueError: nothing called 'hgncs' in data_manifest.yml; known: breast, kidney, liver, lung, scfoundation, ...
    """
    artifact = _get_artifact(name)
    folder = _get_folder(artifact, root)
    if (path := find_fetched(artifact, root=folder)) is not None:
        return path
    if (other := read_record(folder).get("name", artifact.name)) != artifact.name:
        raise ValueError(f"{folder} already has {other}; fetch {artifact.name} to another folder")
    with lock(folder / RECORD) as locked:
        if (path := find_fetched(artifact, root=folder)) is None:  # another process may have been first
            partial = PARTIAL if locked else f"{PARTIAL}.{secrets.token_hex(4)}"
            fetch_into(folder, artifact, record=read_record(folder), partial=partial, progress=progress)
            path = find_fetched(artifact, root=folder)
    return path


@functools.cache
def _read_packaged_manifest() -> Manifest:
    installed = Path(__file__).with_name("data_manifest.yml")  # in a wheel; in a checkout it is at the top level
    return parse_manifest(installed if installed.is_file() else Path(__file__).parents[2] / "data_manifest.yml")


def _get_artifact(name: str | Artifact) -> Artifact:
    if isinstance(name, Artifact):
        return name
    try:
        return read_manifest()[name]
    except KeyError as error:
        raise ValueError(error.args[0]) from None


def _get_folder(artifact: Artifact, root: str | os.PathLike | None) -> Path:
    return cache_dir() / _FOLDERS[artifact.kind] / artifact.name if root is None else Path(root)
