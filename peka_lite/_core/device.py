"""Choose the device and the number type of computations."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING

from peka_lite._core._lazy import LazyMapping

if TYPE_CHECKING:
    import torch

# bfloat16 needs compute capability 8.0 (Ampere); V100 and T4 have tensor cores for float16 only.
PRECISION = LazyMapping({"cpu": "torch:float32", "cuda<8.0": "torch:float16", "cuda>=8.0": "torch:bfloat16"})


def default_device() -> str:
    """Return ``"cuda"`` if PyTorch finds a GPU, else ``"cpu"``; each of several processes gets another GPU.

    Examples
    --------
    >>> import torch
    >>> import peka_lite as pk
    >>> torch.zeros(3, device=pk.backbones.default_device()).is_cuda == torch.cuda.is_available()
    True
    """
    import torch  # imported late, since checking settings does not need PyTorch

    if not torch.cuda.is_available():
        return "cpu"
    return f"cuda:{os.environ['LOCAL_RANK']}" if "LOCAL_RANK" in os.environ else "cuda"


def compute_dtype(device: str | torch.device, *, precision: Mapping[str, torch.dtype] = PRECISION) -> torch.dtype:
    """Return the number type for a device; `precision` has the keys of `PRECISION`.

    Examples
    --------
    >>> import torch
    >>> import peka_lite as pk
    >>> pk.backbones.compute_dtype("cpu")
    torch.float32
    >>> pk.backbones.compute_dtype("cpu", precision={"cpu": torch.bfloat16})
    torch.bfloat16
    """
    import torch

    if torch.device(device).type != "cuda":
        return precision["cpu"]
    modern = torch.cuda.get_device_capability(device) >= (8, 0)
    return precision["cuda>=8.0" if modern else "cuda<8.0"]
