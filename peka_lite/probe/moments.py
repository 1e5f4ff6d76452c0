"""One pass over features gathers sums per cell; every fold, penalty and held-out group follows from them.

A cell is a set of rows that always stay together: a fold's test rows, a slide, a patient. Each has its count, means and
centered scatter matrices; those of any union of cells are their sum plus what lies between the means (Chan, Golub and
LeVeque, 1983), so that no row outside the union takes part, not even by rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
from scipy.linalg import eigh
from scipy.linalg.blas import dsyrk

EPS = np.finfo(np.float64).eps


@dataclass(frozen=True)
class Moments:
    """What PCA and ridge need of a set of rows, in float64.

    Attributes
    ----------
    n
        Number of rows.
    mean_x, mean_y
        (d,) and (genes,).
    Sxx, Sxy, Syy
        Sums of products of what is left without the means: (d, d), (d, genes), and each gene's own (genes,).
    rows
        (n,) indices of the rows.
    low_y, high_y
        (genes,) least and greatest target of each gene.
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
        """Return the same rows with these target columns alone; `Sxx` is shared, not copied."""
        ends = {"low_y": self.low_y[index], "high_y": self.high_y[index]}
        return replace(self, mean_y=self.mean_y[index], Sxy=self.Sxy[:, index], Syy=self.Syy[index], **ends)


@dataclass(frozen=True)
class CellSums:
    """Moments of every cell that holds rows, by its number; see `gather`."""

    of: dict[int, Moments]

    @property
    def cells(self) -> list[int]:
        """Numbers of the cells that hold rows, ascending."""
        return list(self.of)

    def over(self, cells: Iterable[int]) -> Moments:
        """Add these cells up; a cell without rows adds nothing.

        Raises
        ------
        ValueError
            If a cell is named twice, or none of them holds a row.
        """
        asked = [int(cell) for cell in cells]
        if len(set(asked)) < len(asked):
            raise ValueError(f"each cell can be added once, not {asked}")
        parts = [moments for cell, moments in self.of.items() if cell in asked]
        if len(parts) < 2:
            if not parts:
                raise ValueError(f"no rows in cells {asked}; there are rows in {self.cells}")
            return parts[0]
        n, first = sum(p.n for p in parts), parts[0]
        # About the first cell's mean, so that a column that is constant over all cells stays so to the last bit.
        mean_x = first.mean_x + sum(p.n / n * (p.mean_x - first.mean_x) for p in parts)
        mean_y = first.mean_y + sum(p.n / n * (p.mean_y - first.mean_y) for p in parts)
        gap_x = np.stack([np.sqrt(p.n) * (p.mean_x - mean_x) for p in parts])  # (cells, d)
        gap_y = np.stack([np.sqrt(p.n) * (p.mean_y - mean_y) for p in parts])
        Sxx, Sxy, Syy = gap_x.T @ gap_x, gap_x.T @ gap_y, (gap_y**2).sum(0)
        for p in parts:
            Sxx += p.Sxx
            Sxy += p.Sxy
            Syy += p.Syy
        rows = np.sort(np.concatenate([p.rows for p in parts]))
        low_y, high_y = np.min([p.low_y for p in parts], axis=0), np.max([p.high_y for p in parts], axis=0)
        return Moments(n, mean_x, mean_y, Sxx, Sxy, Syy, rows, low_y, high_y)


def gather(X: np.ndarray, Y: np.ndarray, cells: np.ndarray, *, chunk: int = 4096, device: str = "cpu") -> CellSums:
    """Read features and targets once and sum them per cell, in float64.

    Holds C * (d * d + d * genes) * 8 bytes for C cells, and `chunk` rows.

    Parameters
    ----------
    X
        (N, d) features of any float type; a `numpy.memmap` is read `chunk` rows at a time.
    Y
        (N, genes) targets.
    cells
        (N,) integers, each row's cell; rows of cell -1 are not read.
    device
        ``"cpu"``, or a torch device to sum on.

    Raises
    ------
    ValueError
        If shapes disagree, no row has a cell, or a row that is read holds NaN or infinity.
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
    steps = _numpy_steps() if device == "cpu" else _torch_steps(device)
    with np.errstate(invalid="ignore", over="ignore"):  # NaN and infinity are found by their sums
        return _sum_up(_pieces(X, Y, cells, chunk), cells, X.shape[1], Y.shape[1], *steps)


def _pieces(X, Y, cells, chunk: int) -> Iterator[tuple[int, np.ndarray, np.ndarray, np.ndarray]]:
    """Yield (cell, row numbers, features, targets) chunk by chunk, copying only where a cell's rows lie scattered."""
    for start in range(0, len(X), chunk):
        here = cells[start : start + chunk]
        for cell in np.unique(here[here >= 0]):
            rows = start + np.flatnonzero(here == cell)
            together = rows[-1] - rows[0] + 1 == len(rows)
            at = slice(rows[0], rows[-1] + 1) if together else rows
            yield int(cell), rows, X[at], Y[at]


def _numpy_steps() -> tuple[Callable, Callable, Callable, Callable]:
    def add_square(total, x):
        # One triangle, in place: half the work of a product, and no temporary.
        dsyrk(1.0, x.T, beta=1.0, c=total.T, overwrite_c=1)

    return np.zeros, lambda block: np.array(block, dtype=np.float64, order="C"), add_square, lambda a: a


