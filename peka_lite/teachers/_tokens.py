"""Convert expression to scFoundation's tokens: expressed genes, then target depth T and source depth S."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import sparse

PRE_NORMALIZED = ("F", "T", "A")
INPUT_TYPES = ("singlecell", "bulk")


@dataclass(frozen=True)
class Tokens:
    """Tokens of N spots in flat arrays, sorted by spot.

    Attributes
    ----------
    values
        (n_tokens,) float32, all above zero: log-normalized expression, then T, then S.
    positions
        (n_tokens,) int64: index of the gene in the vocabulary; T and S have the next two indices.
    indptr
        (N + 1,) int64: spot i has tokens ``indptr[i]`` to ``indptr[i + 1]``.
    """

    values: np.ndarray
    positions: np.ndarray
    indptr: np.ndarray

    @property
    def lengths(self) -> np.ndarray:
        """Number of tokens of each spot, including T and S, (N,) int64."""
        return np.diff(self.indptr)

    def padded(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return values (B, L), positions (B, L) and lengths (B,) of the given spots, padded with zeros."""
        lengths = self.lengths[rows]
        column = np.arange(lengths.max())
        real = column < lengths[:, None]  # (B, L)
        index = np.where(real, self.indptr[rows][:, None] + column, 0)
        return np.where(real, self.values[index], 0), np.where(real, self.positions[index], 0), lengths


def tokenize(
    X: sparse.csr_matrix,
    *,
    total: np.ndarray | None = None,
    resolution: str = "t4",
    pre_normalized: str = "F",
    input_type: str = "singlecell",
    names: Sequence[str] | None = None,
) -> Tokens:
    """Convert expression in the vocabulary's order to tokens.

    Parameters
    ----------
    X
        (N, G), columns in the vocabulary's order: raw counts (`pre_normalized` F) or log-normalized values (T, A).
    total
        (N,) raw total counts. Required for A, where S is their log10.
    resolution
        Target depth T: 4 (log10 of 10,000 counts) for ``"t4"``, log10 of 2 times the spot's total for ``"f2"``, the
        spot's log10 total plus 1 for ``"a1"``. Single cells only.
    pre_normalized
        ``"F"``: raw counts, converted to ``log1p(count / total * 1e4)``. ``"T"``: log-normalized values, with their sum
        as the total. ``"A"``: log-normalized values, with `total`.
    input_type
        ``"singlecell"``, or ``"bulk"``: counts are scaled to the median total of all rows, and T and S are both the
        log10 of the summed values (F) or their sum (T).
    names
        Names of the spots for error messages.

    Returns
    -------
    Tokens

    Raises
    ------
    ValueError
        For an unknown option, for values that do not match `pre_normalized`, and for spots without a positive value or
        with T or S not above zero. The reference implementation drops such tokens.

    Notes
    -----
    Hao et al. 2024, doi:10.1038/s41592-024-02305-7.

    Examples
    --------
    >>> import peka_lite as pk
    >>> spots = pk.teachers.tokenize([[0, 30, 70]])  # counts of three genes
    >>> spots.positions.tolist()  # the expressed genes, then T and S
    [1, 2, 3, 4]
    >>> [round(float(value), 2) for value in spots.values]
    [8.01, 8.85, 4.0, 2.0]
    """
    check_options(resolution=resolution, pre_normalized=pre_normalized, input_type=input_type)
    X = sparse.csr_matrix(X, dtype=np.float64, copy=True)
    X.sum_duplicates()  # also sorts the indices
    X.eliminate_zeros()
    names = np.arange(X.shape[0]).astype(str) if names is None else np.asarray(names, dtype=str)
    check_values(X.data, pre_normalized=pre_normalized, input_type=input_type)
    n_genes = np.diff(X.indptr)
    _reject(names, n_genes == 0, "express no gene of the vocabulary", "drop them, for example with `qc`")

    if pre_normalized == "A":
        if total is None:
            raise ValueError("pre_normalized='A' needs the raw totals")
        total = np.asarray(total, dtype=np.float64).ravel()
        _reject(names, ~(np.isfinite(total) & (total > 0)), "have no raw total above zero", "pass sums of raw counts")
    else:
        total = np.asarray(X.sum(1)).ravel()  # (N,)
    if pre_normalized == "F":
        target = np.median(total) if input_type == "bulk" else 1e4
        X.data = np.log1p(X.data / np.repeat(total, n_genes) * target)
    if input_type == "bulk":
        depth = np.asarray(X.sum(1)).ravel()
        T = S = np.log10(depth) if pre_normalized == "F" else depth
    else:
        S, kind, number = np.log10(total), resolution[0], float(resolution[1:])
        T = {"t": np.full(len(S), number), "f": S + np.log10(max(number, 1e-300)), "a": S + number}[kind]
    _reject(names, S <= 0, "have a source depth S that is not above zero", "drop spots with very few counts")
    _reject(names, T <= 0, f"have a target depth T that is not above zero at {resolution!r}", "raise the resolution")

    indptr = np.concatenate([[0], np.cumsum(n_genes + 2)])
    values, positions = np.empty(indptr[-1], dtype=np.float32), np.empty(indptr[-1], dtype=np.int64)
    index = np.arange(X.nnz) + 2 * np.repeat(np.arange(len(n_genes)), n_genes)  # shifted by T and S of earlier spots
    values[index], positions[index] = X.data, X.indices
    for offset, depth, position in ((2, T, X.shape[1]), (1, S, X.shape[1] + 1)):
        values[indptr[1:] - offset], positions[indptr[1:] - offset] = depth, position
    return Tokens(values, positions, indptr)


def check_options(*, resolution: str, pre_normalized: str, input_type: str) -> None:
    """Check the options of `tokenize`."""
    if pre_normalized not in PRE_NORMALIZED:
        raise ValueError(f"unknown pre_normalized {pre_normalized!r}; known: {', '.join(PRE_NORMALIZED)}")
    if input_type not in INPUT_TYPES:
        raise ValueError(f"unknown input_type {input_type!r}; known: {', '.join(INPUT_TYPES)}")
    if not re.fullmatch(r"[tfa]\d+(\.\d+)?", str(resolution)):
        raise ValueError(f"unknown resolution {resolution!r}; use t, f or a and a number, such as 't4', 'f2' or 'a1'")
    if input_type == "bulk" and (pre_normalized == "A" or resolution != "t4"):
        raise ValueError("bulk input takes pre_normalized 'F' or 'T' and no resolution")


def check_values(values: np.ndarray, *, pre_normalized: str, input_type: str) -> None:
    """Check that values match `pre_normalized`."""
    if not np.isfinite(values).all() or (values < 0).any():
        raise ValueError("expression contains NaN, infinite or negative values")
    whole = not np.any(values != np.rint(values))
    if pre_normalized == "F" and input_type == "singlecell" and not whole:
        raise ValueError("pre_normalized='F' takes raw counts, not fractions; use 'T' for log-normalized data")
    if pre_normalized != "F" and whole and values.any():
        raise ValueError(f"pre_normalized={pre_normalized!r} takes log-normalized values, but these are whole counts")


def _reject(names: np.ndarray, invalid: np.ndarray, problem: str, fix: str) -> None:
    if invalid.any():
        more = ", ..." if invalid.sum() > 5 else ""
        raise ValueError(f"{invalid.sum()} spots {problem} ({', '.join(names[invalid][:5])}{more}): {fix}")
