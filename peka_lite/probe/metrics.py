"""Pearson correlation of predictions per gene (PCC: PEKA, equation 7)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd


def pearson(Y: np.ndarray, P: np.ndarray) -> np.ndarray:
    """Return the Pearson correlation of each column, (genes,) float64; NaN where either side is constant.

    It is invariant to a shift or a positive scale of either side.

    Examples
    --------
    >>> import numpy as np
    >>> import peka_lite as pk
    >>> measured, predicted = np.array([[0.0, 1], [1, 1], [2, 1]]), np.array([[1.0, 3], [2, 4], [4, 5]])
    >>> pk.probe.pearson(measured, predicted).round(3).tolist()  # the second gene does not vary
    [0.982, nan]
    """
    Y, P = np.asarray(Y, dtype=np.float64), np.asarray(P, dtype=np.float64)
    if Y.shape != P.shape:
        raise ValueError(f"measured {Y.shape} and predicted {P.shape} differ in shape")
    y, p = Y - Y.mean(0), P - P.mean(0)
    norm_y, norm_p = np.linalg.norm(y, axis=0), np.linalg.norm(p, axis=0)
    # By rounding, a centered constant column has a norm of about 1e-16 of its size, not 0.
    constant = (norm_y <= 1e-10 * np.linalg.norm(Y, axis=0)) | (norm_p <= 1e-10 * np.linalg.norm(P, axis=0))
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(constant, np.nan, (y * p).sum(0) / (norm_y * norm_p))


def fold_table(fold: int, genes: Sequence[str], Y: np.ndarray, P: np.ndarray, *, n_train: int) -> pd.DataFrame:
    """Return the result rows of one fold for measured `Y` and predicted `P`, both (n_test, genes)."""
    return pd.DataFrame({"fold": fold, "gene": list(genes), "pcc": pearson(Y, P), "n_train": n_train, "n_test": len(Y)})
