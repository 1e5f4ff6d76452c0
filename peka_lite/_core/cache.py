"""One cache on disk: each result is made once and named by a hash of all that determines it."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from peka_lite._core.io import write_file
from peka_lite._core.locks import RECORD, lock_work_folder, move_into_place

if TYPE_CHECKING:
    import pandas as pd

    from peka_lite._core._processes import Processes

KINDS = ("embeddings", "labels", "students")


def cache_dir() -> Path:
    """Return the folder of downloads and results: ``$PEKA_LITE_CACHE`` or ``~/.cache/peka_lite``."""
    return Path(os.environ.get("PEKA_LITE_CACHE") or Path.home() / ".cache" / "peka_lite")


def cached(
    kind: str, key: dict, make: Callable[[Path], dict], *, name: str = "", processes: Processes | None = None
) -> Path:
    """Return the folder of a result, after making it if it is missing.

    A stopped job resumes with the files that `make` has left in the work folder. If two jobs need the same result, the
    second waits for the first. On a disk without locks both make it, and the first to finish moves it into place.

    Parameters
    ----------
    kind
        Subfolder of the cache, one of `KINDS`.
    key
        All that determines the result, as values that JSON can hold.
    make
        Function from an existing work folder to a record of plain values; stored last, as ``record.json``.
    name
        Readable start of the folder's name.
    processes
        Processes that make the result together; each must request the same results in the same order, and only the
        first writes files. None: this process alone.
    """
    folder = find_cached(kind, key, name=name)
    first = processes is None or processes.first
    same = processes.same if processes else lambda value: value

    def missing() -> bool:
        return same(not (folder / RECORD).is_file())

    if missing():
        with lock_work_folder(folder) if first else nullcontext(folder) as work:
            if missing():
                work = folder.with_name(same(work.name))
                if first:
                    work.mkdir(parents=True, exist_ok=True)
                record = make(work)
                if first:
                    write_file(work / RECORD, json.dumps(record).encode())
                    move_into_place(work, folder)
                if processes:
                    processes.wait()
    with suppress(OSError):  # a cache that others own
        os.utime(folder / RECORD)  # `prune_cache` keeps what is used
    return folder


def find_cached(kind: str, key: dict, *, name: str = "") -> Path:
    """Return the folder of a result, complete once it contains `RECORD`."""
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]
    return cache_dir() / kind / (f"{name}_{digest}" if name else digest)


def list_cache() -> pd.DataFrame:
    """Return one row per result in the cache: kind, name, bytes, and days since it was last used."""
    import pandas as pd

    rows = []
    for record in sorted(path for kind in KINDS for path in (cache_dir() / kind).glob(f"*/{RECORD}")):
        size = sum(path.stat().st_size for path in record.parent.iterdir())
        days = (time.time() - record.stat().st_mtime) / 86_400
        rows.append((record.parent.parent.name, record.parent.name, size, days))
    return pd.DataFrame(rows, columns=["kind", "name", "bytes", "days"])


def prune_cache(*, days: float) -> pd.DataFrame:
    """Remove the results that were not used for some days, and return their rows of `list_cache`."""
    unused = list_cache().query("days >= @days")
    for kind, name in zip(unused["kind"], unused["name"], strict=True):
        with lock_work_folder(cache_dir() / kind / name):
            shutil.rmtree(cache_dir() / kind / name)
    return unused
