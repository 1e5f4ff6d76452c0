"""Objectives of self-supervised pretraining: masked autoencoding, or self-distillation from a running average.

An objective has ``learner``, the trained modules, and ``average``, their running average, each with the student at
``["backbone"]``. ``loss`` takes uint8 tiles (B, 112, 112, 3). Its other modules are discarded after training.
"""

from __future__ import annotations

import copy
import math

import torch
import torch.nn.functional as F
from descriptors import N_DESCRIPTORS, describe
from timm.models.vision_transformer import Block
from torch import nn
from views import random_view

PATCH = 16
TARGETS = ("raw", "normalized", "both", "descriptors")


def patchify(images: torch.Tensor, spec) -> torch.Tensor:
    """Normalize images (B, 3, H, W), 0 to 1, and cut them into patches (B, n, 768) for the patch embedding."""
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (spec.mean, spec.std))
    n = images.shape[-1] // PATCH
    x = ((images - mean) / std).view(len(images), 3, n, PATCH, n, PATCH)
    return x.permute(0, 2, 4, 1, 3, 5).reshape(len(images), n * n, 3 * PATCH * PATCH)


def embed_positions(model: nn.Module, side: int = 7) -> torch.Tensor:
    """Return the position embedding of side x side patches, (1, side * side, width)."""
    grid = model.pos_embed[:, 1:]
    if side * side == grid.shape[1]:
        return grid
    full = math.isqrt(grid.shape[1])
    grid = grid.mT.view(1, -1, full, full)
    return F.interpolate(grid, (side, side), mode="bilinear", align_corners=False).flatten(2).mT


def encode(model: nn.Module, patches: torch.Tensor, position: torch.Tensor, hidden=None, token=None) -> torch.Tensor:
    """Return the output tokens (B, n, width) of some patches, without the class token.

    Patches with `hidden`, bool (B, n), are replaced by `token`.
    """
    weight = model.patch_embed.proj.weight
    x = F.linear(patches, weight.flatten(1), model.patch_embed.proj.bias)
    if hidden is not None:
        x = torch.where(hidden[..., None], token, x)
    first = model.cls_token + model.pos_embed[:, :1]
    x = torch.cat([first.expand(len(x), -1, -1), x + position], 1)
    return model.norm(model.blocks(x))[:, 1:]


def decay_to_one(start: float, share: float) -> float:
    """Return the momentum of a running average, rising from `start` to 1 with the completed share of training."""
    return 1 - (1 - start) * (math.cos(math.pi * share) + 1) / 2


