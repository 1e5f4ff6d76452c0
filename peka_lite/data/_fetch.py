"""Download the files of an artifact to a work folder, check them, and move them into place."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import io
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from peka_lite._core._file_kinds import file_kind, parse_json, read_text
from peka_lite._core.hashing import sha256 as hash_file
from peka_lite._core.io import WHY, DiskFull, format_size, report_full_disk, write_file_atomically
from peka_lite._core.outputs import check_work, find_link
from peka_lite._core.progress import draws_bars, logger, stage
from peka_lite.data._choices import explain_gate

if TYPE_CHECKING:
    from peka_lite.data._manifest import Artifact, File

RECORD = "fetched.json"
PARTIAL = ".partial"
HEADROOM = 2**28  # bytes to leave free on the disk
_CONNECTION_LOST = ("RemoteProtocolError", "ReadError", "ChunkedEncodingError")  # of httpx, and of requests


def read_record(root: Path) -> dict:
    """Return the record of a fetched artifact in `root`, or an empty dict if there is none."""
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
        raise ValueError(f"{path}: not a record of fetched files; remove it and fetch again")
    return record


def fetch_into(root: Path, artifact: Artifact, *, record: dict, partial: str = PARTIAL, progress: bool) -> None:
    """Download the missing files of an artifact to a folder, and record them there; see `peka_lite.data.fetch`.

    `partial` names the folder inside `root` for unfinished downloads; no other process may use it meanwhile.
    """
    commit, license, files = _list_files(artifact, artifact.revision or record.get("commit"))
    recorded = {f["path"]: f for f in record.get("files", ())} if record.get("commit") == commit else {}
    hashes = {file.path: _hash_if_complete(root / file.path, file, recorded.get(file.path)) for file in files}
    missing = [file for file in files if hashes[file.path] is None]
    check_work(root / partial)
    if find_link(root / partial):
        shutil.rmtree(root / partial)  # an interrupted fetch leaves no links
    parts = root / partial / (commit or "url")  # partial files of another commit are not resumed
    _check_disk(root, artifact, parts, missing, license)
    try:
        download = _download_from_url if artifact.url else _download_from_hub
        for file in _count_megabytes(artifact, missing, root, parts):
            part, path = parts / file.path, root / file.path
            part.parent.mkdir(parents=True, exist_ok=True)
            download(artifact, commit, file, part, progress and draws_bars())
            hashes[file.path] = check_file(part, file, name=_describe(artifact, file))
            path.parent.mkdir(parents=True, exist_ok=True)
            if not recorded:  # a record of another commit does not cover this file
                (root / RECORD).unlink(missing_ok=True)
            os.replace(part, path)
        _write_record(root, artifact, commit, license, hashes)
    except Exception:  # not KeyboardInterrupt, after which the next call resumes
        shutil.rmtree(root / partial, ignore_errors=True)
        raise
    shutil.rmtree(root / partial, ignore_errors=True)


def check_file(path: Path, file: File, *, name: str) -> str:
    """Return a downloaded file's SHA-256; raise if it is a web page or has another size or hash than expected."""
    kind, description, _ = file_kind(path)
    if kind == "page":
        raise ValueError(f"{name}: received a web page instead of data; open the address in a browser to read it")
    if kind == "pointer":
        raise ValueError(f"{name}: received {description} instead of data; use another address, or fetch it again")
    size = path.stat().st_size
    if file.size is not None and size != file.size:
        problem = "is truncated" if size < file.size else "is too long"
        raise OSError(f"{name} {problem}: received {size:,} of {file.size:,} bytes; fetch it again")
    sha256 = hash_file(path)
    if file.sha256 is not None and sha256 != file.sha256:
        raise ValueError(
            f"{name} has the wrong hash: SHA-256 {sha256}, not {file.sha256}; fetch it again, and if that repeats, "
            "the source has changed: do not use it"
        )
    return sha256


