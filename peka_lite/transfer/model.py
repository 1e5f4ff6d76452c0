"""The adapted student S(x) with its projector and classifier, and its loss (PEKA, equations 2 and 4 to 6)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from peka_lite.backbones.load import extract_features
from peka_lite.transfer._choices import KD_SPACES


class TransferModel(nn.Module):
    """A student with a projector to the teacher's space and a classifier of pseudo-labels.

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
        and a linear classifier predicts the pseudo-label from the student's features. ``"logits"`` (the authors'
        code): a two-layer classifier of teacher embeddings is trained first and frozen. Both losses use its logits
        for the student's projection, compared with its logits for the teacher and with the label.
    seed
        Seed of the random initial weights of projector and classifier.

    Examples
    --------
    >>> import torch
    >>> import peka_lite as pk
    >>> student = pk.adapt(pk.load_backbone("mini"), "bone", r=32)
    >>> model = pk.transfer.TransferModel(student, teacher_dim=50, n_classes=7)
    >>> z, logits = model(torch.zeros(2, 3, 112, 112))
    >>> tuple(z.shape), tuple(logits.shape)
    ((2, 50), (2, 7))
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
        if getattr(backbone, "spec", None) is None:
            raise ValueError(
                f"{type(backbone).__name__} is not from load_backbone; load the student with it, and register a custom "
                "network first (register_backbone)"
            )
        self.backbone, self.kd_space, self.n_classes = backbone, kd_space, n_classes
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            self.projector = mlp(backbone.spec.dim, hidden, teacher_dim)
            self.classifier = (
                nn.Linear(backbone.spec.dim, n_classes)
                if kd_space == "embedding"
                else mlp(teacher_dim, hidden, n_classes)
            )

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Map normalized images (B, 3, H, W) to a projection (B, D_t) and label logits (B, n_classes)."""
        features = extract_features(self.backbone, x)  # (B, D_s)
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


def mlp(in_features: int, hidden: int, out: int) -> nn.Sequential:
    """Return two linear layers with GELU between them."""
    return nn.Sequential(nn.Linear(in_features, hidden), nn.GELU(), nn.Linear(hidden, out))


class NotFinite(FloatingPointError):
    """A loss is not finite; `rows` are the tiles that caused it, or all tiles of the piece."""

    def __init__(self, message: str, rows: list[int]):
        super().__init__(message)
        self.rows = rows