class MAE(nn.Module):
    """Masked autoencoder (He et al. 2022, arXiv:2111.06377): predict masked patches from visible ones.

    `target`: ``"raw"`` pixels; ``"normalized"`` by each patch's mean and standard deviation; ``"both"``: normalized
    texture, and the mean color of the patch; or ``"descriptors"``, also of visible patches, in place of pixels as in
    MaskFeat (Wei et al. 2022, arXiv:2112.09133). `summary` adds their mean and standard deviation over the tile,
    predicted from the pooled features. `masked` is the share of masked patches, `depth` the number of decoder layers.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        target: str = "descriptors",
        stain: float = 0.0,
        masked: float = 0.75,
        depth: int = 2,
        summary: bool = False,
    ):
        super().__init__()
        width, n = 128, model.pos_embed.shape[1] - 1
        self.learner = nn.ModuleDict({"backbone": model})
        self.average = copy.deepcopy(self.learner).requires_grad_(False)
        self.narrow = nn.Linear(model.embed_dim, width)
        self.position = nn.Parameter(torch.randn(n, width) * 0.02)
        self.token = nn.Parameter(torch.randn(width) * 0.02)
        self.decoder = nn.Sequential(*(Block(width, 4) for _ in range(depth)), nn.LayerNorm(width))
        n_out = {"both": 3 * PATCH * PATCH + 3, "descriptors": N_DESCRIPTORS}.get(target, 3 * PATCH * PATCH)
        self.predict = nn.Linear(width, n_out)
        self.summary = nn.Linear(model.embed_dim, 2 * N_DESCRIPTORS) if summary else None
        self.target, self.stain, self.n_seen = target, stain, round(n * (1 - masked))

    def momentum(self, step: int, share: float) -> float:
        """Return the momentum: about the last 1,000 steps are averaged, fewer at the start."""
        return min(0.999, (1 + step) / (10 + step))

    def loss(self, tiles: torch.Tensor) -> torch.Tensor:
        """Return the mean squared error over masked patches, plus the terms of `descriptors` and `summary`."""
        model = self.learner["backbone"]
        views = random_view(tiles, stain=self.stain)
        patches = patchify(views, model.spec)  # (B, 49, 768)
        order = torch.rand(patches.shape[:2]).argsort(1)
        row, seen, hidden = torch.arange(len(tiles))[:, None], order[:, : self.n_seen], order[:, self.n_seen :]
        tokens = encode(model, patches[row, seen], embed_positions(model)[0][seen])  # (B, n_seen, width)
        x = torch.cat([self.narrow(tokens), self.token.expand(*hidden.shape, -1)], 1) + self.position[order]
        if self.target == "descriptors":
            return self._descriptor_loss(describe(views)[row, order], tokens, self.predict(self.decoder(x)))
        predicted = self.predict(self.decoder(x)[:, self.n_seen :])  # (B, n_hidden, 768 or 771)
        patches = patches[row, hidden]
        if self.target == "raw":
            return F.mse_loss(predicted, patches)
        if self.target == "normalized":
            spread, middle = torch.std_mean(patches, -1, keepdim=True)
            return F.mse_loss(predicted, (patches - middle) / (spread + 1e-2))
        colors = patches.unflatten(-1, (3, -1))  # (B, n_hidden, 3, 256)
        middle = colors.mean(-1, keepdim=True)
        texture = (colors - middle).flatten(2)
        texture = texture / (texture.std(-1, keepdim=True) + 1e-2)
        texture_loss = F.mse_loss(predicted[..., :-3], texture)
        return texture_loss + F.mse_loss(predicted[..., -3:], middle[..., 0])

    def _descriptor_loss(self, target: torch.Tensor, tokens: torch.Tensor, predicted: torch.Tensor) -> torch.Tensor:
        """Return the error over visible then masked patches, (B, 49, N_DESCRIPTORS), and over the tile."""
        errors = (predicted - target).square().mean(-1)  # (B, 49)
        loss = errors[:, : self.n_seen].mean() + errors[:, self.n_seen :].mean()
        if self.summary is None:
            return loss
        whole = torch.cat([target.mean(1), target.std(1)], 1)  # (B, 2 * N_DESCRIPTORS)
        spread, middle = torch.std_mean(whole, 0)
        summary = self.summary(self.learner["backbone"].fc_norm(tokens.mean(1)))
        return loss + F.mse_loss(summary, (whole - middle) / (spread + 1e-3))


class Distillation(nn.Module):
    """Small DINO (Caron et al. 2021, arXiv:2104.14294), or iBOT with `masked` (Zhou et al. 2022, arXiv:2111.07832).

    The pooled output of each view is trained to match the running average's output of another global view. iBOT also
    masks 30% of the patches in half of the global views and predicts the average's output of these patches.
    """

    def __init__(self, model: nn.Module, *, masked: bool, stain: float = 0.0, n_local: int = 4, n_classes: int = 1024):
        super().__init__()
        head = nn.Sequential(nn.Linear(model.embed_dim, 384), nn.GELU(), nn.Linear(384, 128))
        classes = nn.utils.parametrizations.weight_norm(nn.Linear(128, n_classes, bias=False))
        classes.parametrizations.weight.original0.requires_grad_(False).fill_(1)
        self.learner = nn.ModuleDict({"backbone": model, "head": head, "classes": classes})
        self.average = copy.deepcopy(self.learner).requires_grad_(False)
        self.token = nn.Parameter(torch.randn(model.embed_dim) * 0.02)
        self.centers = [torch.zeros(n_classes), torch.zeros(n_classes)]  # of images, of patches
        self.masked, self.stain, self.n_local = masked, stain, n_local

    def momentum(self, step: int, share: float) -> float:
        """Return the momentum, which averages over more and more steps."""
        return decay_to_one(0.99, share)

    def _score_classes(self, modules, tokens: torch.Tensor) -> torch.Tensor:
        return modules["classes"](F.normalize(modules["head"](modules["backbone"].fc_norm(tokens)), dim=-1))

    def _sharpen(self, scores: torch.Tensor, which: int) -> torch.Tensor:
        """Return the average's class probabilities, (n, classes); centering prevents collapse to one class."""
        classes = ((scores - self.centers[which]) / 0.04).softmax(-1)
        self.centers[which] = self.centers[which].lerp(scores.mean(0), 0.1)
        return classes

    def loss(self, tiles: torch.Tensor) -> torch.Tensor:
        """Return the cross-entropy of classes between views, for iBOT plus that of masked patches."""
        model, teacher, n = self.learner["backbone"], self.average["backbone"], len(tiles)
        views = [patchify(random_view(tiles, stain=self.stain), model.spec) for _ in range(2)]
        views = torch.cat(views)  # (2 B, 49, 768)
        small = {"side": 64, "area": (0.1, 0.4), "stain": self.stain}
        local = torch.cat([patchify(random_view(tiles, **small), model.spec) for _ in range(self.n_local)])
        with torch.no_grad():
            tokens = encode(teacher, views, embed_positions(teacher))
            target = self._sharpen(self._score_classes(self.average, tokens.mean(1)), 0)  # (2 B, classes)
        hidden = (torch.rand(views.shape[:2]) < 0.3) & (torch.rand(2 * n, 1) < 0.5) if self.masked else None
        seen = encode(model, views, embed_positions(model), hidden, self.token)
        few = encode(model, local, embed_positions(model, 4))
        pooled = torch.cat([seen.mean(1), few.mean(1)])  # ((2 + n_local) B, width)
        predicted = (self._score_classes(self.learner, pooled) / 0.1).log_softmax(-1).chunk(2 + self.n_local)
        pairs = [(i, j) for i in range(2) for j in range(len(predicted)) if i != j]
        loss = -sum((target.chunk(2)[i] * predicted[j]).sum(-1).mean() for i, j in pairs) / len(pairs)
        if self.masked and hidden.any():
            with torch.no_grad():
                target = self._sharpen(self._score_classes(self.average, tokens[hidden]), 1)
            predicted = (self._score_classes(self.learner, seen[hidden]) / 0.1).log_softmax(-1)
            loss = loss - (target * predicted).sum(-1).mean()
        return loss


def make_objective(name: str, model: nn.Module, *, stain: float = 0.0, **options) -> nn.Module:
    """Return the objective of a student: ``"mae"`` (with the options of `MAE`), ``"dino"`` or ``"ibot"``."""
    if name == "mae":
        return MAE(model, stain=stain, **options)
    return Distillation(model, masked=name == "ibot", stain=stain)
