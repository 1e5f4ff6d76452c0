"""Outside artifacts: what to fetch, from where, under which license, and whether what came is what was meant."""

from __future__ import annotations

import functools
import hashlib
import os
import secrets
from pathlib import Path

from peka_lite._core.locks import lock
from peka_lite.data._artifacts import Artifact, File, Manifest, Sample, parse_manifest
from peka_lite.data._fetch import PARTIAL, RECORD, fetch_into, read_record

__all__ = [
    "Artifact",
    "File",
    "Manifest",
    "Sample",
    "cache_dir",
    "fetch",
    "find_fetched",
    "patients_of",
    "read_manifest",
]

_FOLDERS = {"cohort": "cohorts", "checkpoint": "models", "student": "models", "genes": "genes"}


def cache_dir() -> Path:
    """Return where downloads and the embedded cohort are kept: ``$PEKA_LITE_CACHE`` or ``~/.cache/peka_lite``."""
    return Path(os.environ.get("PEKA_LITE_CACHE") or Path.home() / ".cache" / "peka_lite")


def read_manifest(path: str | os.PathLike | None = None) -> Manifest:
    """Read a manifest, by default the one that comes with the package.

    Raises
    ------
    FileNotFoundError
        For a file that is not there.
    ValueError
        For what is no manifest: unknown, missing or double keys, a value of the wrong kind. The message names the
        file, the entry and the field.

    Examples
    --------
    >>> import peka_lite as pk
    >>> manifest = pk.data.read_manifest()
    >>> [name for name, entry in manifest.items() if entry.kind == "cohort"]
    ['breast', 'kidney', 'liver', 'lung']
    >>> manifest["breast"].license, len(manifest["breast"].slides)
    ('CC-BY-NC-SA-4.0', 8)
    """
    return _shipped() if path is None else parse_manifest(Path(path))


def find_fetched(name: str | Artifact, *, root: str | os.PathLike | None = None) -> Path | None:
    """Return where a fetched artifact is: a cohort's folder, else the file. None where it is absent or incomplete.

    What `fetch` recorded is trusted, as far as the files are there with their sizes and the manifest says nothing else.

    Parameters
    ----------
    name
        A name in the manifest, or an `Artifact` of your own.
    root
        Where it was fetched to, as for `fetch`.

    Raises
    ------
    ValueError
        For an unknown name, or a record that is no JSON.

    Examples
    --------
    >>> import peka_lite as pk
    >>> print(pk.data.find_fetched("scfoundation", root="not_fetched_yet"))
    None
    """
    artifact = _artifact(name)
    root = _root(artifact, root)
    record = read_record(root)
    if record.get("name") != artifact.name or artifact.revision not in (None, record.get("commit")):
        return None
    have = {file["path"]: file for file in record["files"]}
    wanted = [file for file in artifact.files if file.path in have]
    if len(wanted) != (1 if artifact.any_of else len(artifact.files)):
        return None
    for file in wanted:
        came, place = have[file.path], root / file.path
        if file.size not in (None, came["size"]) or file.sha256 not in (None, came["sha256"]):
            return None
        if not place.is_file() or place.stat().st_size != came["size"]:
            return None
    return root if artifact.kind == "cohort" else root / wanted[0].path


def is_published(name: str | Artifact, path: Path) -> bool:
    """Say whether a file has the SHA-256 that the manifest, or a fetch from the source, recorded of an artifact's."""
    artifact = _artifact(name)
    recorded = read_record(_root(artifact, None))
    published = {file.sha256 for file in artifact.files} | {file["sha256"] for file in recorded.get("files", ())}
    with path.open("rb") as data:
        return hashlib.file_digest(data, "sha256").hexdigest() in published


def patients_of(name: str | Artifact) -> dict[str, str]:
    """Return slide id -> patient of a cohort; what cannot be told apart has one name.

    Raises
    ------
    ValueError
        For an unknown name, or one that is no cohort.
    """
    artifact = _artifact(name)
    if artifact.kind != "cohort":
        raise ValueError(f"{artifact.name} is no cohort but {artifact.kind}: it has no patients")
    return {slide.id: slide.patient for slide in artifact.slides}


def fetch(name: str | Artifact, *, root: str | os.PathLike | None = None, progress: bool = True) -> Path:
    """Fetch an artifact, check it, and return where it is, as `find_fetched` does; what is there already is not fetched.

    Size and hash of each file come from the manifest, else from the hub. A file that passed is put in place at once,
    so a cohort that breaks off keeps its finished files. ``fetched.json`` beside them records commit, sizes and
    hashes. After a kill or Ctrl-C the next call goes on where this one stopped; after any error no partial file stays.

    Parameters
    ----------
    name
        A name in the manifest, or an `Artifact` of your own.
    root
        Folder to put it in; by default its own in the cache (`cache_dir`).
    progress
        Say on stderr what is fetched, how large it is and under which license.

    Raises
    ------
    ValueError
        For an unknown name, a folder that holds another artifact, a wrong hash, or a web page in place of data.
    PermissionError
        For what one has to ask for; the message names the page.
    FileNotFoundError
        For a file or commit that the source does not hold.
    ConnectionError
        For a source that cannot be reached.
    OSError
        For a file that came too short, and for too small a disk.

    Examples
    --------
    >>> import peka_lite as pk
    >>> path = pk.fetch("hgnc")  # doctest: +SKIP
    >>> pk.fetch("hgncs")  # doctest: +ELLIPSIS
    Traceback (most recent call last):
        ...
    ValueError: nothing called 'hgncs' in data_manifest.yml; known: breast, kidney, liver, lung, scfoundation, ...
    """
    artifact = _artifact(name)
    folder = _root(artifact, root)
    if (place := find_fetched(artifact, root=folder)) is not None:
        return place
    if (other := read_record(folder).get("name", artifact.name)) != artifact.name:
        raise ValueError(f"{folder} holds {other} already; give {artifact.name} a folder of its own")
    with lock(folder / RECORD) as held:
        if (place := find_fetched(artifact, root=folder)) is None:  # another process may have been first
            own = PARTIAL if held else f"{PARTIAL}.{secrets.token_hex(4)}"
            fetch_into(folder, artifact, record=read_record(folder), partial=own, progress=progress)
            place = find_fetched(artifact, root=folder)
    return place


@functools.cache
def _shipped() -> Manifest:
    installed = Path(__file__).with_name("data_manifest.yml")  # in a wheel; in a checkout it is at the top level
    return parse_manifest(installed if installed.is_file() else Path(__file__).parents[2] / "data_manifest.yml")


def _artifact(name: str | Artifact) -> Artifact:
    if isinstance(name, Artifact):
        return name
    try:
        return read_manifest()[name]
    except KeyError as error:
        raise ValueError(error.args[0]) from None


def _root(artifact: Artifact, root: str | os.PathLike | None) -> Path:
    return cache_dir() / _FOLDERS[artifact.kind] / artifact.name if root is None else Path(root)
