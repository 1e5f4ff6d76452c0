"""Read Space Ranger's output for a Visium slide: counts and spot centers."""

from __future__ import annotations

import gzip
import io
import os
import warnings
import zlib
from pathlib import Path
from typing import BinaryIO

import anndata as ad
import numpy as np
import pandas as pd
from scipy import sparse
from scipy.io import mmread

from peka_lite._core._file_kinds import read_text
from peka_lite._core.hdf5 import FLOOR, RATIO, check_compressed, check_sizes, open_hdf5
from peka_lite.data._format import HestFormatError, read_h5ad

MAX_TABLE = 2**27  # bytes of the decompressed table of barcodes or features; 500,000 barcodes take 10 million
MAX_ROWS = 2**21  # of that table
MAX_LINE = 10_000  # characters of a line of a table with few columns
MAX_ENTRY = 64  # bytes of a line of matrix.mtx: two indices and a count
_FROM_OUTS = "Take the folder from Space Ranger's outs"


def read_counts(path: str | os.PathLike) -> ad.AnnData:
    """Read spot counts and centers from an ``.h5ad`` file or Space Ranger's ``outs`` folder.

    Of ``outs``, only the filtered matrix (HDF5, else the folder of that name) and the table of positions are read.
    Features other than gene expression, such as antibodies, are dropped.

    Raises
    ------
    FileNotFoundError
        If the path does not exist or Space Ranger's files are missing.
    HestFormatError
        If a file has another format, or a barcode has no position.

    Examples
    --------
    >>> import peka_lite as pk
    >>> counts = pk.data.read_counts(pk.data.cohort_root("mini") / "st" / "MINI1.h5ad")
    >>> counts.obsm["spatial"].shape == (counts.n_obs, 2)
    True
    """
    path = Path(path)
    if path.is_file() and path.suffix == ".h5ad":
        return read_h5ad(path)
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file or folder; give an .h5ad file or Space Ranger's outs folder")
    path = path / "outs" if (path / "outs" / "spatial").is_dir() else path
    if not (path / "spatial").is_dir():
        raise FileNotFoundError(f"{path}: neither an .h5ad file nor Space Ranger's outs folder (with spatial)")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Variable names are not unique")  # fixed later
        counts = _read_matrix(path)
    positions = _read_positions(path)
    if (missing := ~counts.obs_names.isin(positions.index)).any():
        raise HestFormatError(
            path / "spatial",
            f"no position for {missing.sum()} of {len(missing)} barcodes, such as {counts.obs_names[missing][0]}",
            "Matrix and positions must come from one run of Space Ranger",
        )
    positions = positions.loc[counts.obs_names]
    counts.obs = positions[["in_tissue", "array_row", "array_col"]].astype(int)
    counts.obsm["spatial"] = positions[["pxl_col_in_fullres", "pxl_row_in_fullres"]].to_numpy(float)  # (N, 2), x first
    return counts


def _read_matrix(outs: Path) -> ad.AnnData:
    """Read Space Ranger's filtered gene counts; the optional fields may be missing."""
    path, folder = outs / "filtered_feature_bc_matrix.h5", outs / "filtered_feature_bc_matrix"
    if not path.is_file() and folder.is_dir():
        path = folder
        X, barcodes, features = _read_mtx(folder)
    elif not path.is_file():
        raise FileNotFoundError(f"{path}: no such file, nor the folder of that name; Space Ranger writes both")
    else:
        try:
            X, barcodes, features = _read_hdf5(path)
        except (OSError, KeyError, ValueError, TypeError, AttributeError) as error:
            problem = f"cannot be read as Space Ranger's matrix ({getattr(error, 'problem', error)})"
            raise HestFormatError(path, problem, "Take the one from its outs folder") from None
    names = features.get("name", features["id"])
    var = pd.DataFrame({"gene_ids": features["id"]}, index=names)
    if "feature_type" in features:
        var["feature_types"] = features["feature_type"]
    counts = ad.AnnData(X, obs=pd.DataFrame(index=barcodes), var=var)
    if "feature_types" in var:
        counts = counts[:, var["feature_types"] == "Gene Expression"].copy()
    if not counts.n_vars:
        raise HestFormatError(path, "contains no feature of type Gene Expression", "Give the matrix of gene counts")
    return counts


def _read_hdf5(path: Path) -> tuple[sparse.csr_matrix, np.ndarray, dict[str, np.ndarray]]:
    """Return counts (barcodes, features), the barcodes, and the id, name and type of the features."""
    with open_hdf5(path) as file:
        matrix = file["matrix"]
        columns = [name for name in ("id", "name", "feature_type") if name in matrix["features"]]
        arrays = [matrix[name] for name in ("data", "indices", "indptr", "shape")]
        texts = [matrix["barcodes"], *(matrix["features"][name] for name in columns)]
        check_sizes(path, [*arrays, *texts])
        data, indices, indptr, shape = (array[()] for array in arrays)
        barcodes, *fields = (text.asstr()[()] for text in texts)
    features = dict(zip(columns, fields, strict=True))
    expected = (len(barcodes), len(features["id"]))
    if shape.tolist() != [*expected[::-1]] or any(len(field) != expected[1] for field in fields):
        raise ValueError(f"its shape is {shape.tolist()}, with {expected[1]} features and {expected[0]} barcodes")
    check_compressed(data, indices, indptr, expected, path, "matrix")
    return sparse.csr_matrix((data, indices, indptr), shape=expected), barcodes, features


