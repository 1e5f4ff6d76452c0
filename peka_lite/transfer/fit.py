"""Train a student with the losses of equations 4 to 6 of PEKA."""

from __future__ import annotations

import os
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from torch import nn

from peka_lite._core._processes import Processes
from peka_lite._core.device import default_device
from peka_lite._core.progress import Stage, progress_bar
from peka_lite.backbones.load import precision_for
from peka_lite.transfer._checkpoint import hash_training_data, restore_checkpoint, save_checkpoint
from peka_lite.transfer._epochs import Epochs
from peka_lite.transfer.costs import explain_out_of_memory
from peka_lite.transfer.memory import checkpoint_blocks, compile_if_possible, frozen_dtype
from peka_lite.transfer.model import TransferModel


def fit(
    model: TransferModel,
    tiles,
    teacher: np.ndarray,
    labels: np.ndarray,
    *,
    epochs: int = 50,
    batch_size: int = 32,
    lr: float = 1e-4,
    tau: float = 2.0,
    kd_weight: float = 0.5,
    ce_weight: float = 0.5,
    augment: bool = False,
    seed: int = 0,
    micro_batch: int | None = None,
    recompute: bool = False,
    compile: bool = False,
    device: str | None = None,
    checkpoint: str | os.PathLike | None = None,
    resume: bool = False,
    progress: bool = False,
) -> pd.DataFrame:
    """Train adapters, projector and classifier of a student with a frozen backbone.

    Uses Adam without a schedule. The `row_ids` of the training tiles are stored as
    ``model.backbone.adapter.fitted_on``. Order, flips and dropout of each epoch depend only on `seed` and the epoch,
    so a resumed run ends with the same weights as an uninterrupted one on the same CPU. Under ``accelerate launch``
    the processes share each batch, and the result equals that of one process up to rounding.

    Parameters
    ----------
    model
        Trained in place and left in eval mode.
    tiles
        (N, H, W, 3) uint8; any object that can be indexed by an array of rows.
    teacher
        (N, D_t) float32 teacher embeddings of the same rows.
    labels
        (N,) int64 pseudo-labels of the same rows.
    batch_size
        Tiles per step, over all processes.
    augment
        Flip and rotate every tile at random in each epoch (`flip_tiles`).
    micro_batch
        Tiles at once on a device; None takes the whole batch. Saves memory; gradients are the same up to rounding.
    recompute
        Recompute each block in the backward pass (`checkpoint_blocks`): far less memory, a third more time.
    compile
        Use `torch.compile`; if it fails, warn and train without it.
    checkpoint
        File written atomically after every epoch.
    resume
        Continue from `checkpoint` if it exists; its settings and data must be the same.

    Returns
    -------
    pandas.DataFrame
        One row per epoch: epoch, loss, kd, ce, accuracy (of the pseudo-labels, during training), seconds, waiting
        (share of the seconds spent waiting for tiles).

    Raises
    ------
    FloatingPointError
        If the loss is not finite; names epoch, step and tiles. The checkpoint is that of the epoch before.
    MemoryError
        If the GPU runs out of memory; names options that need less.
    ValueError
        If numbers of rows differ, the checkpoint has other settings, or adapted layers had no gradient in the first
        three steps; names the layers.

    Examples
    --------
    >>> import numpy as np
    >>> import peka_lite as pk
    >>> tiles = pk.open_cohort("mini", slides=["MINI1"]).tiles[:8]
    >>> teacher = np.random.default_rng(0).normal(size=(8, 6)).astype(np.float32)
    >>> student = pk.adapt(pk.load_backbone("mini"), "bone", r=32)
    >>> model = pk.transfer.TransferModel(student, teacher_dim=6, n_classes=2)
    >>> history = pk.fit(model, tiles, teacher, np.arange(8) % 2, epochs=3, batch_size=8, lr=1e-3)
    >>> len(history), bool(history["loss"].iloc[-1] < history["loss"].iloc[0])
    (3, True)
    """
    n = len(tiles)
    _check(model, n, teacher, labels, epochs=epochs, batch_size=batch_size, tau=tau, micro_batch=micro_batch)
    adapter, spec = model.backbone.adapter, model.backbone.spec
    device = torch.device(device or default_device())
    processes = Processes(device)
    model.to(device)
    T = torch.from_numpy(np.ascontiguousarray(teacher, dtype=np.float32)).to(device)  # (N, D_t)
    y = torch.from_numpy(np.ascontiguousarray(labels, dtype=np.int64)).to(device)  # (N,)
    if model.kd_space == "logits" and any(p.requires_grad for p in model.classifier.parameters()):
        with Stage("fitting the teacher's classifier"):
            _fit_teacher_head(model.classifier, T, y, seed=seed)

    dtype = precision_for(spec, device)
    params = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(params, lr=lr, fused=device.type == "cuda")
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    settings = {
        "backbone": spec.name, "weights": model.backbone.weights_origin, "method": adapter.method, **adapter.options,
        "kd_space": model.kd_space, "teacher_dim": T.shape[1], "n_classes": model.n_classes,
        "hidden": model.projector[0].out_features, "batch_size": batch_size, "lr": lr, "tau": tau,
        "kd_weight": kd_weight, "ce_weight": ce_weight, "augment": augment, "seed": seed,
        "data": hash_training_data(teacher, labels),
    }  # fmt: skip
    history: list[dict] = []
    if resume and checkpoint is not None and processes.same(Path(checkpoint).is_file()):
        history = restore_checkpoint(Path(checkpoint), model, optimizer, scaler, settings)
        if len(history) > epochs:
            raise ValueError(f"{checkpoint} has {len(history)} epochs, more than {epochs}; remove it to start over")
    if model.kd_space == "logits":
        with torch.no_grad():
            T = model.classifier(T)  # (N, n_classes)

    loop = Epochs(
        model, tiles, T, y, optimizer, scaler, processes, device, dtype,
        loss={"tau": tau, "kd_weight": kd_weight, "ce_weight": ce_weight}, batch_size=batch_size,
        piece=min(micro_batch or batch_size, -(-batch_size // processes.count), n), augment=augment, seed=seed,
    )  # fmt: skip
    steps = -(-n // batch_size)
    counts = {"total": epochs * steps, "initial": len(history) * steps}
    with ExitStack() as stack:
        bar = stack.enter_context(
            progress_bar(desc="transfer", unit=" steps", enabled=progress and processes.first, **counts)
        )
        stack.enter_context(frozen_dtype(model.backbone, dtype))
        if recompute:
            stack.enter_context(checkpoint_blocks(model.backbone))
        try:
            if compile and len(history) < epochs:
                with Stage("compiling"):
                    loop.network = compile_if_possible(model, loop.trial)
            for epoch in range(len(history), epochs):
                history.append(loop.run(epoch, bar))
                if epoch == epochs - 1:  # also check trainings with fewer steps than the check needs
                    loop.gradients.check_all()
                bar.set_postfix(loss=f"{history[-1]['loss']:.3f}", accuracy=f"{history[-1]['accuracy']:.2f}")
                if checkpoint is not None and processes.first:
                    save_checkpoint(Path(checkpoint), model, optimizer, scaler, settings, history)
        except torch.OutOfMemoryError as error:
            raise explain_out_of_memory(model.backbone, device, tiles=loop.piece, recompute=recompute) from error
    adapter.fitted_on = loop.learned_from
    model.eval()
    return pd.DataFrame(history)


def _check(model: TransferModel, n: int, teacher, labels, **positive) -> None:
    if getattr(model.backbone, "adapter", None) is None:
        raise ValueError("the student has no adapter: adapt it first; method 'none' keeps it frozen")
    if not len(teacher) == len(labels) == n:
        raise ValueError(
            f"{n} tiles, {len(teacher)} teacher embeddings and {len(labels)} labels: give one of each per row"
        )
    if np.shape(teacher)[1:] != (model.projector[-1].out_features,):
        raise ValueError(f"teacher is {np.shape(teacher)}, the projector's width is {model.projector[-1].out_features}")
    if labels.min() < 0 or labels.max() >= model.n_classes:
        raise ValueError(f"labels are {labels.min()} to {labels.max()}, the classifier has {model.n_classes} classes")
    for name, value in positive.items():
        if value is not None and value <= 0:
            raise ValueError(f"{name} must be above 0, not {value}")


def _fit_teacher_head(head: nn.Module, T: torch.Tensor, y: torch.Tensor, *, seed: int) -> None:
    """Train a classifier of pseudo-labels on teacher embeddings, then freeze it."""
    optimizer = torch.optim.Adam(head.parameters(), lr=1e-3)
    order = torch.Generator().manual_seed(seed)
    # Twenty epochs as in the authors' code, but at least 1000 steps: with few spots an epoch has few steps.
    for _ in range(max(20, -(-1000 // -(-len(T) // 64)))):
        for rows in torch.randperm(len(T), generator=order).to(T.device).split(64):
            optimizer.zero_grad(set_to_none=True)
            F.cross_entropy(head(T[rows]), y[rows]).backward()
            optimizer.step()
    head.requires_grad_(False)
