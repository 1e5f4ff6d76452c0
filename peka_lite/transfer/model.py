"""The adapted student with its projector and classifier: S(x) (PEKA, equation 2)."""

from __future__ import annotations

import torch
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


def mlp(in_features: int, hidden: int, out: int) -> nn.Sequential:
    """Return two linear layers with GELU between them."""
    return nn.Sequential(nn.Linear(in_features, hidden), nn.GELU(), nn.Linear(hidden, out))
