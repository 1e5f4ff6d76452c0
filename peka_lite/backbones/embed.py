"""Read tiles in batches ahead of computation, flip them, and embed them."""

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
from peka_lite.backbones.load import extract_features, get_registry_row, normalize_pixels, precision_for
from peka_lite.backbones.registry import IMAGENET, Backbone

AHEAD = 2  # batches to read in advance


class Batches:
    """Iterate over batches of tiles on a device, reading ahead in one thread.

    On a GPU, batches go through pinned memory and are copied on a separate stream.

    Parameters
    ----------
    tiles
        Uint8 (N, H, W, 3): anything that can be indexed by an array of rows.
    rows
        Row numbers of each batch, or a slice.
    device
        Device of the batches.

    Attributes
    ----------
    waited : float
        Seconds spent waiting for tiles so far, an upper bound on the GPU's idle time for reading.
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
            pending = [reader.submit(self._read, rows) for rows in self.rows[:AHEAD]]
            for k in range(len(self.rows)):
                if k + AHEAD < len(self.rows):
                    pending.append(reader.submit(self._read, self.rows[k + AHEAD]))
                start = time.perf_counter()
                batch = pending.pop(0).result()
                self.waited += time.perf_counter() - start
                yield self._copy(batch)
        finally:
            reader.shutdown(wait=True, cancel_futures=True)

    def _read(self, rows: np.ndarray | slice) -> torch.Tensor:
        batch = torch.from_numpy(np.ascontiguousarray(self.tiles[rows]))
        return batch.pin_memory() if self._copies is not None else batch

    def _copy(self, batch: torch.Tensor) -> torch.Tensor:
        if self._copies is None:
            return batch.to(self.device)
        # The copy overlaps with the computation on the previous batch.
        with torch.cuda.stream(self._copies):
            batch = batch.to(self.device, non_blocking=True)
        current = torch.cuda.current_stream(self.device)
        current.wait_stream(self._copies)
        batch.record_stream(current)  # do not reuse its memory before the work on it is done
        return batch


def flip_tiles(tiles: torch.Tensor, turns: np.ndarray | torch.Tensor) -> torch.Tensor:
    """Apply one of the eight symmetries of the square to each tile.

    Parameters
    ----------
    tiles
        (n, S, S, 3) uint8, square, on any device.
    turns
        (n,) integers 0 to 7: bit 0 flips left-right, bit 1 flips up-down, bit 2 swaps rows and columns. 0 leaves a tile
        unchanged.
    """
    if tiles.shape[1] != tiles.shape[2]:
        raise ValueError(f"tiles must be square to be flipped, not {tuple(tiles.shape[1:3])}")
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
    """Embed tiles with a student or any other network, in their order.

    Parameters
    ----------
    model
        Network from `load_backbone`, adapted or merged; or any module from (B, 3, H, W) to (B, D), with weights of any
        type.
    tiles
        Any object that slices to uint8 (n, H, W, 3): a `TileStore`, an array, a memory map.
    mean, std
        Pixel statistics (red, green, blue; 0 to 1) of the network's training. None: those of the student, or ImageNet's
        for another network.
    input_size
        Side in pixels that tiles are resized to. None: that of the student, or no resizing for another network.
    batch_size
        Tiles per batch.
    device
        None: the GPU if there is one. The model is moved there and stays there.

    Returns
    -------
    numpy.ndarray
        (N, D) float32, computed in eval mode. The mode of each module is restored.

    Raises
    ------
    ValueError
        For tiles that are not RGB with whole numbers from 0 to 255, invalid statistics, and a network that does not
        return one row of features per tile.

    Examples
    --------
    >>> import peka_lite as pk
    >>> tiles = pk.open_cohort("mini", slides=["MINI1"]).tiles
    >>> pk.embed_tiles(pk.load_backbone("mini"), tiles[:8]).shape
    (8, 192)

    A custom network:

    >>> from torch import nn
    >>> net = nn.Sequential(nn.Conv2d(3, 16, 8, stride=8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    >>> pk.embed_tiles(net, tiles[:8], mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5), input_size=64).shape
    (8, 16)
    """
    if not isinstance(model, nn.Module):
        raise ValueError(f"the network must be an nn.Module from (B, 3, H, W) to (B, D), not {model!r}")
    if (
        isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel)
        and get_registry_row(model.module) is not None
    ):
        model = model.module
    device, spec, n, out = torch.device(device or default_device()), get_registry_row(model), len(tiles), None
    name = type(model).__name__ if spec is None else spec.name
    options = _choose_pixel_options(spec, mean, std, input_size)
    if not n and spec is None:
        raise ValueError(f"there are no tiles, so the number of features of {name} is unknown")
    model.to(device)
    weight_dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    dtype = weight_dtype if spec is None else precision_for(spec, device)
    rows = [slice(i, min(i + batch_size, n)) for i in range(0, n, batch_size)]
    batches = Batches(tiles, rows, device=device)
    batches = progress_bar(batches, desc="embed tiles", unit=" batches", enabled=progress, leave=False)
    previous = None  # copied back one batch late, while the GPU computes the next one
    with _in_eval_mode(model):
        for part, batch in zip(rows, batches, strict=True):
            try:
                with torch.autocast(device.type, dtype, enabled=spec is not None and dtype != torch.float32):
                    features = extract_features(model, normalize_pixels(_to_uint8(batch), **options).to(weight_dtype))
            except torch.OutOfMemoryError as error:
                raise MemoryError(
                    f"{device} ran out of memory embedding {len(batch)} tiles of {name} at once; "
                    f"use --batch-size {max(1, batch_size // 2)} of `embed` and `predict` (batch_size=) for about half"
                ) from error
            _check_features(features, len(batch), spec, name)
            if out is None:
                out = np.empty((n, features.shape[1]), dtype=np.float32)
            if previous is not None:
                out[previous[0]] = previous[1].cpu().numpy()
            previous = part, features.float()
    if previous is not None:
        out[previous[0]] = previous[1].cpu().numpy()
    return np.empty((0, spec.dim), dtype=np.float32) if out is None else out


def _choose_pixel_options(spec: Backbone | None, mean, std, input_size) -> dict:
    """Return options of `normalize_pixels`: the arguments, or else the student's, or else ImageNet's unresized."""
    defaults = (*IMAGENET, None) if spec is None else (spec.mean, spec.std, spec.input_size)
    options = dict(zip(("mean", "std", "input_size"), defaults, strict=True))
    for name, value in (("mean", mean), ("std", std)):
        if value is not None:
            options[name] = tuple(np.atleast_1d(value).tolist())
            check_statistic(name, options[name])
    if input_size is not None:
        if not isinstance(input_size, int | np.integer) or input_size < 1:
            raise ValueError(f"input_size must be the side of a square in pixels, above 0, not {input_size!r}")
        options["input_size"] = int(input_size)
    return options


def _to_uint8(batch: torch.Tensor) -> torch.Tensor:
    """Return tiles as uint8. Tiles that are not RGB with values from 0 to 255 raise ValueError."""
    if batch.ndim != 4 or batch.shape[-1] != 3:
        raise ValueError(f"tiles must be RGB of shape (n, H, W, 3), not {tuple(batch.shape)}")
    if batch.dtype == torch.uint8:
        return batch
    is_integer = not batch.is_floating_point() and not batch.is_complex() and batch.dtype != torch.bool
    if not is_integer or (values := batch.long()).min() < 0 or values.max() > 255:
        raise ValueError(
            f"tiles must be whole numbers from 0 to 255 (uint8), not these {str(batch.dtype)[6:]}; convert a scale of "
            "0 to 1 by (255 * tiles).round().astype('uint8')"
        )
    return values.to(torch.uint8)


def _check_features(features, n: int, spec: Backbone | None, name: str) -> None:
    is_matrix = isinstance(features, torch.Tensor) and features.ndim == 2 and len(features) == n
    if not is_matrix or (spec is not None and features.shape[1] != spec.dim):
        shape = tuple(features.shape) if isinstance(features, torch.Tensor) else type(features).__name__
        raise ValueError(
            f"{name} returns {shape} for {n} tiles, not one row of {'D' if spec is None else spec.dim} features per "
            "tile; pool its output, or wrap it in a module that returns such rows"
        )


@contextmanager
def _in_eval_mode(model: nn.Module) -> Iterator[None]:
    """Put a model in eval mode, and restore the mode of each module afterwards."""
    training = [module for module in model.modules() if module.training]
    try:
        model.eval()
        yield
    finally:
        for module in training:
            module.training = True
