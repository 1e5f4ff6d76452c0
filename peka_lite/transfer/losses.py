"""Losses of the transfer: KL distillation and cross-entropy (PEKA, equations 4, 5 and 6)."""

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
    over the batch. As in the equation, there is no factor tau squared.

    Parameters
    ----------
    student, teacher
        S and T, (B, D) float32: embeddings, or logits where the distillation space is ``"logits"``.
    logits
        (B, n_classes) float32.
    labels
        (B,) int64.
    tau
        Temperature. The paper gives none; 2.0 is in the authors' configuration.

    Examples
    --------
    >>> import torch
    >>> import peka_lite as pk
    >>> T = torch.tensor([[1.0, 2.0]])
    >>> total, kd, ce = pk.transfer.transfer_loss(T, T, torch.tensor([[0.0, 0.0]]), torch.tensor([1]))
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
    """A loss is not finite; `rows` are the tiles that caused it, or all tiles of the piece."""

    def __init__(self, message: str, rows: list[int]):
        super().__init__(message)
        self.rows = rows
