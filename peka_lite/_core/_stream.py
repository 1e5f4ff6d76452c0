"""Write embeddings to disk row by row, and resume where a job stopped."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np

from peka_lite._core.io import new_array, reserve_blocks, write_file_atomically
from peka_lite._core.outputs import check_work, find_link, place_file

BY = "teacher.embed"


def open_partial(work: Path, *, shape: tuple[int, int], key: str) -> tuple[np.memmap, np.memmap]:
    """Open a work folder (`lock_work_folder`): rows (N, D) float32, and whether each is done (N,) bool.

    Files of an earlier job are reused if `key` (data, teacher and settings) and shape are equal, else removed.
    """
    check_work(work, ("rows", "done", "key", "whole"))
    paths = work / "rows.npy", work / "done.npy"
    label = f"{key} {shape}"
    complete = all(p.is_file() for p in paths) and not find_link(work)
    if not (complete and (work / "key").is_file() and (work / "key").read_text() == label):
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir(parents=True)
        try:
            for path, size, dtype in zip(paths, (shape, shape[:1]), (np.float32, bool), strict=True):
                new_array(path, size, dtype)
            write_file_atomically(work / "key", label.encode())  # last: a folder without it is discarded
        except OSError:
            shutil.rmtree(work, ignore_errors=True)
            raise
    for path in paths:  # also for files of an earlier job: a copy may be sparse
        reserve_blocks(path)
    rows, done = (np.load(path, mmap_mode="r+") for path in paths)
    return rows, done


def finish(out: Path, rows: np.memmap) -> None:
    """Move the complete rows of `open_partial` to `out`."""
    rows.flush()
    work = Path(rows.filename).parent
    place_file(work / "rows.npy", out, BY)
    shutil.rmtree(work)
