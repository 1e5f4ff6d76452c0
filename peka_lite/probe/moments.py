"""Sum features and targets per cell in one pass, to fit and score the probe on any folds from the sums.

A cell is a set of rows that are never split: a fold's test rows, a slide, a patient. Each has its count, means and
centered scatter matrices. Those of a union of cells are their sums plus the scatter between the means (Chan, Golub and
LeVeque, 1983), so that rows outside the union have no influence, not even by rounding.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
from scipy.linalg import eigh
from scipy.linalg.blas import dsyrk

EPS = np.finfo(np.float64).eps


@dataclass(frozen=True)
class Moments:
    """Means and scatter matrices of a set of rows, in float64.

    Attributes
    ----------
    n
        Number of rows.
    mean_x, mean_y
        (d,) and (genes,).
    Sxx, Sxy, Syy
        Sums of products of centered columns: (d, d), (d, genes), and of each gene with itself (genes,).
    rows
        (n,) indices of the rows.
    low_y, high_y
        (genes,) smallest and largest target of each gene.
    """

    n: int
    mean_x: np.ndarray
    mean_y: np.ndarray
    Sxx: np.ndarray
    Sxy: np.ndarray
    Syy: np.ndarray
    rows: np.ndarray
    low_y: np.ndarray
    high_y: np.ndarray

    def targets(self, index) -> Moments:
        """Return the moments of the same rows with only these target columns; `Sxx` is not copied."""
        ends = {"low_y": self.low_y[index], "high_y": self.high_y[index]}
        return replace(self, mean_y=self.mean_y[index], Sxy=self.Sxy[:, index], Syy=self.Syy[index], **ends)


@dataclass(frozen=True)
class CellSums:
    """Moments of every non-empty cell, by its number; see `gather`."""

    of: dict[int, Moments]

    @property
    def cells(self) -> list[int]:
        """Numbers of the non-empty cells, ascending."""
        return list(self.of)

    def over(self, cells: Iterable[int]) -> Moments:
        """Return the moments of a union of cells; empty cells are ignored.

        Raises
        ------
        ValueError
            If a cell is given twice, or all of them are empty.
        """
        requested = [int(cell) for cell in cells]
        if len(set(requested)) < len(requested):
            raise ValueError(f"each cell can be given once, not {requested}")
        parts = [moments for cell, moments in self.of.items() if cell in requested]
        if len(parts) < 2:
            if not parts:
                raise ValueError(f"no rows in cells {requested}; cells with rows: {self.cells}")
            return parts[0]
        n, first = sum(p.n for p in parts), parts[0]
        # Relative to the first cell's mean, so that a column that is constant over all cells stays exactly constant.
        mean_x = first.mean_x + sum(p.n / n * (p.mean_x - first.mean_x) for p in parts)
        mean_y = first.mean_y + sum(p.n / n * (p.mean_y - first.mean_y) for p in parts)
        diff_x = np.stack([np.sqrt(p.n) * (p.mean_x - mean_x) for p in parts])  # (cells, d)
        diff_y = np.stack([np.sqrt(p.n) * (p.mean_y - mean_y) for p in parts])
        Sxx, Sxy, Syy = diff_x.T @ diff_x, diff_x.T @ diff_y, (diff_y**2).sum(0)
        for p in parts:
            Sxx += p.Sxx
            Sxy += p.Sxy
            Syy += p.Syy
        rows = np.sort(np.concatenate([p.rows for p in parts]))
        low_y, high_y = np.min([p.low_y for p in parts], axis=0), np.max([p.high_y for p in parts], axis=0)
        return Moments(n, mean_x, mean_y, Sxx, Sxy, Syy, rows, low_y, high_y)


def gather(X: np.ndarray, Y: np.ndarray, cells: np.ndarray, *, chunk: int = 4096) -> CellSums:
    """Read features and targets once and sum them per cell, in float64.

    Needs memory for C * (d * d + d * genes) * 8 bytes for C cells, and `chunk` rows.

    Parameters
    ----------
    X
        (N, d) features of any float type; a `numpy.memmap` is read `chunk` rows at a time.
    Y
        (N, genes) targets.
    cells
        (N,) integers, the cell of each row; rows of cell -1 are skipped.

    Raises
    ------
    ValueError
        If shapes differ, no row has a cell, or a row with a cell has NaN or infinite values.
    """
    X, Y, cells = np.asarray(X), np.asarray(Y), np.asarray(cells)
    if X.ndim != 2 or Y.ndim != 2 or len(X) != len(Y):
        raise ValueError(f"features (n, d) and targets (n, genes) must share rows, not {X.shape} and {Y.shape}")
    if cells.shape != (len(X),) or not np.issubdtype(cells.dtype, np.integer):
        raise ValueError(f"cells are one integer for each of {len(X)} rows, not {cells.dtype} {cells.shape}")
    if chunk < 1:
        raise ValueError(f"chunk must be at least 1 row, not {chunk}")
    if (cells < -1).any() or not (cells >= 0).any():
        raise ValueError("cells are numbered from 0, with -1 for rows left out, and at least one row must have a cell")
    with np.errstate(invalid="ignore", over="ignore"):  # NaN and infinity are detected in the sums
        return _sum_up(_pieces(X, Y, cells, chunk), cells, X.shape[1], Y.shape[1])


def _pieces(X, Y, cells, chunk: int) -> Iterator[tuple[int, np.ndarray, np.ndarray, np.ndarray]]:
    """Yield (cell, row numbers, features, targets) by chunk; copy only if a cell's rows are not contiguous."""
    for start in range(0, len(X), chunk):
        part = cells[start : start + chunk]
        for cell in np.unique(part[part >= 0]):
            rows = start + np.flatnonzero(part == cell)
            contiguous = rows[-1] - rows[0] + 1 == len(rows)
            at = slice(rows[0], rows[-1] + 1) if contiguous else rows
            yield int(cell), rows, X[at], Y[at]


