"""From the network to a folder: ask first, download beside, check, then put in place."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import hashlib
import io
import json
import os
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from peka_lite._core._file_kinds import file_kind, parse_json, read_text
from peka_lite._core.io import WHY, DiskFull, format_size, report_full_disk, write_file_atomically
from peka_lite._core.outputs import check_work, find_link
from peka_lite._core.progress import Stage, draws_bars
from peka_lite.data._choices import explain_gate

if TYPE_CHECKING:
    from peka_lite.data._artifacts import Artifact, File

RECORD = "fetched.json"
PARTIAL = ".partial"
HEADROOM = 2**28  # bytes to leave free on the disk
_BROKEN_OFF = ("RemoteProtocolError", "ReadError", "ChunkedEncodingError")  # of httpx, and of requests


def read_record(root: Path) -> dict:
    """Return what was recorded of an artifact; empty where nothing was."""
    path = root / RECORD
    if not path.is_file():
        return {}
    try:
        record = parse_json(read_text(path))
    except ValueError as error:
        reason = str(error).removeprefix(f"{path}: ")
        raise ValueError(f"{path}: not valid JSON ({reason}); remove it and fetch again") from None
    files = record.get("files", []) if isinstance(record, dict) else None
    fields = {"path": str, "size": int, "sha256": str}
    if not isinstance(files, list) or not all(
        isinstance(file, dict) and all(isinstance(file.get(name), kind) for name, kind in fields.items())
        for file in files
    ):
        raise ValueError(f"{path}: no record of fetched files; remove it and fetch again")
    return record


def fetch_into(root: Path, artifact: Artifact, *, record: dict, partial: str = PARTIAL, progress: bool) -> None:
    """Fetch what is missing of an artifact into a folder, and record it there; see `peka_lite.data.download.fetch`.

    `partial` names the folder inside that downloads go through, which no other process uses at the time.
    """
    commit, license, files = _announced(artifact, artifact.revision or record.get("commit"))
    recorded = {f["path"]: f for f in record.get("files", ())} if record.get("commit") == commit else {}
    hashes = {file.path: _kept(root / file.path, file, recorded.get(file.path)) for file in files}
    missing = [file for file in files if hashes[file.path] is None]
    check_work(root / partial)
    if find_link(root / partial):
        shutil.rmtree(root / partial)  # it is not what a stopped fetch leaves
    parts = root / partial / (commit or "url")  # what was begun of another commit is not gone on with
    _check_disk(root, artifact, parts, missing, license, progress)
    try:
        for file in _coming(artifact, missing, root, parts, progress):
            part, place = parts / file.path, root / file.path
            part.parent.mkdir(parents=True, exist_ok=True)
            (_from_url if artifact.url else _from_hub)(artifact, commit, file, part, progress and draws_bars())
            hashes[file.path] = check_file(part, file, what=_what(artifact, file))
            place.parent.mkdir(parents=True, exist_ok=True)
            if not recorded:  # a record of another commit must not vouch for this file
                (root / RECORD).unlink(missing_ok=True)
            os.replace(part, place)
        _write_record(root, root / partial, artifact, commit, license, hashes)
    except Exception:  # not KeyboardInterrupt: what was begun then is gone on with
        shutil.rmtree(root / partial, ignore_errors=True)
        raise
    shutil.rmtree(root / partial, ignore_errors=True)


def check_file(path: Path, file: File, *, what: str) -> str:
    """Return the SHA-256 of a file that is what was announced; raise where it is a web page, too short or another."""
    kind, words, _ = file_kind(path)
    if kind == "page":
        raise ValueError(f"{what}: a web page came instead of data; open the address in a browser to see what it says")
    if kind == "pointer":
        raise ValueError(f"{what}: {words} came instead of data; take another address, or fetch it again")
    size = path.stat().st_size
    if file.size is not None and size != file.size:
        wrong = "is truncated" if size < file.size else "is too long"
        raise OSError(f"{what} {wrong}: {size:,} of {file.size:,} bytes came; fetch it again")
    with path.open("rb") as data:
        found = hashlib.file_digest(data, "sha256").hexdigest()
    if file.sha256 is not None and found != file.sha256:
        raise ValueError(
            f"{what} has the wrong hash: SHA-256 {found}, not {file.sha256}; fetch it again, and if that repeats, "
            "the source has changed: do not use it"
        )
    return found


def hub_error(error: Exception, *, what: str, gate: str | None, access: str | None = None) -> Exception:
    """Turn an error of huggingface_hub, or of any download, into one sentence with the fix.

    Parameters
    ----------
    error
        What was raised.
    what
        What was being fetched, in words.
    gate
        Page to ask for access on; None where it is not known.
    access
        How access is granted there, a key of `registry.ACCESS`; None where it is not known.

    Returns
    -------
    Exception
        `PermissionError`, `FileNotFoundError`, `ConnectionError` or `OSError`, to be raised from `error`.
    """
    from huggingface_hub import errors

    status = getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(error, errors.LocalEntryNotFoundError):  # the hub was not reached, and no copy is in its cache
        return ConnectionError(f"{what} could not be fetched: the hub cannot be reached; go online and try again")
    if isinstance(error, errors.OfflineModeIsEnabled):
        return ConnectionError(f"{what} could not be fetched: HF_HUB_OFFLINE is set; unset it to go online")
    if isinstance(error, errors.EntryNotFoundError):
        return FileNotFoundError(f"{what} is not in its repository; it may have been moved: correct its path")
    if isinstance(error, errors.RevisionNotFoundError):
        return FileNotFoundError(
            f"{what}: its repository has no such revision; correct the one in the manifest, or, where none is given "
            f"there, remove {RECORD} to take the newest"
        )
    if isinstance(error, errors.RepositoryNotFoundError) or status in (401, 403):  # GatedRepoError is one of them
        return PermissionError(explain_gate(what, gate, access))
    if status == 404:
        return FileNotFoundError(f"{what} is not at its address any more ({error}); correct the address")
    if status is not None:
        return ConnectionError(f"{what} could not be fetched: the server answered {status}; try again later")
    if type(error).__name__ in _BROKEN_OFF:
        return OSError(f"{what} is truncated: the connection broke off before all of it came; fetch it again")
    if isinstance(error, DiskFull):  # it says more
        return error
    if isinstance(error, OSError) and error.errno in WHY:
        return OSError(f"{what} does not fit on the disk; free some space, or give another root")
    if isinstance(error, OSError) and error.filename is not None:  # our own disk, not the network
        return type(error)(f"{what} could not be written: {error.strerror} ({error.filename})")
    return ConnectionError(f"{what} could not be fetched ({type(error).__name__}); go online and try again")


def _announced(artifact: Artifact, revision: str | None) -> tuple[str | None, str | None, list[File]]:
    """Ask for the commit, the license, and each file's size and hash; nothing is downloaded yet."""
    if artifact.url:
        return None, artifact.license, list(artifact.files)
    from huggingface_hub import HfApi

    api = HfApi(endpoint=_endpoint(), library_name="peka_lite")
    with _sentences(artifact.name, artifact.gate or _page(artifact), artifact.access):
        info = api.repo_info(artifact.repo, repo_type=artifact.repo_type, revision=revision)
        paths = [file.path for file in artifact.files]
        held = api.get_paths_info(artifact.repo, paths, repo_type=artifact.repo_type, revision=info.sha)
    held = {entry.path: entry for entry in held}
    lost = [path for path in paths if path not in held]
    if lost == paths or (lost and not artifact.any_of):
        raise FileNotFoundError(
            f"{artifact.repo} on the hub does not hold {', '.join(lost[:3])}{', ...' if lost[3:] else ''} of "
            f"{artifact.name} (commit {info.sha[:8]}); pin a revision that does"
        )
    license = next((tag.partition(":")[2] for tag in info.tags or () if tag.startswith("license:")), None)
    told = []
    for file in artifact.files:
        if entry := held.get(file.path):
            sha256 = file.sha256 or (entry.lfs.sha256 if entry.lfs else None)
            told.append(dataclasses.replace(file, size=file.size or entry.size, sha256=sha256))
    told = told[:1] if artifact.any_of else told
    return info.sha, artifact.license or license, told