def explain_error(error: Exception, *, name: str, gate: str | None, access: str | None = None) -> Exception:
    """Return an exception whose message explains a failed download and its fix.

    Parameters
    ----------
    error
        Error that was raised by huggingface_hub or another client.
    name
        Name of the file or artifact for the message.
    gate
        Page to ask for access; None if unknown.
    access
        How access is granted there, a key of `ACCESS`; None if unknown.

    Returns
    -------
    Exception
        `PermissionError`, `FileNotFoundError`, `ConnectionError` or `OSError`, to be raised from `error`.
    """
    from huggingface_hub import errors

    status = getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(error, errors.LocalEntryNotFoundError):  # the hub is unreachable and the file not cached
        return ConnectionError(f"{name} could not be fetched: the hub cannot be reached; go online and try again")
    if isinstance(error, errors.OfflineModeIsEnabled):
        return ConnectionError(f"{name} could not be fetched: HF_HUB_OFFLINE is set; unset it to go online")
    if isinstance(error, errors.EntryNotFoundError):
        return FileNotFoundError(f"{name} is not in its repository: correct its path")
    if isinstance(error, errors.RevisionNotFoundError):
        return FileNotFoundError(
            f"{name}: its repository has no such revision; correct it in the manifest or, if none is given there, "
            f"remove {RECORD} to take the newest"
        )
    if isinstance(error, errors.RepositoryNotFoundError) or status in (401, 403):  # GatedRepoError is a subclass
        return PermissionError(explain_gate(name, gate, access))
    if status == 404:
        return FileNotFoundError(f"{name} is no longer at its address ({error}); correct the address")
    if status is not None:
        return ConnectionError(f"{name} could not be fetched: the server answered {status}; try again later")
    if type(error).__name__ in _CONNECTION_LOST:
        return OSError(f"{name} is truncated: the connection was lost; fetch it again")
    if isinstance(error, DiskFull):  # its message has more details
        return error
    if isinstance(error, OSError) and error.errno in WHY:
        return OSError(f"{name} does not fit on the disk; free some space, or give another root")
    if isinstance(error, OSError) and error.filename is not None:  # a local file, not the network
        return type(error)(f"{name} could not be written: {error.strerror} ({error.filename})")
    return ConnectionError(f"{name} could not be fetched ({type(error).__name__}); go online and try again")


def _list_files(artifact: Artifact, revision: str | None) -> tuple[str | None, str | None, list[File]]:
    """Return commit, license and files, with sizes and hashes from the hub; no file is downloaded."""
    if artifact.url:
        return None, artifact.license, list(artifact.files)
    from huggingface_hub import HfApi

    api = HfApi(endpoint=_get_endpoint(), library_name="peka_lite")
    with _explain_errors(artifact.name, artifact.gate or _get_page(artifact), artifact.access):
        info = api.repo_info(artifact.repo, repo_type=artifact.repo_type, revision=revision)
        paths = [file.path for file in artifact.files]
        entries = api.get_paths_info(artifact.repo, paths, repo_type=artifact.repo_type, revision=info.sha)
    entries = {entry.path: entry for entry in entries}
    missing = [path for path in paths if path not in entries]
    if missing == paths or (missing and not artifact.any_of):
        raise FileNotFoundError(
            f"{artifact.repo} on the hub does not have {', '.join(missing[:3])}{', ...' if missing[3:] else ''} of "
            f"{artifact.name} (commit {info.sha[:8]}); pin a revision that does"
        )
    license = next((tag.partition(":")[2] for tag in info.tags or () if tag.startswith("license:")), None)
    files = []
    for file in artifact.files:
        if entry := entries.get(file.path):
            sha256 = file.sha256 or (entry.lfs.sha256 if entry.lfs else None)
            files.append(dataclasses.replace(file, size=file.size or entry.size, sha256=sha256))
    files = files[:1] if artifact.any_of else files
    return info.sha, artifact.license or license, files


def _hash_if_complete(path: Path, file: File, recorded: dict | None) -> str | None:
    """Return the hash of a file that is already in place, or None if it has to be downloaded."""
    if not path.is_file() or file.size is None or path.stat().st_size != file.size:
        return None
    if recorded and recorded["size"] == file.size and file.sha256 in (None, recorded["sha256"]):
        return recorded["sha256"]
    return file.sha256 if file.sha256 and hash_file(path) == file.sha256 else None


def _check_disk(root: Path, artifact: Artifact, parts: Path, missing: list[File], license) -> None:
    downloaded = sum((parts / file.path).stat().st_size for file in missing if (parts / file.path).is_file())
    needed = max(0, sum(file.size or 0 for file in missing) - downloaded)
    existing = next(folder for folder in (root, *root.parents) if folder.exists())
    free = shutil.disk_usage(existing).free
    size = format_size(needed) if all(file.size for file in missing) else "size unknown"
    logger.info(
        f"fetching {artifact.name}: {len(missing)} files, {size}; {format_size(free)} free in {existing}; "
        f"license {license or 'unknown: see the source'}"
    )
    if needed + HEADROOM > free:
        raise OSError(
            f"{artifact.name} needs {format_size(needed)} and {format_size(HEADROOM)} to spare, but {existing} has "
            f"{format_size(free)} free; free some space, or give another root"
        )


