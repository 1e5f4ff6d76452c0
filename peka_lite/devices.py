"""Where to compute, and in which number type."""

from __future__ import annotations

import os
from collections.abc import Mapping

import torch

from peka_lite.registry import PRECISION


def default_device() -> str:
    """Return ``"cuda"`` where PyTorch sees a GPU, else ``"cpu"``; of several processes each has a GPU of its own."""
    if not torch.cuda.is_available():
        return "cpu"
    return f"cuda:{os.environ['LOCAL_RANK']}" if "LOCAL_RANK" in os.environ else "cuda"


def compute_dtype(device: str | torch.device, *, precision: Mapping[str, torch.dtype] = PRECISION) -> torch.dtype:
    """Return the compute type for a device; `precision` has the keys of `PRECISION`."""
    if torch.device(device).type != "cuda":
        return precision["cpu"]
    modern = torch.cuda.get_device_capability(device) >= (8, 0)
    return precision["cuda>=8.0" if modern else "cuda<8.0"]
