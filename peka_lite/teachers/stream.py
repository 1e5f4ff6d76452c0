"""Embeddings on disk: written row by row as they come, picked up where a job stopped, whole or not there."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np

try:
    import fcntl
except ImportError:  # Windows has no such lock: there two jobs must not write one file
    fcntl = None


@contextlib.contextmanager
def alone(out: Path) -> Iterator[None]:
    """Hold `out` for this process; another one that wants it waits until this one is through, or gone."""
    if fcntl is None:
        yield
        return
    path = out.with_name(f".{out.name}.lock")
    path.parent.mkdir(parents=True, exist_ok=True)
    while True:
        lock = path.open("w")
        fcntl.flock(lock, fcntl.LOCK_EX)
        with contextlib.suppress(FileNotFoundError):
            if path.stat().st_ino == os.fstat(lock.fileno()).st_ino:
                break
        lock.close()  # its holder removed it while this one waited
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
        lock.close()


def open_partial(out: Path, *, shape: tuple[int, int], key: str) -> tuple[np.memmap, np.memmap]:
    """Open ``{out}.partial`` for writing: rows (N, D) float32, and which of them are done (N,) bool.

    What an earlier job left is kept where its `key` (data, teacher and settings) and shape agree, else removed.
    """
    work = out.with_name(out.name + ".partial")
    paths = work / "rows.npy", work / "done.npy"
    label = f"{key} {shape}"
    if not (all(p.is_file() for p in paths) and (work / "key").is_file() and (work / "key").read_text() == label):
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir(parents=True)
        for path, size, dtype in zip(paths, (shape, shape[:1]), (np.float32, bool), strict=True):
            np.lib.format.open_memmap(path, "w+", dtype, size).flush()
        (work / "key").write_text(label)  # last: without it the folder counts for nothing
    rows, done = (np.load(path, mmap_mode="r+") for path in paths)
    return rows, done


def finish(out: Path, rows: np.memmap) -> None:
    """Put complete rows in place as `out`."""
    rows.flush()
    work = out.with_name(out.name + ".partial")
    os.replace(work / "rows.npy", out)
    shutil.rmtree(work)
