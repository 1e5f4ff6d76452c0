"""Descriptors of a patch: stain, texture, and blobs of nuclear size."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from skimage.color import hed_from_rgb

PATCH = 16
LEVELS = (0.15, 0.3, 0.5, 0.75, 1.1, 1.6)  # optical densities
OCTAVES = 3
N_DESCRIPTORS = 2 * len(LEVELS) + 6 + 3 * 4 + 2 + 8 * OCTAVES


@torch.no_grad()
def describe(images: torch.Tensor) -> torch.Tensor:
    """Compute descriptors of each 16 x 16 pixel patch, standardized over the batch.

    They are: the share of pixels above six densities of hematoxylin and of eosin; mean and standard deviation of the
    density of red, green and blue; the direction of gradients in each quarter of the patch; mean and standard deviation
    of their magnitude; and mean and standard deviation of dark and pale blobs of both stains, per octave.

    Parameters
    ----------
    images
        float32 (B, 3, H, W), 0 to 1.

    Returns
    -------
    torch.Tensor
        float32 (B, H / 16 * W / 16, N_DESCRIPTORS), patches row by row.
    """
    density = -(images * 255).add_(1).div_(256).log_()  # (B, 3, H, W)
    to_stains = torch.from_numpy(hed_from_rgb[:, :2].copy()).float()
    stains = (to_stains.T @ density.flatten(2)).view(len(images), 2, *images.shape[2:])
    above = [F.avg_pool2d(((stains - level) * 8 + 0.5).clamp_(0, 1), PATCH) for level in LEVELS]
    parts = [*above, *_mean_and_std(density, PATCH)]

    gray = F.pad(density.mean(1, keepdim=True), (0, 1, 0, 1), mode="replicate")
    down, right = gray[..., 1:, :-1] - gray[..., :-1, :-1], gray[..., :-1, 1:] - gray[..., :-1, :-1]
    squares = F.avg_pool2d(torch.cat([down**2, right**2, down * right], 1), PATCH // 2)  # (B, 3, 2 n, 2 n)
    size = squares[:, :2].sum(1, keepdim=True)
    direction = torch.cat([squares[:, :1] - squares[:, 1:2], 2 * squares[:, 2:]], 1) / (size + 1e-4)
    parts += [F.pixel_unshuffle(torch.cat([direction, size.sqrt()], 1), 2)]  # (B, 12, n, n)
    parts += _mean_and_std((down**2 + right**2).sqrt_(), PATCH)

    fine, side = stains, PATCH
    for _ in range(OCTAVES):
        coarse = F.avg_pool2d(fine, 2)
        blob = fine - F.interpolate(coarse, scale_factor=2, mode="bilinear", align_corners=False)
        parts += [*_mean_and_std(blob.clamp(min=0), side), *_mean_and_std(blob.clamp(max=0), side)]
        fine, side = coarse, side // 2
    descriptors = torch.cat(parts, 1).flatten(2).mT  # (B, n * n, N_DESCRIPTORS)
    std, mean = torch.std_mean(descriptors, (0, 1), keepdim=True)
    return (descriptors - mean) / (std + 1e-4)


def _mean_and_std(x: torch.Tensor, side: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return mean and standard deviation in squares of `side` pixels, both (B, C, n, n)."""
    mean = F.avg_pool2d(x, side)
    return mean, (F.avg_pool2d(x**2, side) - mean**2).clamp_(min=0).sqrt_()
