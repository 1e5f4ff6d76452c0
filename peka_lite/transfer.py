"""Knowledge transfer: the two losses, and the loop that teaches a student with them."""

from __future__ import annotations

import os
import time
from pathlib import Path

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from torch import nn
from tqdm.auto import tqdm

from peka_lite._checkpoint import digest, restore_checkpoint, save_checkpoint
from peka_lite.adapters import orthogonal_term
from peka_lite.backbones import pooled, precision_for, preprocess
from peka_lite.devices import default_device
from peka_lite.provenance import row_ids

KD_SPACES = ("embedding", "logits")


class TransferModel(nn.Module):
    """A student with a projector into the teacher's space and a classifier of pseudo-labels on top.

    Parameters
    ----------
    backbone
        Student from `load_backbone`, adapted by `adapt`.
    teacher_dim
        Width D_t of the teacher's embedding.
    n_classes
        Number of pseudo-labels.
    hidden
        Width of the hidden layer of the projector, and of the teacher head.
    kd_space
        ``"embedding"``: the student's projection is compared with the teacher's embedding (the paper's equation 4),
        and a linear classifier reads the pseudo-label from the student's features beside it. ``"logits"``: a
        classifier of teacher embeddings (two layers) is trained first and frozen; both losses compare what it says
        of the student's projection with what it says of the teacher, and with the label (the authors' code).
    seed
        Decides the random start of projector and classifier.
    """

    def __init__(
        self,
        backbone: nn.Module,
        *,
        teacher_dim: int,
        n_classes: int,
        hidden: int = 512,
        kd_space: str = "embedding",
        seed: int = 0,
    ):
        super().__init__()
        if kd_space not in KD_SPACES:
            raise ValueError(f"unknown kd_space {kd_space!r}; known: {', '.join(KD_SPACES)}")
        self.backbone, self.kd_space, self.n_classes = backbone, kd_space, n_classes
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            self.projector = _mlp(backbone.spec.dim, hidden, teacher_dim)
            self.classifier = (
                nn.Linear(backbone.spec.dim, n_classes)
                if kd_space == "embedding"
                else _mlp(teacher_dim, hidden, n_classes)
            )

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Map normalised images (B, 3, H, W) to a projection (B, D_t) and label logits (B, n_classes)."""
        features = pooled(self.backbone, x)  # (B, D_s)
        z = self.projector(features)
        return z, self.classifier(features if self.kd_space == "embedding" else z)


def transfer_loss(
    student: torch.Tensor,
    teacher: torch.Tensor,
    logits: torch.Tensor,
    labels: torch.Tensor,
    *,
    tau: float = 2.0,
    kd_weight: float = 0.5,
    ce_weight: float = 0.5,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return PEKA's loss and its two parts (arXiv:2504.07061, equations 4 to 6).

    ``kd_weight * KL(softmax(T / tau) || softmax(S / tau)) + ce_weight * CrossEntropy(logits, labels)``, both averaged
    over the batch. The equation has no factor tau squared, so neither has this.

    Parameters
    ----------
    student, teacher
        S and T, (B, D) float32: embeddings, or logits where the distillation space is ``"logits"``.
    logits
        (B, n_classes) float32.
    labels
        (B,) int64.
    tau
        Temperature; the paper gives none, 2.0 is the authors' configuration.

    Examples
    --------
    >>> T = torch.tensor([[1.0, 2.0]])
    >>> total, kd, ce = transfer_loss(T, T, torch.tensor([[0.0, 0.0]]), torch.tensor([1]))
    >>> round(kd.item(), 4), round(ce.item(), 4), round(total.item(), 4)
    (0.0, 0.6931, 0.3466)
    """
    kd = F.kl_div(
        F.log_softmax(student.float() / tau, dim=-1),
        F.log_softmax(teacher.float() / tau, dim=-1),
        reduction="batchmean",
        log_target=True,
    )
    ce = F.cross_entropy(logits.float(), labels)
    return kd_weight * kd + ce_weight * ce, kd, ce


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
    seed: int = 0,
    device: str | None = None,
    checkpoint: str | os.PathLike | None = None,
    resume: bool = False,
    progress: bool = False,
) -> pd.DataFrame:
    """Teach the student: only adapters, projector and classifier learn; the backbone stays as it was.

    ``model.backbone.adapter.fitted_on`` keeps the `row_ids` of the tiles it learned from.
    Adam without schedule. Every epoch's order and dropout follow from `seed` and the epoch's number, so a resumed
    run ends in the same weights as an unbroken one on the same CPU.

    Parameters
    ----------
    model
        Trained in place and left in eval mode.
    tiles
        (N, H, W, 3) uint8: anything that can be indexed by an array of rows.
    teacher
        (N, D_t) float32 teacher embeddings of the same rows.
    labels
        (N,) int64 pseudo-labels of the same rows.
    checkpoint
        File written after every epoch, whole or not at all.
    resume
        Go on from `checkpoint` if it is there; it must come from the same settings and data.

    Returns
    -------
    pandas.DataFrame
        One row an epoch: epoch, loss, kd, ce, accuracy (of the pseudo-labels, on the fly), seconds.

    Raises
    ------
    FloatingPointError
        When the loss stops being finite, with its epoch and step.
    ValueError
        When rows disagree, or the checkpoint comes from other settings.
    """
    n = len(tiles)
    if not len(teacher) == len(labels) == n:
        raise ValueError(
            f"{n} tiles, {len(teacher)} teacher embeddings and {len(labels)} labels: one row each is needed"
        )
    if np.shape(teacher)[1:] != (model.projector[-1].out_features,):
        raise ValueError(f"teacher is {np.shape(teacher)}, the projector gives {model.projector[-1].out_features}")
    if labels.min() < 0 or labels.max() >= model.n_classes:
        raise ValueError(f"labels run from {labels.min()} to {labels.max()}, the classifier has {model.n_classes}")
    if epochs < 1 or batch_size < 1 or tau <= 0:
        raise ValueError(f"epochs, batch_size and tau must be above 0, not {epochs}, {batch_size}, {tau}")
    adapter, spec, steps = model.backbone.adapter, model.backbone.spec, -(-n // batch_size)
    device = device or default_device()
    model.to(device)
    T = torch.from_numpy(np.ascontiguousarray(teacher, dtype=np.float32)).to(device)  # (N, D_t)
    y = torch.from_numpy(np.ascontiguousarray(labels, dtype=np.int64)).to(device)  # (N,)
    if model.kd_space == "logits" and any(p.requires_grad for p in model.classifier.parameters()):
        _fit_teacher_head(model.classifier, T, y, seed=seed)

    dtype = precision_for(spec, device)
    learn = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(learn, lr=lr)
    scaler = torch.amp.GradScaler(torch.device(device).type, enabled=dtype == torch.float16)
    settings = {
        "backbone": spec.name, "weights": model.backbone.weights_origin, "method": adapter.method, **adapter.options,
        "kd_space": model.kd_space, "teacher_dim": T.shape[1], "n_classes": model.n_classes,
        "hidden": model.projector[0].out_features, "batch_size": batch_size, "lr": lr, "tau": tau,
        "kd_weight": kd_weight, "ce_weight": ce_weight, "seed": seed, "data": digest(teacher, labels),
    }  # fmt: skip
    history: list[dict] = []
    if resume and checkpoint is not None and Path(checkpoint).is_file():
        history = restore_checkpoint(Path(checkpoint), model, optimizer, scaler, settings)
        if len(history) > epochs:
            raise ValueError(f"{checkpoint} is past {epochs} epochs, at {len(history)}; remove it to start over")
    if model.kd_space == "logits":
        with torch.no_grad():
            T = model.classifier(T)  # (N, n_classes): what the student is compared with

    bar = tqdm(total=epochs * steps, initial=len(history) * steps, desc="transfer", unit="step", disable=not progress)
    first, learned_from = len(history), np.array(getattr(tiles, "ids", np.zeros(n)), dtype=np.uint64)
    # Tiles without ids are known once read; of a finished student nothing is read, and zeros are nobody's rows.
    for epoch in range(first, epochs):
        start, sums = time.perf_counter(), torch.zeros(4, dtype=torch.float64)
        order = np.random.default_rng((seed, epoch)).permutation(n)
        model.train()
        model.backbone.eval()  # frozen: no batch statistics, no stochastic depth; only adapters may drop out
        for name in adapter.layers:
            model.backbone.get_submodule(name).train()
        with torch.random.fork_rng(devices=[device] if torch.device(device).type == "cuda" else []):
            torch.manual_seed(seed * 1_000_003 + epoch)  # dropout of LoRA and AdaLoRA
            for step in range(steps):
                rows = order[step * batch_size : (step + 1) * batch_size]
                batch = np.ascontiguousarray(tiles[rows])
                if not hasattr(tiles, "ids") and epoch == first:
                    learned_from[rows] = row_ids(batch)
                x = preprocess(torch.from_numpy(batch).to(device), spec)
                at = torch.from_numpy(rows).to(device)
                with torch.autocast(torch.device(device).type, dtype, enabled=dtype != torch.float32):
                    z, logits = model(x)
                compared = z if model.kd_space == "embedding" else logits
                loss, kd, ce = transfer_loss(
                    compared, T[at], logits, y[at], tau=tau, kd_weight=kd_weight, ce_weight=ce_weight
                )
                if adapter.method == "adalora":
                    loss = loss + adapter.tuner.peft_config["default"].orth_reg_weight * orthogonal_term(model.backbone)
                if not torch.isfinite(loss):
                    raise FloatingPointError(
                        f"loss is {loss.item()} at epoch {epoch}, step {step}; try a lower lr than {lr}"
                    )
                optimizer.zero_grad(set_to_none=True)
                scaler.scale(loss).backward()
                scaler.step(optimizer)
                scaler.update()
                if adapter.method == "adalora":
                    adapter.tuner.update_and_allocate(epoch * steps + step + 1)
                right = (logits.argmax(1) == y[at]).sum()
                sums += torch.stack(
                    [loss.detach() * len(rows), kd.detach() * len(rows), ce.detach() * len(rows), right]
                ).cpu()
                bar.update()
        loss, kd, ce, accuracy = (sums / n).tolist()
        seconds = time.perf_counter() - start
        history.append({"epoch": epoch, "loss": loss, "kd": kd, "ce": ce, "accuracy": accuracy, "seconds": seconds})
        bar.set_postfix(loss=f"{loss:.3f}", accuracy=f"{accuracy:.2f}")
        if checkpoint is not None:
            save_checkpoint(Path(checkpoint), model, optimizer, scaler, settings, history)
    bar.close()
    adapter.fitted_on = learned_from
    model.eval()
    return pd.DataFrame(history)


def _mlp(into: int, hidden: int, out: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(into, hidden), nn.GELU(), nn.Linear(hidden, out))


def _fit_teacher_head(head: nn.Module, T: torch.Tensor, y: torch.Tensor, *, seed: int) -> None:
    """Teach a classifier to name a teacher embedding's cluster, then freeze it."""
    optimizer = torch.optim.Adam(head.parameters(), lr=1e-3)
    order = torch.Generator().manual_seed(seed)
    # Twenty passes as the authors', but at least a thousand steps: few spots make few steps a pass.
    for _ in range(max(20, -(-1000 // -(-len(T) // 64)))):
        for rows in torch.randperm(len(T), generator=order).to(T.device).split(64):
            optimizer.zero_grad(set_to_none=True)
            F.cross_entropy(head(T[rows]), y[rows]).backward()
            optimizer.step()
    head.requires_grad_(False)
