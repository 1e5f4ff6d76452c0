"""Tiles on their way to the device: the next batch is read and copied while this one computes; and their turns."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import numpy as np
import torch
from torch import nn

from peka_lite._core.device import default_device
from peka_lite._core.progress import progress_bar
from peka_lite.backbones.custom import check_statistic
from peka_lite.backbones.load import extract_features, normalize_pixels, precision_for, registry_row
from peka_lite.backbones.registry import IMAGENET, Backbone

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


def flip_tiles(tiles: torch.Tensor, turns: np.ndarray | torch.Tensor) -> torch.Tensor:
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
    >>> [flip_tiles(tile, np.array([k])).flatten().tolist() for k in (0, 1, 2, 5)]
    [[1, 2, 3, 4], [2, 1, 4, 3], [3, 4, 1, 2], [2, 4, 1, 3]]
    """
    if tiles.shape[1] != tiles.shape[2]:
        raise ValueError(f"only square tiles can be turned, not {tuple(tiles.shape[1:3])}")
    turns = torch.as_tensor(turns).to(tiles.device).view(-1, 1, 1, 1)
    tiles = torch.where((turns & 1).bool(), tiles.flip(2), tiles)
    tiles = torch.where((turns & 2).bool(), tiles.flip(1), tiles)
    return torch.where((turns & 4).bool(), tiles.transpose(1, 2), tiles)


@torch.no_grad()
def embed_tiles(
    model: nn.Module,
    tiles,
    *,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    input_size: int | None = None,
    batch_size: int = 64,
    device: str | None = None,
    progress: bool = False,
) -> np.ndarray:
    """Embed tiles with a student or any other network, in the tiles' order.

    Parameters
    ----------
    model
        From `load_backbone`, adapted or merged; or any module from (B, 3, H, W) to (B, D), in whatever type its weights
        have.
    tiles
        Anything that slices to uint8 (n, H, W, 3): a `TileStore`, an array, a memory map.
    mean, std
        Of the pixels (red, green, blue; 0 to 1) that the network was trained with. None: the student's own, and
        ImageNet's for another network.
    input_size
        Side in pixels that tiles are resized to. None: the student's own, and no resizing for another network.
    batch_size
        Tiles at once.
    device
        None: the GPU where there is one. The model is moved there and stays there.

    Returns
    -------
    numpy.ndarray
        (N, D) float32, computed in eval mode; afterwards the model is in the mode it was in.

    Raises
    ------
    ValueError
        For tiles that are not RGB of whole numbers from 0 to 255, statistics that cannot be right, and a network whose
        output is not one row of numbers a tile.

    Examples
    --------
    >>> import peka_lite as pk
    >>> tiles = pk.open_cohort("mini", slides=["MINI1"]).tiles
    >>> pk.embed_tiles(pk.load_backbone("mini"), tiles[:8]).shape
    (8, 192)

    A network of one's own:

    >>> from torch import nn

    from peka_lite._core.device import default_device
    from peka_lite._core.progress import bar
    from peka_lite.backbones.load import normalized, pooled, precision_for, registry_row
    from peka_lite.backbones.custom import check_statistic
    from peka_lite.backbones.registry import IMAGENET, Backbone
    >>> net = nn.Sequential(nn.Conv2d(3, 16, 8, stride=8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    >>> pk.embed_tiles(net, tiles[:8], mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5), input_size=64).shape
    (8, 16)
    """
    if not isinstance(model, nn.Module):
        raise ValueError(f"a network is an nn.Module from (B, 3, H, W) to (B, D), not {model!r}")
    if (
        isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel)
        and registry_row(model.module) is not None
    ):
        model = model.module
    device, spec, n, out = torch.device(device or default_device()), registry_row(model), len(tiles), None
    name = type(model).__name__ if spec is None else spec.name
    looks = _looks(spec, mean, std, input_size)
    if not n and spec is None:
        raise ValueError(f"there are no tiles, so how many features {name} gives is not known")
    model.to(device)
    kind = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    dtype = kind if spec is None else precision_for(spec, device)
    rows = [slice(i, min(i + batch_size, n)) for i in range(0, n, batch_size)]
    batches = Batches(tiles, rows, device=device)
    batches = progress_bar(batches, desc="embed tiles", unit=" batches", enabled=progress, leave=False)
    done = None  # fetched one batch late, so that the GPU has the next to work on meanwhile
    with _in_eval_mode(model):
        for at, batch in zip(rows, batches, strict=True):
            try:
                with torch.autocast(device.type, dtype, enabled=spec is not None and dtype != torch.float32):
                    features = extract_features(model, normalize_pixels(_pixels(batch), **looks).to(kind))
            except torch.OutOfMemoryError as error:
                raise MemoryError(
                    f"{device} ran out of memory embedding {len(batch)} tiles of {name} at once; "
                    f"--batch-size {max(1, batch_size // 2)} of `embed` and `predict` (batch_size=) takes about half"
                ) from error
            _check_features(features, len(batch), spec, name)
            if out is None:
                out = np.empty((n, features.shape[1]), dtype=np.float32)
            if done is not None:
                out[done[0]] = done[1].cpu().numpy()
            done = at, features.float()
    if done is not None:
        out[done[0]] = done[1].cpu().numpy()
    return np.empty((0, spec.dim), dtype=np.float32) if out is None else out