def _torch_steps(device: str) -> tuple[Callable, Callable, Callable, Callable]:
    import torch

    return (
        lambda shape: torch.zeros(shape, dtype=torch.float64, device=device),
        lambda block: torch.from_numpy(np.array(block)).to(device).double(),
        lambda total, x: total.addmm_(x.T, x),
        lambda a: a.cpu().numpy(),
    )


def _sum_up(pieces, cells, d: int, genes: int, zeros, load, add_square, fetch) -> CellSums:
    shift, total, xx, xy, yy, low, high = {}, {}, {}, {}, {}, {}, {}
    for cell, rows, *blocks in pieces:
        x, y = map(load, blocks)
        if cell not in shift:
            # About the cell's own first rows: no other row takes part, and a constant column leaves exact zeros.
            shift[cell] = [z[0] + (z - z[0]).mean(0) for z in (x, y)]
            total[cell] = [zeros(d), zeros(genes)]
            xx[cell], xy[cell], yy[cell] = zeros((d, d)), zeros((d, genes)), zeros(genes)
            low[cell], high[cell] = np.full(genes, np.inf), np.full(genes, -np.inf)
        for name, block, z, s, t in zip(("features", "targets"), blocks, (x, y), shift[cell], total[cell], strict=True):
            z -= s
            t += z.sum(0)
            if not bool((t - t == 0).all()):
                raise _not_finite(name, block, rows)
        add_square(xx[cell], x)
        xy[cell] += x.T @ y
        yy[cell] += (y * y).sum(0)
        low[cell], high[cell] = np.minimum(low[cell], blocks[1].min(0)), np.maximum(high[cell], blocks[1].max(0))
    of = {}
    for cell in sorted(shift):
        rows = np.flatnonzero(cells == cell)
        root = np.sqrt(len(rows))
        (shift_x, shift_y), (x, y) = (map(fetch, pair.pop(cell)) for pair in (shift, total))
        Sxx, Sxy, Syy = (fetch(sums.pop(cell)) for sums in (xx, xy, yy))
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
    return ValueError(f"{name} hold NaN or infinite values; the first in row {rows[bad[0, 0]]}, column {bad[0, 1]}")


@dataclass(frozen=True)
class Components:
    """Principal components of standardized training features, and how the targets go along with them.

    Attributes
    ----------
    mean, scale
        (d,) subtracted from and divided into the features.
    values, vectors
        (k,) eigenvalues of the scatter matrix, descending, 0 without variance; and (d, k) eigenvectors.
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
        """Return the ridge's coefficients (k, genes) on the scores; directions without variance are left out."""
        shrink = self.values + alpha
        return self.cross / np.where(self.values > 0, shrink, np.inf)[:, None]


def components(moments: Moments, n_components: int | None = 256, *, standardize: bool = True) -> Components:
    """Standardize and reduce by PCA, from sums alone.

    A column without variance, as scikit-learn's StandardScaler judges it, is not scaled and carries nothing.

    Parameters
    ----------
    n_components
        Capped at rows - 1 and at d; None keeps d.
    standardize
        Divide each column by its standard deviation (of the population) before PCA. Means are removed either way.
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
    """Pearson correlation on the test rows for each penalty, from sums alone: no row is predicted.

    Parameters
    ----------
    train
        Moments of the training rows, reduced to `n_components`; or their `components`, made once for several tests.
    alphas
        Ridge penalties, numbers of at least 0.

    Returns
    -------
    numpy.ndarray
        (len(alphas), genes) float64; NaN where targets or predictions are constant over the test rows.
    """
    if not all(alpha >= 0 for alpha in alphas):
        raise ValueError(f"penalties are numbers of at least 0, not {list(alphas)}")
    if len(train.mean_y) != len(test.mean_y):
        raise ValueError(f"training sums hold {len(train.mean_y)} targets and test sums {len(test.mean_y)}")
    reduced = train if isinstance(train, Components) else components(train, n_components)
    V = reduced.vectors / reduced.scale[:, None]  # (d, k)
    spread, shared = V.T @ (test.Sxx @ V), V.T @ test.Sxy  # (k, k), (k, genes)
    offset, uncancelled = V.T @ (test.mean_x - reduced.mean), (V**2).T @ np.diag(test.Sxx)  # (k,), (k,)
    flat_y = test.Syy <= 1e-20 * (test.Syy + test.n * test.mean_y**2)
    path = np.empty((len(alphas), len(test.mean_y)))
    for row, alpha in zip(path, alphas, strict=True):
        w = reduced.weights(alpha)
        var_p, cov = (w * (spread @ w)).sum(0), (w * shared).sum(0)
        # As in `pearson`, a constant is known by what rounding leaves: of the mean, and of features that cancel.
        flat_p = var_p <= 1e-20 * test.n * (offset @ w) ** 2 + 1e-14 * uncancelled @ w**2
        with np.errstate(invalid="ignore", divide="ignore"):
            row[:] = np.where(flat_y | flat_p, np.nan, cov / np.sqrt(var_p * test.Syy))
    return path