def _sum_up(pieces, cells, d: int, genes: int) -> CellSums:
    shift, total, xx, xy, yy, low, high = {}, {}, {}, {}, {}, {}, {}
    for cell, rows, *blocks in pieces:
        x, y = (np.array(block, dtype=np.float64, order="C") for block in blocks)
        if cell not in shift:
            # Relative to the cell's first rows: no other row has influence, and a constant column gives exact zeros.
            shift[cell] = [z[0] + (z - z[0]).mean(0) for z in (x, y)]
            total[cell] = [np.zeros(d), np.zeros(genes)]
            xx[cell], xy[cell], yy[cell] = np.zeros((d, d)), np.zeros((d, genes)), np.zeros(genes)
            low[cell], high[cell] = np.full(genes, np.inf), np.full(genes, -np.inf)
        for name, block, z, s, t in zip(("features", "targets"), blocks, (x, y), shift[cell], total[cell], strict=True):
            z -= s
            t += z.sum(0)
            if not (t - t == 0).all():
                raise _not_finite(name, block, rows)
        # One triangle, in place: half the operations of a product, and no temporary array.
        dsyrk(1.0, x.T, beta=1.0, c=xx[cell].T, overwrite_c=1)
        xy[cell] += x.T @ y
        yy[cell] += (y * y).sum(0)
        low[cell], high[cell] = np.minimum(low[cell], blocks[1].min(0)), np.maximum(high[cell], blocks[1].max(0))
    of = {}
    for cell in sorted(shift):
        rows = np.flatnonzero(cells == cell)
        root = np.sqrt(len(rows))
        (shift_x, shift_y), (x, y) = shift.pop(cell), total.pop(cell)
        Sxx, Sxy, Syy = xx.pop(cell), xy.pop(cell), yy.pop(cell)
        Sxx = np.tril(Sxx) + np.tril(Sxx, -1).T - np.outer(x / root, x / root)
        Sxy -= np.outer(x / root, y / root)
        Syy = np.maximum(Syy - (y / root) ** 2, 0)
        means = shift_x + x / len(rows), shift_y + y / len(rows)
        of[cell] = Moments(len(rows), *means, Sxx, Sxy, Syy, rows, low[cell], high[cell])
    return CellSums(of)


def _not_finite(name: str, block: np.ndarray, rows: np.ndarray) -> ValueError:
    bad = np.argwhere(~np.isfinite(block))
    if not len(bad):
        return ValueError(f"{name} are too large for sums in float64")
    return ValueError(f"{name} have NaN or infinite values; the first in row {rows[bad[0, 0]]}, column {bad[0, 1]}")


