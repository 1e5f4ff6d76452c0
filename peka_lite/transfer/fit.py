"""Train a student with the losses of equations 4 to 6 of PEKA: one loop, top to bottom."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from torch import nn

from peka_lite._core._processes import Processes
from peka_lite._core.device import default_device
from peka_lite._core.hashing import row_ids
from peka_lite._core.progress import progress_bar, stage
from peka_lite.adapters._gradients import GradientCheck
from peka_lite.adapters.adapt import orthogonal_term
from peka_lite.backbones.embed import Batches, flip_tiles
from peka_lite.backbones.load import precision_for, preprocess
from peka_lite.transfer._checkpoint import hash_training_data, restore_checkpoint, save_checkpoint
from peka_lite.transfer.costs import explain_out_of_memory
from peka_lite.transfer.memory import checkpoint_blocks, compile_if_possible, frozen_dtype
from peka_lite.transfer.model import NotFinite, TransferModel, transfer_loss


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
    backbone, adapter, spec = model.backbone, model.backbone.adapter, model.backbone.spec
    device = torch.device(device or default_device())
    processes = Processes(device)
    piece = min(micro_batch or batch_size, -(-batch_size // processes.count), n)  # tiles at once on a device
    terms = {"tau": tau, "kd_weight": kd_weight, "ce_weight": ce_weight}

    # Model, targets, optimizer
    model.to(device)
    T = torch.from_numpy(np.ascontiguousarray(teacher, dtype=np.float32)).to(device)  # (N, D_t)
    y = torch.from_numpy(np.ascontiguousarray(labels, dtype=np.int64)).to(device)  # (N,)
    if model.kd_space == "logits" and any(p.requires_grad for p in model.classifier.parameters()):
        _fit_teacher_head(model.classifier, T, y, seed=seed)
    dtype = precision_for(spec, device)
    autocast = torch.autocast(device.type, dtype, enabled=dtype != torch.float32)
    params = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(params, lr=lr, fused=device.type == "cuda")
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)

    # Checkpoint of an earlier run
    settings = {
        "backbone": spec.name, "weights": backbone.weights_origin, "method": adapter.method, **adapter.options,
        "kd_space": model.kd_space, "teacher_dim": T.shape[1], "n_classes": model.n_classes,
        "hidden": model.projector[0].out_features, "batch_size": batch_size, "lr": lr, **terms, "augment": augment,
        "seed": seed, "data": hash_training_data(teacher, labels),
    }  # fmt: skip
    history: list[dict] = []
    if resume and checkpoint is not None and processes.same(Path(checkpoint).is_file()):
        history = restore_checkpoint(Path(checkpoint), model, optimizer, scaler, settings)
        if len(history) > epochs:
            raise ValueError(f"{checkpoint} has {len(history)} epochs, more than {epochs}; remove it to start over")
    if model.kd_space == "logits":
        with torch.no_grad():
            T = model.classifier(T)  # (N, n_classes), after the classifier was restored

    # Tiles without ids are hashed in the first epoch. Zeros match no row: a training that was finished reads no tiles.
    hash_tiles = not hasattr(tiles, "ids")
    learned_from = np.zeros(n, dtype=np.uint64) if hash_tiles else np.array(tiles.ids)
    gradients = GradientCheck(model, scaled=scaler.is_enabled())
    model.train()
    backbone.eval()  # frozen: no batch statistics or stochastic depth; only adapters use dropout
    for name in adapter.layers:
        backbone.get_submodule(name).train()

    steps = -(-n // batch_size)
    counts = {"total": epochs * steps, "initial": len(history) * steps}
    with (
        progress_bar(desc="transfer", unit=" steps", enabled=progress and processes.first, **counts) as bar,
        _save_memory(backbone, dtype, device, piece=piece, recompute=recompute),
        torch.random.fork_rng(devices=[device] if device.type == "cuda" else []),
    ):
        network = model
        optimizer.zero_grad(set_to_none=True)  # gradients of an earlier use of the model
        if compile and len(history) < epochs:
            network = _compile(model, piece=piece, device=device, autocast=autocast)
        for epoch in range(len(history), epochs):
            begun = time.perf_counter()
            order = np.random.default_rng((seed, epoch)).permutation(n)
            flips = np.random.default_rng((seed, epoch, 1)).integers(0, 8, n) if augment else None
            torch.manual_seed(seed * 1_000_003 + epoch + processes.rank * 7_919)  # dropout of LoRA and AdaLoRA
            plan = split_epoch(order, batch_size=batch_size, piece=piece, rank=processes.rank, count=processes.count)
            batches = Batches(tiles, [rows for pieces in plan for rows in pieces], device=device)
            queue, unchecked = iter(batches), None
            sums = torch.zeros(4, dtype=torch.float64, device=device)  # of loss, kd, ce and correct labels over tiles

            for step, pieces in enumerate(plan):
                for rows in pieces:
                    batch = next(queue)
                    if hash_tiles:
                        learned_from[rows] = row_ids(batch.cpu().numpy())
                    x = preprocess(flip_tiles(batch, flips[rows]) if augment else batch, spec)
                    at = torch.from_numpy(rows).to(device)
                    T_rows, y_rows = T[at], y[at]

                    with autocast:
                        z, logits = (network if len(rows) == piece else model)(x)
                    S = z if model.kd_space == "embedding" else logits
                    loss, kd, ce = transfer_loss(S, T_rows, logits, y_rows, **terms)
                    if adapter.tuner is not None:  # AdaLoRA
                        weight = adapter.tuner.peft_config["default"].orth_reg_weight
                        loss = loss + weight * orthogonal_term(backbone)
                    # The mean over the whole batch, however it is split into pieces and processes.
                    share = len(rows) / min(batch_size, n - step * batch_size)
                    scaler.scale(loss * share).backward()

                    sums[:3] += torch.stack([loss, kd, ce]).detach() * len(rows)
                    sums[3] += (logits.argmax(1) == y_rows).sum()
                    # Checked one piece later, so that the GPU already works on the next.
                    _require_finite(unchecked, lr=lr, terms=terms)
                    unchecked = loss.detach(), epoch, step, rows, (S.detach(), T_rows, logits.detach(), y_rows)

                processes.add_gradients(params)
                gradients.check_step()
                take_step(backbone, optimizer, scaler, epoch * steps + step + 1)
                bar.update()

            _require_finite(unchecked, lr=lr, terms=terms)
            if hash_tiles:
                ids = processes.add(torch.from_numpy(learned_from.view(np.int64)).to(device))
                learned_from, hash_tiles = ids.cpu().numpy().view(np.uint64), False
            row = dict(zip(("loss", "kd", "ce", "accuracy"), (processes.add(sums) / n).tolist(), strict=True))
            seconds = time.perf_counter() - begun
            history.append({"epoch": epoch, **row, "seconds": seconds, "waiting": batches.waited / seconds})
            bar.set_postfix(loss=f"{row['loss']:.3f}", accuracy=f"{row['accuracy']:.2f}")
            if epoch == epochs - 1:  # also check trainings with fewer steps than the check needs
                gradients.check_all()
            if checkpoint is not None and processes.first:
                save_checkpoint(Path(checkpoint), model, optimizer, scaler, settings, history)
    adapter.fitted_on = learned_from
    model.eval()
    return pd.DataFrame(history)


def split_epoch(
    order: np.ndarray, *, batch_size: int, piece: int, rank: int = 0, count: int = 1
) -> list[list[np.ndarray]]:
    """Split the rows of an epoch into steps, and those of a process in each step into pieces of at most `piece`."""
    shares = [order[start : start + batch_size][rank::count] for start in range(0, len(order), batch_size)]
    return [[rows[i : i + piece] for i in range(0, len(rows), piece)] for rows in shares]


def take_step(backbone: nn.Module, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler, step: int) -> None:
    """Take an optimizer step, the `step`-th from 1, update the ranks of AdaLoRA, and clear the gradients."""
    tuner = backbone.adapter.tuner  # of AdaLoRA only
    if tuner is not None:
        scaler.unscale_(optimizer)  # AdaLoRA ranks by unscaled gradients
        scale = scaler.get_scale()
    scaler.step(optimizer)
    scaler.update()
    if tuner is not None and scaler.get_scale() >= scale:  # else gradients overflowed and the step was skipped
        for p in backbone.parameters():
            if p.requires_grad and p.grad is None:
                p.grad = torch.zeros_like(p)  # of an unused layer; peft reads all gradients
        tuner.update_and_allocate(step)
    optimizer.zero_grad(set_to_none=True)


def _require_finite(piece: tuple | None, *, lr: float, terms: dict) -> None:
    """Raise `NotFinite` if the loss of a piece is not finite, naming the tiles that cause it."""
    if piece is None or torch.isfinite(piece[0]):
        return
    loss, epoch, step, rows, values = piece
    each = [transfer_loss(*(value[[i]] for value in values), **terms)[0] for i in range(len(rows))]
    bad = rows[(~torch.isfinite(torch.stack(each))).cpu().numpy()]
    bad = np.sort(bad if len(bad) else rows)
    shown = ", ".join(map(str, bad[:8])) + (", ..." if len(bad) > 8 else "")
    raise NotFinite(
        f"loss is {loss.item()} at epoch {epoch}, step {step}; try a lower lr than {lr}, or check "
        f"{len(bad)} of its {len(rows)} tiles, rows {shown}",
        bad.tolist(),
    )


@contextmanager
def _save_memory(
    backbone: nn.Module, dtype: torch.dtype, device: torch.device, *, piece: int, recompute: bool
) -> Iterator[None]:
    """Store frozen weights in `dtype` and, with `recompute`, no activations inside blocks; explain a lack of memory."""
    try:
        with frozen_dtype(backbone, dtype), checkpoint_blocks(backbone) if recompute else nullcontext():
            yield
    except torch.OutOfMemoryError as error:
        raise explain_out_of_memory(backbone, device, tiles=piece, recompute=recompute) from error


def _compile(model: TransferModel, *, piece: int, device: torch.device, autocast: torch.autocast) -> nn.Module:
    """Return the model compiled for `piece` tiles, or the model where a step with blank tiles fails."""
    x = torch.zeros(piece, 3, model.backbone.spec.input_size, model.backbone.spec.input_size, device=device)

    def step(network: nn.Module) -> torch.Tensor:
        with autocast:
            z, logits = network(x)
        return z.float().mean() + logits.float().mean()

    with stage("compiling"):
        return compile_if_possible(model, step)


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
    with stage("fitting the teacher's classifier"):
        # Twenty epochs as in the authors' code, but at least 1000 steps: with few spots an epoch has few steps.
        for _ in range(max(20, -(-1000 // -(-len(T) // 64)))):
            for rows in torch.randperm(len(T), generator=order).to(T.device).split(64):
                optimizer.zero_grad(set_to_none=True)
                F.cross_entropy(head(T[rows]), y[rows]).backward()
                optimizer.step()
    head.requires_grad_(False)