def _kept(place: Path, file: File, recorded: dict | None) -> str | None:
    """Return the hash of a file that is in place already; None where it has to be fetched."""
    if not place.is_file() or file.size is None or place.stat().st_size != file.size:
        return None
    if recorded and recorded["size"] == file.size and file.sha256 in (None, recorded["sha256"]):
        return recorded["sha256"]
    if file.sha256 is None:
        return None
    with place.open("rb") as data:
        found = hashlib.file_digest(data, "sha256").hexdigest()
    return found if found == file.sha256 else None


def _check_disk(root: Path, artifact: Artifact, parts: Path, missing: list[File], license, progress: bool) -> None:
    begun = sum((parts / file.path).stat().st_size for file in missing if (parts / file.path).is_file())
    needed = max(0, sum(file.size or 0 for file in missing) - begun)
    there = next(folder for folder in (root, *root.parents) if folder.exists())
    free = shutil.disk_usage(there).free
    if progress:
        size = f"{format_size(needed)}" if all(file.size for file in missing) else "size not known"
        print(
            f"fetching {artifact.name}: {len(missing)} files, {size}; {format_size(free)} free in {there}; "
            f"license {license or 'not stated: see the source'}",
            file=sys.stderr,
        )
    if needed + HEADROOM > free:
        raise OSError(
            f"{artifact.name} needs {format_size(needed)} and {format_size(HEADROOM)} to spare, but {there} has "
            f"{format_size(free)} free; free some space, or give another root"
        )


