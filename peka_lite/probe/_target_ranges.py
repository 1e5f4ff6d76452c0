"""Compute and describe the share of predictions outside the range of the training targets."""

from __future__ import annotations

import anndata as ad
import numpy as np

from peka_lite._core.names import short_name

LOW, HIGH = "train_min", "train_max"  # columns of `var` in predictions: each gene's range in the training targets
ROUNDING = 1e-5  # tolerance for float32 predictions, in units of the targets
CHUNK = 4096  # rows at a time


def shares_outside(X: np.ndarray, low: np.ndarray, high: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the share of rows below and above each gene's range, (genes,) each; NaN where a range is unknown.

    Parameters
    ----------
    X
        (N, genes) predictions, N at least 1; a `numpy.memmap` is read in chunks.
    low, high
        (genes,) smallest and largest training target.
    """
    below, above = np.zeros(len(low)), np.zeros(len(low))
    for start in range(0, len(X), CHUNK):
        part = X[start : start + CHUNK]
        below += (part < low - ROUNDING).sum(0)
        above += (part > high + ROUNDING).sum(0)
    unknown = np.isnan(low) | np.isnan(high)
    return np.where(unknown, np.nan, below / len(X)), np.where(unknown, np.nan, above / len(X))


def describe_outside(predictions: ad.AnnData, gene: str | None = None) -> str:
    """Describe in one sentence the share of predictions outside the range of the training targets.

    For `gene` it is the share of tiles (or spots), for None the share of all values, one per tile and gene.
    """
    if not {LOW, HIGH} <= set(predictions.var) or predictions.var[[LOW, HIGH]].isna().all(axis=None):
        return (
            "Whether values lie outside the range of the training targets is unknown, because the model is from an "
            "older version: train it again, then predict."
        )
    part = predictions if gene is None else predictions[:, [gene]]
    X, unit = part.to_df(), spot_or_tile(predictions)  # (N, genes)
    low, high = part.var[LOW].to_numpy(dtype=float), part.var[HIGH].to_numpy(dtype=float)
    below, above = (float(np.nanmean(shares)) for shares in shares_outside(X.to_numpy(), low, high))
    if gene is not None:
        span, name = f"the range of its training targets ({low[0]:.2f} to {high[0]:.2f})", short_name(gene)
        if not below + above:
            return f"{name} lies within {span} on all {len(X)} {unit}."
        if not (below and above):
            side, share = ("below", below) if below else ("above", above)
            tiles = f"all {len(X)} {unit}" if share == 1 else f"{_percent(share)} of the {unit}"
            return f"{name} lies {side} {span} on {tiles}."
        return f"{name} lies below {span} on {_percent(below)} of the {unit} and above it on {_percent(above)}."
    if not below + above:
        return "All predicted values lie within the range of their gene's training targets."
    least, most = X.min().to_numpy(), X.max().to_numpy()
    worst = int(np.nanargmax(np.maximum(low - least, most - high)))
    return (
        f"Of the predicted values ({len(X)} {unit} x {len(low)} genes) {_percent(below)} lie below and "
        f"{_percent(above)} above the range of their gene's training targets; furthest out is "
        f"{short_name(part.var_names[worst])}, {least[worst]:.2f} to {most[worst]:.2f} where training had "
        f"{low[worst]:.2f} to {high[worst]:.2f}."
    )


def spot_or_tile(predictions: ad.AnnData) -> str:
    """Return ``"tiles"`` for predictions on a grid of tiles, else ``"spots"``."""
    return "tiles" if "tissue_share" in predictions.obs else "spots"


def _percent(share: float) -> str:
    return "less than 0.1%" if 0 < share < 0.001 else f"{share:.1%}"
