"""scFoundation's encoder: value and gene embeddings, a transformer, and pooling over real tokens.

Module names match the published checkpoint, so its tensors load by name.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

POOLS = ("all", "max")
_LIMITS = {"hidden_dim": 65_536, "depth": 1000, "heads": 65_536, "seq_len": 1_000_000, "bin_num": 65_536}


@dataclass(frozen=True)
class EncoderConfig:
    """Sizes of the network, named as in the checkpoint's config."""

    hidden_dim: int
    depth: int
    heads: int
    seq_len: int  # genes and the two depth tokens
    bin_num: int
    bin_alpha: float
    mask_token_id: float
    pad_token_id: float

    def __post_init__(self):
        for name, limit in _LIMITS.items():
            if not 1 <= getattr(self, name) <= limit:
                raise ValueError(f"{name} must be from 1 to {limit:,}, not {getattr(self, name)}")
        if not all(map(math.isfinite, (self.bin_alpha, self.mask_token_id, self.pad_token_id))):
            raise ValueError("bin_alpha, mask_token_id and pad_token_id must be finite numbers")
        if self.hidden_dim % self.heads:
            raise ValueError(f"hidden_dim {self.hidden_dim} must be a multiple of heads {self.heads}")

    @property
    def n_genes(self) -> int:
        """Number of genes in the vocabulary."""
        return self.seq_len - 2

    @classmethod
    def from_checkpoint(cls, config: Mapping) -> EncoderConfig:
        """Merge a checkpoint's config dicts as its authors do: entries of the data set take precedence."""
        merged = {**config["model_config"][config["model"]], **config["dataset_config"]["rnaseq"]}
        encoder = merged["encoder"]
        if encoder["module_type"] != "transformer" or encoder.get("norm_first"):
            other = f"{encoder['module_type']!r} with norm_first={encoder.get('norm_first')}"
            raise ValueError(f"encoder {other} is not supported; scFoundation's is a post-norm 'transformer'")
        return cls(
            **{name: int(encoder[name]) for name in ("hidden_dim", "depth", "heads")},
            **{name: int(merged[name]) for name in ("seq_len", "bin_num")},
            **{name: float(merged[name]) for name in ("bin_alpha", "mask_token_id", "pad_token_id")},
        )


class SoftBins(nn.Module):
    """Embed a value as a mixture of learned bin vectors, (B, L) to (B, L, hidden_dim)."""

    def __init__(self, config: EncoderConfig):
        super().__init__()
        bins, width = config.bin_num, config.hidden_dim
        self.mlp, self.mlp2 = nn.Linear(1, bins), nn.Linear(bins, bins)
        self.emb, self.emb_mask, self.emb_pad = (nn.Embedding(n, width) for n in (bins, 1, 1))
        self.alpha, self.mask_id, self.pad_id = config.bin_alpha, config.mask_token_id, config.pad_token_id

    def weights(self, values: torch.Tensor) -> torch.Tensor:
        """Return the weight of each bin for each value, (B, L, bins)."""
        h = F.leaky_relu(self.mlp(values.unsqueeze(-1)), 0.1)
        return torch.softmax(self.alpha * h + self.mlp2(h), dim=-1)

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        """Embed values. The values for "masked" and "padding" have separate vectors."""
        out = self.weights(values) @ self.emb.weight
        for value, table in ((self.mask_id, self.emb_mask), (self.pad_id, self.emb_pad)):
            out = torch.where((values == value).unsqueeze(-1), table.weight[0], out)
        return out


class Attention(nn.Module):
    """Self-attention in one fused kernel, with PyTorch's parameter names."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.in_proj_weight = nn.Parameter(torch.empty(3 * width, width))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * width))
        self.out_proj = nn.Linear(width, width)
        nn.init.xavier_uniform_(self.in_proj_weight)

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        """Attend over real tokens. `x` is (B, L, width), `mask` (B, 1, 1, L), True for real tokens, or None for all."""
        B, L, width = x.shape
        qkv = F.linear(x, self.in_proj_weight, self.in_proj_bias).view(B, L, 3, self.heads, width // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # (B, heads, L, width / heads) each
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.out_proj(out.transpose(1, 2).reshape(B, L, width))


class Layer(nn.Module):
    """Post-norm transformer layer. Matrices may be in half precision; sums and norms stay in float32."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.self_attn = Attention(width, heads)
        self.linear1, self.linear2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        """Return the layer's output, (B, L, width) float32 like `x`."""
        dtype = self.linear1.weight.dtype
        x = self.norm1(x + self.self_attn(x.to(dtype), mask))
        return self.norm2(x + self.linear2(F.relu_(self.linear1(x.to(dtype)))))


class Encoder(nn.Module):
    """Encode a spot's tokens: the sum of value and gene embeddings, passed through the transformer."""

    def __init__(self, config: EncoderConfig):
        super().__init__()
        self.config = config
        self.token_emb = SoftBins(config)
        self.pos_emb = nn.Embedding(config.seq_len + 1, config.hidden_dim)
        layers = nn.ModuleList(Layer(config.hidden_dim, config.heads) for _ in range(config.depth))
        self.encoder = nn.ModuleDict({"transformer_encoder": layers, "norm": nn.LayerNorm(config.hidden_dim)})

    def halve(self, dtype: torch.dtype) -> Encoder:
        """Cast the transformer's matrices to `dtype`. Embeddings and norms stay in float32."""
        for layer in self.encoder["transformer_encoder"]:
            for part in (layer.self_attn, layer.linear1, layer.linear2):
                part.to(dtype)
        return self

    def forward(self, values: torch.Tensor, positions: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        """Return token vectors (B, L, hidden_dim) float32. Tokens past a spot's length are masked as padding."""
        real = torch.arange(values.shape[1], device=values.device) < lengths[:, None]  # (B, L)
        mask = None if bool(real.all()) else real[:, None, None, :]
        x = self.token_emb(values) + self.pos_emb(positions)
        for layer in self.encoder["transformer_encoder"]:
            x = layer(x, mask)
        return self.encoder["norm"](x)


def pool_tokens(x: torch.Tensor, lengths: torch.Tensor, *, how: str = "all") -> torch.Tensor:
    """Pool token vectors (B, L, d) of spots with `lengths` tokens (B,), the last two of which are T and S.

    ``"all"`` concatenates S, T, the maximum and the mean over genes, (B, 4d). ``"max"`` is the maximum over all
    tokens, including T and S, (B, d).
    """
    if how not in POOLS:
        raise ValueError(f"unknown pool {how!r}; known: {', '.join(POOLS)}")
    column, rows = torch.arange(x.shape[1], device=x.device), torch.arange(len(x), device=x.device)
    if how == "max":
        return x.masked_fill((column >= lengths[:, None])[..., None], -torch.inf).amax(1)
    not_gene = (column >= lengths[:, None] - 2)[..., None]  # (B, L, 1)
    mean = x.masked_fill(not_gene, 0).sum(1) / (lengths - 2)[:, None]
    maximum = x.masked_fill(not_gene, -torch.inf).amax(1)
    return torch.cat([x[rows, lengths - 1], x[rows, lengths - 2], maximum, mean], dim=1)
