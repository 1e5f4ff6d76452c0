"""Bone adapters of linear layers (equation 3 of PEKA, arXiv:2504.07061; arXiv:2409.15371)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable

from peka_lite.backbones.registry import check_divides


class BoneLinear(nn.Module):
    """A frozen linear layer with a block-affine update (PEKA eq. 3, arXiv:2504.07061; Bone, arXiv:2409.15371).

    The weight is cut into r x r tiles ``W_g``. Each output band g has one trainable block ``B_g``, shared by all
    tiles of the band: ``W'_g = W_g + W_g B_g + B_g``. Blocks start at zero, so the layer first equals its base.

    Parameters
    ----------
    base
        `torch.nn.Linear` (in, out); frozen in place. Its bias is not changed.
    r
        Block size; must divide both `in` and `out`.

    Attributes
    ----------
    block : torch.nn.Parameter
        (out / r, r, r) float32.

    Examples
    --------
    >>> import torch
    >>> import peka_lite as pk
    >>> layer = pk.adapters.BoneLinear(torch.nn.Linear(8, 24), r=4)
    >>> x = torch.randn(2, 8)
    >>> tuple(layer.block.shape), torch.equal(layer(x), layer.base(x))  # blocks start at zero
    ((6, 4, 4), True)
    >>> pk.adapters.BoneLinear(torch.nn.Linear(8, 24), r=5)
    Traceback (most recent call last):
        ...
    ValueError: r=5 must divide in_features=8 and out_features=24; these would: 1, 2, 4, 8
    """

    def __init__(self, base: nn.Linear, *, r: int):
        super().__init__()
        check_divides(r, base.in_features, base.out_features)
        self.base, self.r = base.requires_grad_(False), r
        self.block = nn.Parameter(torch.zeros(base.out_features // r, r, r, device=base.weight.device))

    def merged_weight(self) -> torch.Tensor:
        """Return W' (out, in), float32 for float32 blocks."""
        return _affine(self.base.weight.to(self.block.dtype), self.block)

    @property
    def weight(self) -> torch.Tensor:
        """W' (out, in) with gradients for the blocks, for attention that reads ``qkv.weight`` directly."""
        return self.merged_weight()

    @property
    def bias(self) -> torch.Tensor | None:
        """The base's bias (out,)."""
        return self.base.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map (..., in) to (..., out), in autocast's dtype where autocast is on."""
        device = x.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else self.block.dtype
        bias = None if self.base.bias is None else self.base.bias.to(dtype)
        return _BoneProduct.apply(x.to(dtype), self.base.weight.to(dtype), self.block, bias)

    def extra_repr(self) -> str:
        """Show the block size."""
        return f"r={self.r}"


def _affine(W: torch.Tensor, block: torch.Tensor) -> torch.Tensor:
    """Return W' (out, in) in the dtype of W, allocating one tensor of its size."""
    bands, r, _ = block.shape
    stacked = W.view(bands, -1, r)  # (band, row * tile, column): a band's tiles stacked, without a copy
    merged = torch.baddbmm(stacked, stacked, block)  # W_g + W_g B_g: B mixes columns inside each tile
    return merged.view(bands, r, -1, r).add_(block[:, :, None, :]).view_as(W)


class _BoneProduct(torch.autograd.Function):
    """``x W'^T + bias`` with gradients for x and the blocks; saves x and W', no intermediate tensors."""

    @staticmethod
    def forward(ctx, x, W, block, bias):
        merged = _affine(W, block.to(W.dtype))
        ctx.save_for_backward(x, W, block, merged)
        return F.linear(x, merged, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, W, block, merged = ctx.saved_tensors
        bands, r, _ = block.shape
        grad_x = grad @ merged if ctx.needs_input_grad[0] else None
        if not ctx.needs_input_grad[2]:
            return grad_x, None, None, None
        # The dense gradient of W' is freed on return. Each band sums over its tiles: W_g^T dW'_g + dW'_g.
        dense = grad.reshape(-1, grad.shape[-1]).T @ x.reshape(-1, x.shape[-1])  # (out, in)
        grad_block = torch.bmm(W.view(bands, -1, r).mT, dense.view(bands, -1, r)).to(block.dtype)
        grad_block += dense.view(bands, r, -1, r).sum(2, dtype=block.dtype)
        return grad_x, None, grad_block, None
