"""Tiles on their way to the device: the next batch is read and copied while this one computes; and their turns."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch

AHEAD = 2  # batches read before they are asked for


class Batches:
    """Iterate over batches of tiles on a device, read ahead by one thread.

    On a GPU, batches go through pinned memory and are copied on a stream of their own.

    Parameters
    ----------
    tiles
        Uint8 (N, H, W, 3): anything that can be indexed by an array of rows.
    rows
        For each batch its row numbers, or a slice of them.
    device
        Where the batches go.

    Attributes
    ----------
    waited : float
        Seconds that the iteration spent waiting for tiles so far. On a GPU this is the most it can have idled for them.

    Examples
    --------
    >>> tiles = np.arange(4, dtype=np.uint8).reshape(4, 1, 1, 1)
    >>> [batch.flatten().tolist() for batch in Batches(tiles, [np.array([2, 0]), np.array([3])], device="cpu")]
    [[2, 0], [3]]
    """

    def __init__(self, tiles, rows: Sequence[np.ndarray | slice], *, device: str | torch.device):
        self.tiles, self.rows, self.device, self.waited = tiles, rows, torch.device(device), 0.0
        self._copies = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[torch.Tensor]:
        """Yield uint8 tensors (n, H, W, 3) on the device, in the order of `rows`."""
        reader = ThreadPoolExecutor(1, thread_name_prefix="tiles")
        try:
            asked = [reader.submit(self._read, rows) for rows in self.rows[:AHEAD]]
            for k in range(len(self.rows)):
                if k + AHEAD < len(self.rows):
                    asked.append(reader.submit(self._read, self.rows[k + AHEAD]))
                begun = time.perf_counter()
                batch = asked.pop(0).result()
                self.waited += time.perf_counter() - begun
                yield self._copy(batch)
        finally:
            reader.shutdown(wait=True, cancel_futures=True)

    def _read(self, rows: np.ndarray | slice) -> torch.Tensor:
        batch = torch.from_numpy(np.ascontiguousarray(self.tiles[rows]))
        return batch.pin_memory() if self._copies is not None else batch

    def _copy(self, batch: torch.Tensor) -> torch.Tensor:
        if self._copies is None:
            return batch.to(self.device)
        # The GPU is still busy with the batch before: the CPU runs ahead of it, and copies need no compute.
        with torch.cuda.stream(self._copies):
            batch = batch.to(self.device, non_blocking=True)
        now = torch.cuda.current_stream(self.device)
        now.wait_stream(self._copies)
        batch.record_stream(now)  # its memory is not reused before the work on it is done
        return batch


def turned(tiles: torch.Tensor, turns: np.ndarray | torch.Tensor) -> torch.Tensor:
    """Mirror and turn each tile into one of the eight ways a square can lie: tissue has no up.

    Parameters
    ----------
    tiles
        (n, S, S, 3) uint8, square, on any device.
    turns
        (n,) integers 0 to 7: bit 0 mirrors left and right, bit 1 up and down, bit 2 swaps rows and columns.
        0 leaves a tile as it is.

    Examples
    --------
    >>> tile = torch.tensor([[1, 2], [3, 4]]).view(1, 2, 2, 1)
    >>> [turned(tile, np.array([k])).flatten().tolist() for k in (0, 1, 2, 5)]
    [[1, 2, 3, 4], [2, 1, 4, 3], [3, 4, 1, 2], [2, 4, 1, 3]]
    """
    if tiles.shape[1] != tiles.shape[2]:
        raise ValueError(f"only square tiles can be turned, not {tuple(tiles.shape[1:3])}")
    turns = torch.as_tensor(turns).to(tiles.device).view(-1, 1, 1, 1)
    tiles = torch.where((turns & 1).bool(), tiles.flip(2), tiles)
    tiles = torch.where((turns & 2).bool(), tiles.flip(1), tiles)
    return torch.where((turns & 4).bool(), tiles.transpose(1, 2), tiles)
