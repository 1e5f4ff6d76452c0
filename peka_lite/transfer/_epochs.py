"""Train one epoch in micro-batches, on one or more processes, and check every loss."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import nn

from peka_lite._core._processes import Processes
from peka_lite._core.hashing import row_ids
from peka_lite.adapters._gradients import GradientCheck
from peka_lite.adapters.adapt import orthogonal_term
from peka_lite.backbones.embed import Batches, flip_tiles
from peka_lite.backbones.load import preprocess
from peka_lite.transfer.losses import NotFinite, transfer_loss


@dataclass
class Epochs:
    """Data, model and settings shared by all epochs of one `fit`.

    Attributes
    ----------
    model, network
        The `TransferModel`, and the network called for pieces of `piece` tiles: the model or its compiled form.
    tiles, T, y
        Uint8 tiles; (N, D) targets that the student is compared with, and (N,) labels, both on the device.
    loss
        tau, kd_weight and ce_weight.
    piece
        Largest number of tiles at once on a device.
    learned_from
        (N,) uint64 ids of the tiles; computed in the first epoch where the tiles have none.
    gradients
        Stops training if adapters get no gradient.
    """

    model: nn.Module
    tiles: object
    T: torch.Tensor
    y: torch.Tensor
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    processes: Processes
    device: torch.device
    dtype: torch.dtype
    loss: dict
    batch_size: int
    piece: int
    augment: bool
    seed: int
    network: nn.Module = field(init=False)
    learned_from: np.ndarray = field(init=False)
    gradients: GradientCheck = field(init=False)
    _unnamed: bool = field(init=False)

    def __post_init__(self):
        self.network, n = self.model, len(self.tiles)
        self.gradients = GradientCheck(self.model, scaled=self.scaler.is_enabled())
        self._unnamed = not hasattr(self.tiles, "ids")
        # Zeros match no row: a resumed training that was already finished reads no tiles.
        self.learned_from = np.zeros(n, dtype=np.uint64) if self._unnamed else np.array(self.tiles.ids)

    def run(self, epoch: int, bar) -> dict:
        """Train on all tiles once and return a row of the history."""
        start_time, n = time.perf_counter(), len(self.tiles)
        order = np.random.default_rng((self.seed, epoch)).permutation(n)
        flips = np.random.default_rng((self.seed, epoch, 1)).integers(0, 8, n) if self.augment else None
        pieces = self._pieces(order)
        batches = Batches(self.tiles, [rows for rows, _, _ in pieces if len(rows)], device=self.device)
        queue, pending, steps = iter(batches), None, -(-n // self.batch_size)
        sums = torch.zeros(4, dtype=torch.float64, device=self.device)
        params = [p for group in self.optimizer.param_groups for p in group["params"]]
        self.optimizer.zero_grad(set_to_none=True)
        self._training_mode()
        with torch.random.fork_rng(devices=[self.device] if self.device.type == "cuda" else []):
            torch.manual_seed(self.seed * 1_000_003 + epoch + self.processes.rank * 7_919)  # dropout of LoRA, AdaLoRA
            step = 0
            for rows, in_batch, last in pieces:
                if len(rows):
                    batch = next(queue)
                    if self._unnamed:
                        self.learned_from[rows] = row_ids(batch.cpu().numpy())
                    x = preprocess(flip_tiles(batch, flips[rows]) if self.augment else batch, self.model.backbone.spec)
                    loss, kd, ce, correct, seen = self.losses(x, torch.from_numpy(rows).to(self.device))
                    # The mean over the whole batch, however it is split into pieces and processes.
                    share = len(rows) / in_batch
                    self.scaler.scale(loss * share).backward()
                    sums += torch.stack([loss.detach() * len(rows), kd.detach() * len(rows),
                                         ce.detach() * len(rows), correct.sum()])  # fmt: skip
                    # Checked one piece later, so that the GPU already works on the next.
                    self._check(pending)
                    pending = epoch, step, rows, loss.detach(), seen
                if last:
                    self.processes.add_gradients(params)
                    self.gradients.check_step()
                    self._update(epoch * steps + step + 1)
                    step += 1
                    bar.update()
        self._check(pending)
        if self._unnamed:
            ids = torch.from_numpy(self.learned_from.view(np.int64)).to(self.device)
            self.learned_from = self.processes.add(ids).cpu().numpy().view(np.uint64)
        self._unnamed = False
        loss, kd, ce, accuracy = (self.processes.add(sums) / n).tolist()
        seconds = time.perf_counter() - start_time
        return {"epoch": epoch, "loss": loss, "kd": kd, "ce": ce, "accuracy": accuracy, "seconds": seconds,
                "waiting": batches.waited / seconds}  # fmt: skip

    def losses(self, x: torch.Tensor, at: torch.Tensor, *, network: nn.Module | None = None) -> tuple:
        """Return loss, its two parts, a mask of correct labels, and the inputs of `_check`, for normalized images."""
        if network is None:
            network = self.network if len(x) == self.piece else self.model
        adapter = self.model.backbone.adapter
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
            z, logits = network(x)
        compared, T, y = z if self.model.kd_space == "embedding" else logits, self.T[at], self.y[at]
        loss, kd, ce = transfer_loss(compared, T, logits, y, **self.loss)
        if adapter.method == "adalora":
            weight = adapter.tuner.peft_config["default"].orth_reg_weight
            loss = loss + weight * orthogonal_term(self.model.backbone)
        return loss, kd, ce, logits.argmax(1) == y, (compared.detach(), T, logits.detach(), y)

    def trial(self, network: nn.Module) -> torch.Tensor:
        """Return the loss of a piece of blank tiles, to test a network; the random state is not changed."""
        self._training_mode()
        size = self.model.backbone.spec.input_size
        x = torch.zeros(self.piece, 3, size, size, device=self.device)
        with torch.random.fork_rng(devices=[self.device] if self.device.type == "cuda" else []):
            return self.losses(x, torch.arange(self.piece, device=self.device), network=network)[0]

    def _pieces(self, order: np.ndarray) -> list[tuple[np.ndarray, int, bool]]:
        """Split an epoch into (rows of this process, tiles in their batch, whether the piece ends a step)."""
        pieces = []
        for start in range(0, len(order), self.batch_size):
            batch = order[start : start + self.batch_size]
            local = batch[self.processes.rank :: self.processes.count]
            cut = [local[i : i + self.piece] for i in range(0, max(len(local), 1), self.piece)]
            pieces += [(rows, len(batch), rows is cut[-1]) for rows in cut]
        return pieces

    def _update(self, step: int) -> None:
        """Take one optimizer step, and update the ranks of AdaLoRA."""
        adapter = self.model.backbone.adapter
        if adapter.method != "adalora":
            self.scaler.step(self.optimizer)
            self.scaler.update()
        else:
            self.scaler.unscale_(self.optimizer)  # AdaLoRA ranks by unscaled gradients
            scale = self.scaler.get_scale()
            self.scaler.step(self.optimizer)
            self.scaler.update()
            if self.scaler.get_scale() >= scale:  # else gradients overflowed and the step was skipped
                for p in self.model.backbone.parameters():
                    if p.requires_grad and p.grad is None:
                        p.grad = torch.zeros_like(p)  # of an unused layer; peft reads all gradients
                adapter.tuner.update_and_allocate(step)
        self.optimizer.zero_grad(set_to_none=True)

    def _training_mode(self) -> None:
        self.model.train()
        self.model.backbone.eval()  # frozen: no batch statistics or stochastic depth; only adapters use dropout
        for name in self.model.backbone.adapter.layers:
            self.model.backbone.get_submodule(name).train()

    def _check(self, pending) -> None:
        """Raise `NotFinite` for a loss that is not finite, naming the tiles that cause it."""
        if pending is None or torch.isfinite(pending[3]):
            return
        epoch, step, rows, loss, (compared, T, logits, y) = pending
        losses = torch.stack(
            [transfer_loss(compared[[i]], T[[i]], logits[[i]], y[[i]], **self.loss)[0] for i in range(len(rows))]
        )
        bad = rows[(~torch.isfinite(losses)).cpu().numpy()]
        bad = np.sort(bad if len(bad) else rows)
        lr = self.optimizer.param_groups[0]["lr"]
        shown = ", ".join(map(str, bad[:8])) + (", ..." if len(bad) > 8 else "")
        raise NotFinite(
            f"loss is {loss.item()} at epoch {epoch}, step {step}; try a lower lr than {lr}, or check "
            f"{len(bad)} of its {len(rows)} tiles, rows {shown}",
            bad.tolist(),
        )