def _coming(artifact: Artifact, missing: list[File], root: Path, parts: Path, progress: bool) -> Stage:
    """Return the missing files to loop over; lines say how much of them has come, in MB."""

    def come() -> int:
        size = 0
        for file in missing:
            for path in (parts / file.path, root / file.path):
                with contextlib.suppress(OSError):
                    size += path.stat().st_size
        return size // 10**6

    total = sum(file.size for file in missing) // 10**6 if all(file.size for file in missing) else None
    return Stage(f"fetching {artifact.name}:", missing, total=total, measure=come, unit=" MB", reports=progress)


def _from_hub(artifact: Artifact, commit: str, file: File, part: Path, progress: bool) -> None:
    # hf_hub_download begins a file anew after an interruption; http_get, which it calls, can go on.
    from huggingface_hub import hf_hub_url
    from huggingface_hub.file_download import http_get
    from huggingface_hub.utils import build_hf_headers

    url = hf_hub_url(artifact.repo, file.path, repo_type=artifact.repo_type, revision=commit, endpoint=_endpoint())
    headers = build_hf_headers(library_name="peka_lite") | {"Accept-Encoding": "identity"}
    if part.is_file() and part.stat().st_size > file.size:
        part.unlink()
    asked = _sentences(_what(artifact, file), artifact.gate or _page(artifact), artifact.access)
    with (
        asked,
        _bars(progress),
        report_full_disk(part),
        _Download(part, "ab", file.size, _what(artifact, file)) as data,
    ):
        if data.tell() < file.size:
            http_get(url, data, resume_size=data.tell(), headers=headers, displayed_filename=file.path)


def _from_url(artifact: Artifact, _commit: None, file: File, part: Path, progress: bool) -> None:
    import pooch

    asked = _sentences(_what(artifact, file), artifact.gate, artifact.access)
    with asked, report_full_disk(part), _Download(part, "wb", file.size, _what(artifact, file)) as data:
        pooch.HTTPDownloader(progressbar=progress, chunk_size=2**16, timeout=30)(artifact.url, data, None)


class _TooLong(OSError):
    """More came than was announced, or than the disk has room for."""


class _Download(io.BufferedWriter):
    """A file that ends its download where more comes than was announced; None: than leaves `HEADROOM` on the disk."""

    def __init__(self, path: Path, mode: str, size: int | None, what: str):
        super().__init__(path.open(mode, buffering=0))
        self.size, self.what = size, what
        self.room = shutil.disk_usage(path.parent).free - HEADROOM

    def write(self, data) -> int:
        written, there = super().write(data), self.tell()
        if self.size is not None and there > self.size:
            raise _TooLong(f"{self.what} is too long: {there:,} of {self.size:,} bytes came; fetch it again")
        if there > self.room:
            raise _TooLong(f"{self.what} does not fit on the disk; free some space, or give another root")
        return written


@contextlib.contextmanager
def _sentences(what: str, gate: str | None, access: str | None):
    """Raise what goes wrong inside as the one sentence of `hub_error`."""
    from huggingface_hub.errors import HfHubHTTPError

    try:
        yield
    except _TooLong:
        raise
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{what}: a web page came instead of the hub's answer; log in to your network first"
        ) from error
    # Its bases are the errors of the HTTP library that the hub's client is built on: httpx, or requests before 1.0.
    except (OSError, *HfHubHTTPError.__bases__) as error:
        raise hub_error(error, what=what, gate=gate, access=access) from error


@contextlib.contextmanager
def _bars(progress: bool):
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    if progress or are_progress_bars_disabled():
        yield
        return
    disable_progress_bars()
    try:
        yield
    finally:
        enable_progress_bars()


def _write_record(root: Path, work: Path, artifact: Artifact, commit: str | None, license, hashes: dict) -> None:
    files = [{"path": path, "size": (root / path).stat().st_size, "sha256": sha} for path, sha in hashes.items()]
    record = {
        "name": artifact.name,
        "source": artifact.url or f"{artifact.repo_type} {artifact.repo}",
        "commit": commit,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "license": license,
        "files": files,
    }
    (root / RECORD).parent.mkdir(parents=True, exist_ok=True)
    write_file_atomically(root / RECORD, (json.dumps(record, indent=1) + "\n").encode())


def _endpoint() -> str | None:
    return (os.environ.get("HF_ENDPOINT") or "").rstrip("/") or None


def _page(artifact: Artifact) -> str:
    return f"https://huggingface.co/{'datasets/' if artifact.repo_type == 'dataset' else ''}{artifact.repo}"


def _what(artifact: Artifact, file: File) -> str:
    return f"{artifact.name} ({file.path})"