@dataclass(frozen=True)
class Components:
    """Principal components of standardized training features, and their products with the targets.

    Attributes
    ----------
    mean, scale
        (d,) subtracted from the features, and divisor of the features.
    values, vectors
        (k,) eigenvalues of the scatter matrix, descending, 0 without variance, and (d, k) eigenvectors.
    cross
        (k, genes) sums of products of scores and targets.
    mean_y
        (genes,) training means.
    """

    mean: np.ndarray
    scale: np.ndarray
    values: np.ndarray
    vectors: np.ndarray
    cross: np.ndarray
    mean_y: np.ndarray

    def weights(self, alpha: float) -> np.ndarray:
        """Return ridge coefficients (k, genes) of the scores; 0 for directions without variance."""
        shrink = self.values + alpha
        return self.cross / np.where(self.values > 0, shrink, np.inf)[:, None]


def components(moments: Moments, n_components: int | None = 256, *, standardize: bool = True) -> Components:
    """Standardize and reduce by PCA, from the sums only.

    A column without variance, by the rule of scikit-learn's StandardScaler, is not scaled and has no weight.

    Parameters
    ----------
    n_components
        Capped at rows - 1 and at d; None keeps d.
    standardize
        Divide each column by its population standard deviation before PCA. Means are always removed.
    """
    n, d = moments.n, len(moments.mean_x)
    variance = np.diag(moments.Sxx) / n
    constant = variance <= n * EPS * variance + (n * moments.mean_x * EPS) ** 2
    scale = np.where(constant | (not standardize), 1.0, np.sqrt(variance))
    keep = np.where(constant, 0.0, 1 / scale)
    gram = moments.Sxx * keep[:, None]
    gram *= keep
    k = d if n_components is None else max(min(n_components, n - 1, d), 1)
    values, vectors = eigh(gram, subset_by_index=[d - k, d - 1], overwrite_a=True)
    values, vectors = values[::-1].copy(), np.ascontiguousarray(vectors[:, ::-1])
    values[values <= d * EPS * max(values[0], 0)] = 0
    vectors[constant] = 0
    cross = vectors.T @ (moments.Sxy * keep[:, None])
    return Components(moments.mean_x, scale, values, vectors, cross, moments.mean_y)


def alpha_path(
    train: Moments | Components, test: Moments, alphas: Sequence[float], *, n_components: int | None = 256
) -> np.ndarray:
    """Return the Pearson correlation on the test rows for each alpha, from the sums only.

    Parameters
    ----------
    train
        Moments of the training rows, reduced to `n_components`; or their `components`, shared by several tests.
    alphas
        Regularization strengths of the ridge, numbers of at least 0.

    Returns
    -------
    numpy.ndarray
        (len(alphas), genes) float64; NaN where targets or predictions are constant over the test rows.

    Examples
    --------
    >>> import numpy as np
    >>> import peka_lite as pk
    >>> rng = np.random.default_rng(0)
    >>> X, Y = rng.normal(size=(60, 5)), rng.normal(size=(60, 2))
    >>> sums = pk.probe.gather(X, Y, np.arange(60) % 3)  # one cell per fold
    >>> pk.probe.alpha_path(sums.over([0, 1]), sums.over([2]), [0.1, 1.0, 10.0], n_components=4).shape
    (3, 2)
    """
    if not all(alpha >= 0 for alpha in alphas):
        raise ValueError(f"alphas must be numbers of at least 0, not {list(alphas)}")
    if len(train.mean_y) != len(test.mean_y):
        raise ValueError(f"training sums have {len(train.mean_y)} targets and test sums {len(test.mean_y)}")
    reduced = train if isinstance(train, Components) else components(train, n_components)
    V = reduced.vectors / reduced.scale[:, None]  # (d, k)
    spread, shared = V.T @ (test.Sxx @ V), V.T @ test.Sxy  # (k, k), (k, genes)
    offset, uncanceled = V.T @ (test.mean_x - reduced.mean), (V**2).T @ np.diag(test.Sxx)  # (k,), (k,)
    constant_y = test.Syy <= 1e-20 * (test.Syy + test.n * test.mean_y**2)
    path = np.empty((len(alphas), len(test.mean_y)))
    for row, alpha in zip(path, alphas, strict=True):
        w = reduced.weights(alpha)
        var_p, cov = (w * (spread @ w)).sum(0), (w * shared).sum(0)
        # As in `pearson`, variance below rounding error is 0: error of the mean, and of features that cancel.
        constant_p = var_p <= 1e-20 * test.n * (offset @ w) ** 2 + 1e-14 * uncanceled @ w**2
        with np.errstate(invalid="ignore", divide="ignore"):
            row[:] = np.where(constant_y | constant_p, np.nan, cov / np.sqrt(var_p * test.Syy))
    return path
