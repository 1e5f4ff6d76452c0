"""Counts of a Visium slide as Space Ranger wrote them, with the centers of their spots."""

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
from peka_lite._core.hdf5 import FLOOR, RATIO, Hdf5Error, check_compressed, check_sizes, open_hdf5
from peka_lite.data._format import HestFormatError, read_h5ad

TABLE = 2**27  # bytes of the unpacked table of barcodes or features; 500,000 barcodes take 10 million
ROWS = 2**21  # lines of it
LONGEST_LINE = 10_000  # letters of a line of a table with few columns
LINE = 64  # bytes of a line of matrix.mtx, more than two numbers and a count ever take


def read_counts(path: str | os.PathLike) -> ad.AnnData:
    """Read counts and centers of spots: an ``.h5ad`` file, or the ``outs`` folder that Space Ranger wrote.

    Of `outs` the filtered matrix (HDF5, else the folder of that name) and the table of positions are read, nothing
    else; of features that are not gene expression, such as antibodies, none is kept.

    Raises
    ------
    FileNotFoundError
        For a path that is neither, or a folder without Space Ranger's files.
    HestFormatError
        For files that hold something else, and barcodes without a position.

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
        raise FileNotFoundError(f"{path}: neither an .h5ad file nor Space Ranger's outs folder, which holds spatial")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Variable names are not unique")  # they are seen to later
        counts = _read_matrix(path)
    places = _read_places(path)
    if (lost := ~counts.obs_names.isin(places.index)).any():
        raise HestFormatError(
            path / "spatial",
            f"no position for {lost.sum()} of {len(lost)} barcodes, such as {counts.obs_names[lost][0]}",
            "Matrix and positions must come from one run of Space Ranger",
        )
    places = places.loc[counts.obs_names]
    counts.obs = places[["in_tissue", "array_row", "array_col"]].astype(int)
    counts.obsm["spatial"] = places[["pxl_col_in_fullres", "pxl_row_in_fullres"]].to_numpy(float)  # (N, 2), x first
    return counts


def _read_matrix(outs: Path) -> ad.AnnData:
    """Read Space Ranger's filtered counts of genes, whichever optional fields they come with."""
    path, folder = outs / "filtered_feature_bc_matrix.h5", outs / "filtered_feature_bc_matrix"
    if not path.is_file() and folder.is_dir():
        path = folder
        X, barcodes, features = _read_mtx(folder)
    elif not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; Space Ranger writes it, and a folder of that name")
    else:
        try:
            X, barcodes, features = _read_hdf5(path)
        except Hdf5Error as error:
            raise HestFormatError(
                path, f"cannot be read as Space Ranger's matrix ({error.what})", "Take the one from its outs folder"
            ) from None
        except (OSError, KeyError, ValueError, TypeError, AttributeError) as error:
            raise HestFormatError(
                path, f"cannot be read as Space Ranger's matrix ({error})", "Take the one from its outs folder"
            ) from None
    names = features.get("name", features["id"])
    var = pd.DataFrame({"gene_ids": features["id"]}, index=names)
    if "feature_type" in features:
        var["feature_types"] = features["feature_type"]
    counts = ad.AnnData(X, obs=pd.DataFrame(index=barcodes), var=var)
    if "feature_types" in var:
        counts = counts[:, var["feature_types"] == "Gene Expression"].copy()
    if not counts.n_vars:
        raise HestFormatError(path, "holds no feature of type Gene Expression", "Give the matrix of gene counts")
    return counts


def _read_hdf5(path: Path) -> tuple[sparse.csr_matrix, np.ndarray, dict[str, np.ndarray]]:
    """Return counts (barcodes, features), barcodes, and the columns of features that are read."""
    with open_hdf5(path) as file:
        matrix = file["matrix"]
        columns = [name for name in ("id", "name", "feature_type") if name in matrix["features"]]
        arrays = [matrix[name] for name in ("data", "indices", "indptr", "shape")]
        texts = [matrix["barcodes"], *(matrix["features"][name] for name in columns)]
        check_sizes(path, [*arrays, *texts])
        data, indices, indptr, shape = (array[()] for array in arrays)
        barcodes, *fields = (text.asstr()[()] for text in texts)
    features = dict(zip(columns, fields, strict=True))
    known = (len(barcodes), len(features["id"]))
    if shape.tolist() != [*known[::-1]] or any(len(field) != known[1] for field in fields):
        raise ValueError(f"its shape is {shape.tolist()}, with {known[1]} features and {known[0]} barcodes")
    check_compressed(data, indices, indptr, known, path, "matrix")
    return sparse.csr_matrix((data, indices, indptr), shape=known), barcodes, features