def _looks(spec: Backbone | None, mean, std, input_size) -> dict:
    """Return `normalize_pixels`'s options: what is given, else a student's own, else ImageNet's at the tiles' size."""
    own = (*IMAGENET, None) if spec is None else (spec.mean, spec.std, spec.input_size)
    looks = dict(zip(("mean", "std", "input_size"), own, strict=True))
    for name, value in (("mean", mean), ("std", std)):
        if value is not None:
            looks[name] = tuple(np.atleast_1d(value).tolist())
            check_statistic(name, looks[name])
    if input_size is not None:
        if not isinstance(input_size, int | np.integer) or input_size < 1:
            raise ValueError(f"input_size is the side of a square in pixels, above 0, not {input_size!r}")
        looks["input_size"] = int(input_size)
    return looks


def _pixels(batch: torch.Tensor) -> torch.Tensor:
    """Return tiles as uint8, and refuse what is not RGB on a scale of 0 to 255."""
    if batch.ndim != 4 or batch.shape[-1] != 3:
        raise ValueError(f"tiles are RGB, (n, H, W, 3) with the colors last, not {tuple(batch.shape)}")
    if batch.dtype == torch.uint8:
        return batch
    whole = not batch.is_floating_point() and not batch.is_complex() and batch.dtype != torch.bool
    if not whole or (wide := batch.long()).min() < 0 or wide.max() > 255:
        raise ValueError(
            f"tiles are whole numbers from 0 to 255 (uint8), not these {str(batch.dtype)[6:]}; from 0 to 1 they become "
            "so by (255 * tiles).round().astype('uint8')"
        )
    return wide.to(torch.uint8)


def _check_features(features, n: int, spec: Backbone | None, name: str) -> None:
    rows = isinstance(features, torch.Tensor) and features.ndim == 2 and len(features) == n
    if not rows or (spec is not None and features.shape[1] != spec.dim):
        got = tuple(features.shape) if isinstance(features, torch.Tensor) else type(features).__name__
        raise ValueError(
            f"{name} gives {got} for {n} tiles; one row of {'D' if spec is None else spec.dim} features a tile is "
            "needed: pool its output, or wrap it in a module that returns the part that is one"
        )


@contextmanager
def _in_eval_mode(model: nn.Module) -> Iterator[None]:
    """Put a model in eval mode, and each part back into the mode that it was in."""
    training = [module for module in model.modules() if module.training]
    try:
        model.eval()
        yield
    finally:
        for module in training:
            module.training = True
