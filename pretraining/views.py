"""Random views of a batch of tiles: crop, rotation, flip and stain jitter."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from skimage.color import hed_from_rgb, rgb_from_hed


def random_view(
    tiles: torch.Tensor, *, side: int = 112, area: tuple[float, float] = (0.5, 1.0), stain: float = 0.0
) -> torch.Tensor:
    """Return one random view of every tile.

    Parameters
    ----------
    tiles
        uint8 (B, H, W, 3).
    side
        Pixels of a view.
    area
        Smallest and largest share of a tile in a view; crops are square.
    stain
        Standard deviation of the log strength of each stain of Ruifrok and Johnston 2001; 0 leaves colors unchanged.

    Returns
    -------
    torch.Tensor
        float32 (B, 3, side, side), 0 to 1.
    """
    n = len(tiles)
    scale = torch.empty(n).uniform_(*area).sqrt()
    quarter = math.pi / 2 * torch.randint(4, (n,))
    cos, sin, flip = quarter.cos().round(), quarter.sin().round(), 1.0 - 2 * torch.randint(2, (n,))
    turn = torch.stack([cos * flip, -sin, sin * flip, cos], 1).view(n, 2, 2) * scale[:, None, None]
    shift = torch.empty(n, 2, 1).uniform_(-1, 1) * (1 - scale)[:, None, None]
    grid = F.affine_grid(torch.cat([turn, shift], 2), [n, 3, side, side], align_corners=False)
    images = tiles.permute(0, 3, 1, 2).float()
    images = F.grid_sample(images, grid, padding_mode="border", align_corners=False).contiguous()
    if stain:
        images = restain(images, stain)
    return images.clamp_(0, 255).div_(255)


def restain(images: torch.Tensor, stain: float) -> torch.Tensor:
    """Scale the optical density of each stain of images (B, 3, H, W), 0 to 255, by a random factor."""
    to_stains, to_colors = (torch.from_numpy(m).float() for m in (hed_from_rgb, rgb_from_hed))
    strength = (torch.randn(len(images), 3) * stain).exp()
    mix = (to_stains * strength[:, None]) @ to_colors  # (B, 3, 3), for rows of colors
    density = images.flatten(2).add(1).div_(256).log_()  # (B, 3, H * W), negative
    return (mix.mT @ density).clamp_(max=0).exp_().mul_(256).sub_(1).view_as(images)