def _read_mtx(folder: Path) -> tuple[sparse.csr_matrix, list[str], dict[str, list[str]]]:
    """Read the folder of text files, packed since version 3, as `_read_hdf5`."""
    old = (folder / "genes.tsv").is_file()
    paths = [folder / name for name in ("matrix.mtx", "genes.tsv" if old else "features.tsv", "barcodes.tsv")]
    matrix, genes, codes = paths if old else [path.with_name(f"{path.name}.gz") for path in paths]
    rows = _read_table(genes)
    width = min(map(len, rows), default=0)
    if width < (2 if old else 3):
        raise HestFormatError(
            genes, f"has {width} columns", "They are id, name and, since version 3, type of a feature"
        )
    features = dict(zip(("id", "name", "feature_type"), map(list, zip(*rows, strict=False)), strict=False))
    barcodes = [row[0] for row in _read_table(codes)]
    shape = (len(rows), len(barcodes))
    fix = "Take the folder from Space Ranger's outs"
    try:
        with _open(matrix, 2**16) as file:
            kind = file.readline(2**10).decode("ascii").lower().split()
            while (line := file.readline(2**10)).startswith(b"%"):
                pass
        said = [int(number) for number in line.split()]
        if kind[:3] != ["%%matrixmarket", "matrix", "coordinate"] or kind[3:] not in (
            ["integer", "general"],
            ["real", "general"],
        ):
            raise HestFormatError(matrix, f"is no matrix of counts: {' '.join(kind)!r}", fix)
        if tuple(said[:2]) != shape or len(said) != 3:
            what = f"is declared as {said}, with {shape[0]} features and {shape[1]} barcodes"
            raise HestFormatError(matrix, what, fix)
        if not 0 <= said[2] <= min(FLOOR + RATIO * matrix.stat().st_size, 2**40) // 24:
            raise HestFormatError(matrix, f"declares {said[2]:,} counts, more than a file of its size can hold", fix)
        with _open(matrix, LINE * said[2] + 2**16) as file:
            X = sparse.csr_matrix(mmread(file).T)
    except HestFormatError:
        raise
    except (OSError, EOFError, zlib.error, ValueError, IndexError, OverflowError) as error:
        raise HestFormatError(matrix, f"cannot be read as MatrixMarket ({error})", fix) from None
    return X, barcodes, features


class _AtMost(io.RawIOBase):
    """A file that is an error to read beyond so many bytes: what a few packed ones unpack to is not known before."""

    def __init__(self, file: BinaryIO, most: int):
        self.file, self.left = file, most

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        n = self.file.readinto(buffer)
        self.left -= n
        if self.left < 0:
            raise OSError("it unpacks to more bytes than its lines can take")
        return n

    def close(self) -> None:
        self.file.close()
        super().close()


def _open(path: Path, most: int) -> io.BufferedReader:
    if not path.is_file():
        raise HestFormatError(path, "no such file", "Take the folder from Space Ranger's outs")
    file = gzip.open(path) if path.suffix == ".gz" else path.open("rb")  # noqa: SIM115 -- _AtMost closes it
    return io.BufferedReader(_AtMost(file, most))


def _read_table(path: Path) -> list[list[str]]:
    """Read lines whose cells tabs part."""
    fix = "Take the folder from Space Ranger's outs"
    try:
        text = read_text(path, longest=TABLE)
        if text.count("\n") > ROWS:
            raise ValueError(f"has more than {ROWS:,} lines")
        lines = text.splitlines()
    except FileNotFoundError:
        raise HestFormatError(path, "no such file", fix) from None
    except ValueError as error:
        raise HestFormatError(path, str(error).removeprefix(f"{path}: "), fix) from None
    if max(map(len, lines), default=0) > LONGEST_LINE:
        raise HestFormatError(path, f"is no table (a line has more than {LONGEST_LINE:,} letters)", fix)
    return [line.split("\t") for line in lines if line]


def _read_places(outs: Path) -> pd.DataFrame:
    """Read the table of positions, by barcode; older versions of Space Ranger wrote it without a header."""
    names = ["barcode", "in_tissue", "array_row", "array_col", "pxl_row_in_fullres", "pxl_col_in_fullres"]
    files = [outs / "spatial" / name for name in ("tissue_positions.csv", "tissue_positions_list.csv")]
    path = next((file for file in files if file.is_file()), None)
    if path is None:
        raise FileNotFoundError(f"{files[0]}: no such file, nor {files[1].name}; Space Ranger writes one of them")
    try:
        text = read_text(path)
        if len(text.partition("\n")[0]) > LONGEST_LINE:
            raise ValueError(f"its first line has more than {LONGEST_LINE:,} letters")
        places = pd.read_csv(io.StringIO(text), header=None, dtype=str, keep_default_na=False)
        if places.iloc[0, 0] == "barcode":
            places = places.iloc[1:].set_axis(places.iloc[0], axis=1)
        elif places.shape[1] == len(names):
            places = places.set_axis(names, axis=1)
        places = places.set_index("barcode")[names[1:]]
        places = places.replace({"in_tissue": {"True": "1", "False": "0"}}).astype(float)  # as pandas writes it
        if not places.index.is_unique:
            raise ValueError(f"barcode {places.index[places.index.duplicated()][0]!r} stands more than once")
        if (odd := ~np.isfinite(places).all(axis=1)).any():
            raise ValueError(f"{places.index[odd][0]!r} has a place that is no number")
        return places
    except (KeyError, ValueError) as error:
        error = str(error).removeprefix(f"{path}: ")
        raise HestFormatError(
            path, f"is no table of positions ({error})", f"It has columns {', '.join(names)}"
        ) from None
