"""Scores of predictions per gene: PCC (PEKA, equation 7), R2, RMSE and Spearman's rank correlation."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
from scipy.stats import rankdata


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
    Y, P = _as_pair(Y, P)
    y, p = Y - Y.mean(0), P - P.mean(0)
    with np.errstate(invalid="ignore", divide="ignore"):
        pcc = (y * p).sum(0) / (np.linalg.norm(y, axis=0) * np.linalg.norm(p, axis=0))
    return np.where(_is_constant(Y) | _is_constant(P), np.nan, pcc)


def r2(Y: np.ndarray, P: np.ndarray) -> np.ndarray:
    """Return the coefficient of determination of each column, (genes,) float64; NaN where `Y` is constant.

    It is 1 minus the squared errors over those of the mean of `Y`: 1 for a perfect prediction, 0 for that mean, below 0
    for anything worse. Unlike the Pearson correlation it depends on the shift and the scale of `P`.

    Examples
    --------
    >>> import numpy as np
    >>> import peka_lite as pk
    >>> measured = np.array([[0.0], [1], [2]])
    >>> [pk.probe.r2(measured, P).item() for P in (measured, np.ones((3, 1)), measured + 2)]
    [1.0, 0.0, -5.0]
    """
    Y, P = _as_pair(Y, P)
    total = ((Y - Y.mean(0)) ** 2).sum(0)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(_is_constant(Y), np.nan, 1 - ((Y - P) ** 2).sum(0) / total)


def rmse(Y: np.ndarray, P: np.ndarray) -> np.ndarray:
    """Return the root mean squared error of each column, (genes,) float64, in the units of the targets.

    Examples
    --------
    >>> import numpy as np
    >>> import peka_lite as pk
    >>> pk.probe.rmse(np.array([[0.0], [1], [2]]), np.array([[3.0], [1], [2]])).round(2).tolist()
    [1.73]
    """
    Y, P = _as_pair(Y, P)
    return np.sqrt(((Y - P) ** 2).mean(0))


def spearman(Y: np.ndarray, P: np.ndarray) -> np.ndarray:
    """Return Spearman's correlation of each column, (genes,) float64; NaN where either side is constant.

    It is the Pearson correlation of the ranks, with the average rank for equal values, as the many zeros of counts are.

    Examples
    --------
    >>> import numpy as np
    >>> import peka_lite as pk
    >>> measured, predicted = np.array([[0.0, 1], [0, 1], [2, 1]]), np.array([[1.0, 3], [2, 4], [50, 5]])
    >>> pk.probe.spearman(measured, predicted).round(3).tolist()
    [0.866, nan]
    """
    Y, P = _as_pair(Y, P)
    return np.where(_is_constant(Y) | _is_constant(P), np.nan, pearson(_rank(Y), _rank(P)))


def fold_table(fold: int, genes: Sequence[str], Y: np.ndarray, P: np.ndarray, *, n_train: int) -> pd.DataFrame:
    """Return the result rows of one fold for measured `Y` and predicted `P`, both (n_test, genes)."""
    scores = {"pcc": pearson(Y, P), "r2": r2(Y, P), "rmse": rmse(Y, P), "spearman": spearman(Y, P)}
    return pd.DataFrame({"fold": fold, "gene": list(genes), **scores, "n_train": n_train, "n_test": len(Y)})


def _as_pair(Y, P) -> tuple[np.ndarray, np.ndarray]:
    Y, P = np.asarray(Y, dtype=np.float64), np.asarray(P, dtype=np.float64)
    if Y.shape != P.shape:
        raise ValueError(f"measured {Y.shape} and predicted {P.shape} differ in shape")
    return Y, P


def _rank(values: np.ndarray) -> np.ndarray:
    """Return the rank of each value in its column, with the average rank for equal values."""
    columns = np.ascontiguousarray(values.T)  # sorting is twice as fast with one gene after the other in memory
    order, ranks = np.argsort(columns, axis=1), np.empty(columns.shape)
    np.put_along_axis(ranks, order, np.arange(1.0, len(values) + 1)[None], axis=1)
    tied = (np.diff(np.take_along_axis(columns, order, axis=1), axis=1) == 0).any(axis=1)
    if tied.any():  # three times slower than a sort, and rarely needed for predictions
        ranks[tied] = rankdata(columns[tied], axis=1)
    return ranks.T


def _is_constant(values: np.ndarray) -> np.ndarray:
    # By rounding, a centered constant column has a norm of about 1e-16 of its size, not 0.
    return np.linalg.norm(values - values.mean(0), axis=0) <= 1e-10 * np.linalg.norm(values, axis=0)