def _count_megabytes(artifact: Artifact, missing: list[File], root: Path, parts: Path) -> Iterator[File]:
    """Yield the missing files, in a `stage` that counts the downloaded MB."""

    def describe() -> str:
        size = 0
        for file in missing:
            for path in (parts / file.path, root / file.path):
                with contextlib.suppress(OSError):
                    size += path.stat().st_size
        return f"fetching {artifact.name}: {size // 10**6:,} of {total} MB"

    total = f"{sum(file.size for file in missing) // 10**6:,}" if all(file.size for file in missing) else "?"
    with stage(describe):
        yield from missing


def _download_from_hub(artifact: Artifact, commit: str, file: File, part: Path, progress: bool) -> None:
    # hf_hub_download starts over after an interruption; http_get, which it calls, can resume.
    from huggingface_hub import hf_hub_url
    from huggingface_hub.file_download import http_get
    from huggingface_hub.utils import build_hf_headers

    url = hf_hub_url(artifact.repo, file.path, repo_type=artifact.repo_type, revision=commit, endpoint=_get_endpoint())
    headers = build_hf_headers(library_name="peka_lite") | {"Accept-Encoding": "identity"}
    if part.is_file() and part.stat().st_size > file.size:
        part.unlink()
    name = _describe(artifact, file)
    with (
        _explain_errors(name, artifact.gate or _get_page(artifact), artifact.access),
        _show_bars(progress),
        report_full_disk(part),
        _Download(part, "ab", file.size, name) as data,
    ):
        if data.tell() < file.size:
            http_get(url, data, resume_size=data.tell(), headers=headers, displayed_filename=file.path)


def _download_from_url(artifact: Artifact, _commit: None, file: File, part: Path, progress: bool) -> None:
    import pooch

    explain = _explain_errors(_describe(artifact, file), artifact.gate, artifact.access)
    with explain, report_full_disk(part), _Download(part, "wb", file.size, _describe(artifact, file)) as data:
        pooch.HTTPDownloader(progressbar=progress, chunk_size=2**16, timeout=30)(artifact.url, data, None)


class _TooLong(OSError):
    """Error for a download that exceeds its announced size or the free space of the disk."""


class _Download(io.BufferedWriter):
    """File that stops a download beyond its announced `size`, or beyond the free disk space less `HEADROOM`."""

    def __init__(self, path: Path, mode: str, size: int | None, label: str):
        super().__init__(path.open(mode, buffering=0))
        self.size, self.label = size, label
        self.free = shutil.disk_usage(path.parent).free - HEADROOM

    def write(self, data) -> int:
        written, position = super().write(data), self.tell()
        if self.size is not None and position > self.size:
            raise _TooLong(f"{self.label} is too long: received {position:,} of {self.size:,} bytes; fetch it again")
        if position > self.free:
            raise _TooLong(f"{self.label} does not fit on the disk; free some space, or give another root")
        return written


@contextlib.contextmanager
def _explain_errors(name: str, gate: str | None, access: str | None):
    """Raise errors of the block as `explain_error` returns them."""
    from huggingface_hub.errors import HfHubHTTPError

    try:
        yield
    except _TooLong:
        raise
    except json.JSONDecodeError as error:
        reason = "received a web page instead of the hub's answer; log in to your network first"
        raise ValueError(f"{name}: {reason}") from error
    # Its bases are the errors of the hub client's HTTP library: httpx, or requests before huggingface_hub 1.0.
    except (OSError, *HfHubHTTPError.__bases__) as error:
        raise explain_error(error, name=name, gate=gate, access=access) from error


@contextlib.contextmanager
def _show_bars(progress: bool):
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    if progress or are_progress_bars_disabled():
        yield
        return
    disable_progress_bars()
    try:
        yield
    finally:
        enable_progress_bars()


def _write_record(root: Path, artifact: Artifact, commit: str | None, license, hashes: dict) -> None:
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


def _get_endpoint() -> str | None:
    return (os.environ.get("HF_ENDPOINT") or "").rstrip("/") or None


def _get_page(artifact: Artifact) -> str:
    return f"https://huggingface.co/{'datasets/' if artifact.repo_type == 'dataset' else ''}{artifact.repo}"


def _describe(artifact: Artifact, file: File) -> str:
    return f"{artifact.name} ({file.path})"
