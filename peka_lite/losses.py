"""PEKA's two losses, and what to say when they stop being numbers."""

from __future__ import annotations

import torch
import torch.nn.functional as F


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
    >>> import torch
    >>> import peka_lite as pk
    >>> T = torch.tensor([[1.0, 2.0]])
    >>> total, kd, ce = pk.transfer_loss(T, T, torch.tensor([[0.0, 0.0]]), torch.tensor([1]))
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


class NotFinite(FloatingPointError):
    """A loss that is no number; `rows` are the tiles, by row, that brought it, or all of the step's."""

    def __init__(self, message: str, rows: list[int]):
        super().__init__(message)
        self.rows = rows
