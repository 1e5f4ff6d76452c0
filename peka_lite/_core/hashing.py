"""Hash rows and files."""

from __future__ import annotations

import hashlib
import os
from functools import cache
from itertools import pairwise
from pathlib import Path

import numpy as np
from scipy import sparse

from peka_lite._core.progress import stage


def row_ids(rows) -> np.ndarray:
    """Return a hash of each row's content; (n,) uint64.

    Parameters
    ----------
    rows
        Counts (CSR or dense), embeddings or tiles, one item per row. A `TileStore` hashes slide file and position, so
        its memory-mapped copy has the same hashes.

    Examples
    --------
    >>> import numpy as np
    >>> import peka_lite as pk
    >>> E = np.eye(3, dtype=np.float32)
    >>> ids = pk.evaluation.row_ids(E)
    >>> np.isin(pk.evaluation.row_ids(E[[2, 0]]), ids).tolist()  # by content, not position
    [True, True]
    >>> np.isin(pk.evaluation.row_ids(E + 1), ids).tolist()
    [False, False, False]
    """
    if hasattr(rows, "ids"):
        return rows.ids
    if sparse.issparse(rows):
        rows = sparse.csr_matrix(rows)
        if not rows.has_canonical_format or (rows.data == 0).any():
            rows = rows.copy()
            rows.sum_duplicates()
            rows.eliminate_zeros()
        ends = rows.indptr
        index, value = rows.indices.astype(np.int32, copy=False), rows.data.astype(np.float32, copy=False)
        parts = ((index[a:b], value[a:b]) for a, b in pairwise(ends))
    else:
        parts = ((np.ascontiguousarray(row),) for row in rows)
    return np.fromiter((hash_parts(part) for part in parts), dtype=np.uint64)


def hash_parts(parts) -> int:
    digest = hashlib.blake2b(digest_size=8)
    for part in parts:
        digest.update(part)
    return int.from_bytes(digest.digest(), "little")


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file in hex digits; one that has not changed is read once per process."""
    stat = os.stat(path)
    return _sha256(os.path.realpath(path), (stat.st_size, stat.st_mtime_ns, stat.st_ino))


@cache
def _sha256(path: str, _state: tuple[int, ...]) -> str:
    with stage(f"hashing {os.path.basename(path)}"), open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
