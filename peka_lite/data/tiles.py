"""Read tiles from disk by row."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path

import h5py
import numpy as np

from peka_lite._core.hdf5 import Hdf5Error, Rows, check_storage, open_hdf5
from peka_lite._core.io import report_full_disk
from peka_lite._core.outputs import write_output
from peka_lite._core.progress import steps

TILE_SHAPE = (224, 224, 3)


class TileStore:
    """Uint8 tiles of one or more slides, read from disk when they are indexed.

    Rows keep the given order. No file is opened before the first read. A store can be pickled and used in
    DataLoader workers: each process opens its own file handles.

    Parameters
    ----------
    paths
        Files with tiles: ``.h5`` with a dataset ``img``, or ``.npy``; each (n, 224, 224, 3) uint8.
    part
        (N,) int, for each row of the store the index of its file in `paths`.
    row
        (N,) int, for each row of the store the row inside that file.
    ids
        (N,) uint64, the property `ids`; None derives them from file names and rows.

    Examples
    --------
    >>> import peka_lite as pk
    >>> tiles = pk.open_cohort("mini", slides=["MINI1"]).tiles
    >>> two = tiles.select([5, 0])
    >>> two
    TileStore(2 tiles of 224 px from 1 file(s))
    >>> bool((two[1] == tiles[0]).all()), two[:].shape
    (True, (2, 224, 224, 3))
    """

    def __init__(
        self, paths: Sequence[str | os.PathLike], part: np.ndarray, row: np.ndarray, ids: np.ndarray | None = None
    ):
        self.paths = tuple(Path(p) for p in paths)
        self.part = np.asarray(part, dtype=np.int64)  # (N,)
        self.row = np.asarray(row, dtype=np.int64)  # (N,)
        self._open: dict[tuple[int, int], object] = {}
        self._ids = ids

    @property
    def ids(self) -> np.ndarray:
        """Identifier of each row's tile, (N,) uint64, from file name and row in it; `to_memmap` keeps it."""
        if self._ids is None:
            file = np.array([_hash_name(p.name) for p in self.paths], dtype=np.uint64)
            self._ids = file[self.part] + self.row.astype(np.uint64)  # wraps around
        return self._ids

    def __len__(self) -> int:
        return len(self.row)

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """Shape of the array of all tiles, (N, 224, 224, 3)."""
        return (len(self), *TILE_SHAPE)

    def __repr__(self) -> str:
        return f"TileStore({len(self)} tiles of {TILE_SHAPE[0]} px from {len(self.paths)} file(s))"

    def __getitem__(self, index) -> np.ndarray:
        """Read one row (224, 224, 3) or several (n, 224, 224, 3), in the given order."""
        if isinstance(index, (int, np.integer)):
            i = range(len(self))[index]
            return np.array(self._source(self.part[i])[self.row[i]])
        rows = np.arange(len(self))[index]
        tiles = np.empty((len(rows), *TILE_SHAPE), dtype=np.uint8)
        for out, i in enumerate(rows):
            tiles[out] = self._source(self.part[i])[self.row[i]]
        return tiles

    def select(self, rows) -> TileStore:
        """Return a store of the given rows (indices or a boolean mask) without reading tiles."""
        return TileStore(self.paths, self.part[rows], self.row[rows], None if self._ids is None else self._ids[rows])

    @staticmethod
    def concat(stores: Sequence[TileStore]) -> TileStore:
        """Concatenate stores without reading tiles."""
        offsets = np.cumsum([0, *(len(s.paths) for s in stores)])
        return TileStore(
            [p for s in stores for p in s.paths],
            np.concatenate([s.part + o for s, o in zip(stores, offsets, strict=False)]),
            np.concatenate([s.row for s in stores]),
            None if all(s._ids is None for s in stores) else np.concatenate([s.ids for s in stores]),
        )

    def to_memmap(self, path: str | os.PathLike) -> TileStore:
        """Write all rows to a uint8 ``.npy`` memory map, and return a store that reads from it.

        Training reads each tile once per epoch; a memory map avoids decompressing it each time. The write is atomic
        and needs N x 147 KiB of disk. An existing file is overwritten if this method wrote it; any other file, or one
        that the store reads from, is a FileExistsError.
        """
        path = Path(path)
        if path.suffix != ".npy":
            raise ValueError(f"{path}: a memory map of tiles is a .npy file; give a name that ends in .npy")
        # Not written through a memory map: on a full disk that would kill the process (SIGBUS).
        with (
            report_full_disk(path, int(np.prod(self.shape))),
            write_output(path, "TileStore.to_memmap", inputs=self.paths) as partial,
            partial.open("wb") as file,
        ):
            header = {"descr": "|u1", "fortran_order": False, "shape": self.shape}
            np.lib.format.write_array_header_1_0(file, header)
            for start in steps("copying tiles to a memory map: part", range(0, len(self), 256)):
                file.write(self[start : start + 256])
        return TileStore([path], np.zeros(len(self)), np.arange(len(self)), self.ids)

    def _source(self, part: int):
        # A handle opened before a fork must not be shared with the child, so the key contains the process id.
        key = (os.getpid(), int(part))
        if key not in self._open:
            path = self.paths[part]
            self._open[key] = (
                np.load(path, mmap_mode="r") if path.suffix == ".npy" else Rows(open_tiles(open_hdf5(path), path), path)
            )
        return self._open[key]

    def __getstate__(self):
        return {**self.__dict__, "_open": {}}


def open_tiles(file: h5py.File, path: Path) -> h5py.Dataset:
    """Return the tiles (n, 224, 224, 3) uint8 of an open patches file, after checking how they are stored."""
    img = file.get("img")
    if not isinstance(img, h5py.Dataset):
        raise Hdf5Error(path, "dataset 'img' is missing", "HEST-1k patches have img, barcode and coords")
    if img.shape is None or img.shape[1:] != TILE_SHAPE or img.dtype != np.uint8:
        fix = f"Tiles must be uint8 (N, {', '.join(map(str, TILE_SHAPE))})"
        raise Hdf5Error(path, f"img is {img.dtype} {img.shape}", fix)
    check_storage(img, path)
    return img


def _hash_name(name: str) -> int:
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little")
