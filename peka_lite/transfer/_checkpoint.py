"""Checkpoints of a transfer: written whole or not at all, refused where settings differ."""

from __future__ import annotations

import glob
import hashlib
import os
from pathlib import Path

import numpy as np
import torch

from peka_lite._core._torch_files import read_torch_file
from peka_lite._core.io import report_full_disk


def hash_training_data(teacher: np.ndarray, labels: np.ndarray) -> str:
    """Hash what a student learns from; 16 hex digits."""
    data = hashlib.sha256(np.ascontiguousarray(teacher, dtype=np.float32).tobytes())
    data.update(np.ascontiguousarray(labels, dtype=np.int64).tobytes())
    return data.hexdigest()[:16]


def save_checkpoint(path: Path, model, optimizer, scaler, settings: dict, history: list[dict]) -> None:
    """Write all that training needs to go on, under a temporary name first."""
    adapter = model.backbone.adapter
    state = {
        "settings": settings,
        "history": history,
        "weights": {n: p.detach() for n, p in model.named_parameters() if p.requires_grad or _kept_frozen(n)},
        "optimizer": optimizer.state_dict(),
        "scaler": scaler.state_dict(),
    }
    if adapter.tuner is not None:
        ranks = adapter.tuner.rankallocator
        state["ranks"] = {k: getattr(ranks, k) for k in ("ipt", "exp_avg_ipt", "exp_avg_unc")}
        state["rank_pattern"] = adapter.tuner.peft_config["default"].rank_pattern
    tensors = [*state["weights"].values()]
    tensors += [value for each in optimizer.state.values() for value in each.values() if torch.is_tensor(value)]
    path.parent.mkdir(parents=True, exist_ok=True)
    for stale in path.parent.glob(f".{glob.escape(path.name)}.*.partial"):
        stale.unlink(missing_ok=True)  # of a run that was killed while it wrote
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with report_full_disk(path, sum(tensor.nbytes for tensor in tensors)):
            try:
                torch.save(state, partial)
            except RuntimeError:
                with partial.open("ab") as file:  # PyTorch does not say why a write failed: the next one does
                    file.write(bytes(2**20))
                raise
            os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def restore_checkpoint(path: Path, model, optimizer, scaler, settings: dict) -> list[dict]:
    """Put a checkpoint back and return its history; other settings than its own are an error."""
    device, remove = next(model.parameters()).device, "remove it to start over"
    state = read_torch_file(path, what="a checkpoint of training", instead=remove, device=device, mmap=False)
    for key, want in settings.items():
        if state["settings"].get(key) != want:
            raise ValueError(
                f"{path} was made with {key}={state['settings'].get(key)}, not {want}; remove it to start over"
            )
    own = dict(model.named_parameters())
    with torch.no_grad():
        for name, value in state["weights"].items():
            own[name].copy_(value)
    optimizer.load_state_dict(state["optimizer"])
    scaler.load_state_dict(state["scaler"])
    if "ranks" in state:
        tuner = model.backbone.adapter.tuner
        for key, value in state["ranks"].items():
            setattr(tuner.rankallocator, key, value)
        tuner.peft_config["default"].rank_pattern = state["rank_pattern"]
    return state["history"]


def _kept_frozen(name: str) -> bool:
    return "ranknum" in name or name.startswith("classifier.")  # the teacher head of kd_space="logits"