def _read_mtx(folder: Path) -> tuple[sparse.csr_matrix, list[str], dict[str, list[str]]]:
    """Read the folder of text files (gzipped since version 3); return the same as `_read_hdf5`."""
    old = (folder / "genes.tsv").is_file()
    paths = [folder / name for name in ("matrix.mtx", "genes.tsv" if old else "features.tsv", "barcodes.tsv")]
    matrix, genes, codes = paths if old else [path.with_name(f"{path.name}.gz") for path in paths]
    rows = _read_table(genes)
    width = min(map(len, rows), default=0)
    if width < (2 if old else 3):
        raise HestFormatError(genes, f"has {width} columns", "It needs id, name and, since version 3, feature type")
    features = dict(zip(("id", "name", "feature_type"), map(list, zip(*rows, strict=False)), strict=False))
    barcodes = [row[0] for row in _read_table(codes)]
    shape = (len(rows), len(barcodes))
    try:
        with _open(matrix, 2**16) as file:
            kind = file.readline(2**10).decode("ascii").lower().split()
            while (line := file.readline(2**10)).startswith(b"%"):
                pass
        declared = [int(number) for number in line.split()]  # rows, columns, entries
        if kind not in [f"%%matrixmarket matrix coordinate {number} general".split() for number in ("integer", "real")]:
            raise HestFormatError(matrix, f"is not a matrix of counts: {' '.join(kind)!r}", _FROM_OUTS)
        if tuple(declared[:2]) != shape or len(declared) != 3:
            problem = f"is declared as {declared}, with {shape[0]} features and {shape[1]} barcodes"
            raise HestFormatError(matrix, problem, _FROM_OUTS)
        if not 0 <= (n := declared[2]) <= min(FLOOR + RATIO * matrix.stat().st_size, 2**40) // 24:
            raise HestFormatError(matrix, f"declares {n:,} counts, more than a file of its size can hold", _FROM_OUTS)
        with _open(matrix, MAX_ENTRY * n + 2**16) as file:
            X = sparse.csr_matrix(mmread(file).T)
    except HestFormatError:
        raise
    except (OSError, EOFError, zlib.error, ValueError, IndexError, OverflowError) as error:
        raise HestFormatError(matrix, f"cannot be read as MatrixMarket ({error})", _FROM_OUTS) from None
    return X, barcodes, features


class _LimitedFile(io.RawIOBase):
    """Raise an error after `limit` bytes of a file, whose decompressed size is not known in advance."""

    def __init__(self, file: BinaryIO, limit: int):
        self.file, self.left = file, limit

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        n = self.file.readinto(buffer)
        self.left -= n
        if self.left < 0:
            raise OSError("it decompresses to more bytes than its lines can take")
        return n

    def close(self) -> None:
        self.file.close()
        super().close()


def _open(path: Path, limit: int) -> io.BufferedReader:
    if not path.is_file():
        raise HestFormatError(path, "no such file", _FROM_OUTS)
    file = gzip.open(path) if path.suffix == ".gz" else path.open("rb")  # noqa: SIM115 -- _LimitedFile closes it
    return io.BufferedReader(_LimitedFile(file, limit))


def _read_table(path: Path) -> list[list[str]]:
    """Read a tab-separated table."""
    try:
        text = read_text(path, longest=MAX_TABLE)
        if text.count("\n") > MAX_ROWS:
            raise ValueError(f"has more than {MAX_ROWS:,} lines")
        if max(map(len, lines := text.splitlines()), default=0) > MAX_LINE:
            raise ValueError(f"is not a table (a line has more than {MAX_LINE:,} characters)")
        return [line.split("\t") for line in lines if line]
    except (FileNotFoundError, ValueError) as error:
        raise HestFormatError(path, str(error).removeprefix(f"{path}: "), _FROM_OUTS) from None


def _read_positions(outs: Path) -> pd.DataFrame:
    """Read the table of positions, indexed by barcode; older versions of Space Ranger write no header."""
    names = ["barcode", "in_tissue", "array_row", "array_col", "pxl_row_in_fullres", "pxl_col_in_fullres"]
    files = [outs / "spatial" / name for name in ("tissue_positions.csv", "tissue_positions_list.csv")]
    path = next((file for file in files if file.is_file()), None)
    if path is None:
        raise FileNotFoundError(f"{files[0]}: no such file, nor {files[1].name}; Space Ranger writes one of them")
    try:
        text = read_text(path)
        if len(text.partition("\n")[0]) > MAX_LINE:
            raise ValueError(f"its first line has more than {MAX_LINE:,} characters")
        positions = pd.read_csv(io.StringIO(text), header=None, dtype=str, keep_default_na=False)
        if positions.iloc[0, 0] == "barcode":
            positions = positions.iloc[1:].set_axis(positions.iloc[0], axis=1)
        elif positions.shape[1] == len(names):
            positions = positions.set_axis(names, axis=1)
        positions = positions.set_index("barcode")[names[1:]]
        positions = positions.replace({"in_tissue": {"True": "1", "False": "0"}}).astype(float)  # from pandas
        if not positions.index.is_unique:
            raise ValueError(f"barcode {positions.index[positions.index.duplicated()][0]!r} occurs more than once")
        if (invalid := ~np.isfinite(positions).all(axis=1)).any():
            raise ValueError(f"the position of {positions.index[invalid][0]!r} is not finite")
        return positions
    except (KeyError, ValueError) as error:
        problem = f"is not a table of positions ({str(error).removeprefix(f'{path}: ')})"
        raise HestFormatError(path, problem, f"It needs the columns {', '.join(names)}") from None
