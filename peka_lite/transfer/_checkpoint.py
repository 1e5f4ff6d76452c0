"""Write training checkpoints atomically and restore them if the settings are the same."""

from __future__ import annotations

import glob
import hashlib
import os
from pathlib import Path

import numpy as np
import torch

from peka_lite._core._torch_files import read_torch_file
from peka_lite._core.io import open_new_file


def hash_training_data(teacher: np.ndarray, labels: np.ndarray) -> str:
    """Hash teacher embeddings and pseudo-labels to 16 hex digits."""
    data = hashlib.sha256(np.ascontiguousarray(teacher, dtype=np.float32).tobytes())
    data.update(np.ascontiguousarray(labels, dtype=np.int64).tobytes())
    return data.hexdigest()[:16]


def save_checkpoint(path: Path, model, optimizer, scaler, settings: dict, history: list[dict]) -> None:
    """Write the state needed to resume training, by an atomic replace."""
    tuner = model.backbone.adapter.tuner
    state = {
        "settings": settings,
        "history": history,
        "weights": {
            name: p.detach()
            for name, p in model.named_parameters()
            # Frozen: the ranks of AdaLoRA, and the teacher head of kd_space="logits".
            if p.requires_grad or "ranknum" in name or name.startswith("classifier.")
        },
        "optimizer": optimizer.state_dict(),
        "scaler": scaler.state_dict(),
    }
    if tuner is not None:
        state["ranks"] = {k: getattr(tuner.rankallocator, k) for k in ("ipt", "exp_avg_ipt", "exp_avg_unc")}
        state["rank_pattern"] = tuner.peft_config["default"].rank_pattern
    tensors = [*state["weights"].values()]
    tensors += [value for each in optimizer.state.values() for value in each.values() if torch.is_tensor(value)]
    path.parent.mkdir(parents=True, exist_ok=True)
    for stale in path.parent.glob(f".{glob.escape(path.name)}.*.partial"):
        stale.unlink(missing_ok=True)  # of a run killed while writing
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    with open_new_file(partial, sum(tensor.nbytes for tensor in tensors), of=path) as file:
        torch.save(state, file)
    os.replace(partial, path)


def restore_checkpoint(path: Path, model, optimizer, scaler, settings: dict) -> list[dict]:
    """Restore a checkpoint and return its history; raise a ValueError if the settings differ."""
    device, remove = next(model.parameters()).device, "remove it to start over"
    state = read_torch_file(path, kind="a checkpoint of training", instead=remove, device=device, mmap=False)
    for key, value in settings.items():
        if state["settings"].get(key) != value:
            raise ValueError(
                f"{path} was written with {key}={state['settings'].get(key)}, not {value}; remove it to start over"
            )
    params = dict(model.named_parameters())
    with torch.no_grad():
        for name, value in state["weights"].items():
            params[name].copy_(value)
    optimizer.load_state_dict(state["optimizer"])
    scaler.load_state_dict(state["scaler"])
    if "ranks" in state:
        tuner = model.backbone.adapter.tuner
        for key, value in state["ranks"].items():
            setattr(tuner.rankallocator, key, value)
        tuner.peft_config["default"].rank_pattern = state["rank_pattern"]
    return state["history"]
