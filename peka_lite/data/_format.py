"""Read, check and write the files of a HEST-1k folder; `HestFormatError` reports malformed ones."""

from __future__ import annotations

import codecs
import csv
import difflib
import io
import math
import warnings
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import anndata as ad
import h5py
import numpy as np
import pandas as pd
from scipy import sparse

from peka_lite._core._file_kinds import describe_mismatch, parse_json, read_bytes, read_text
from peka_lite._core.hdf5 import Hdf5Error, check_compressed, check_sizes, open_hdf5, read_anndata
from peka_lite._core.io import open_new_file
from peka_lite.data.tiles import TILE_SHAPE, open_tiles

# Read beside X, obs, var and uns["spatial"]; mixture, niche and rate exist in the embedded cohort alone.
PARTS = {"obsm": ("spatial", "mixture", "niche"), "layers": ("counts", "rate")}
MAX_COUNT = 1e9  # of a gene in a spot
MAX_COORDINATE = 1e9  # pixels; the largest images have 1e6
POSITION_COLUMNS = ("in_tissue", "array_row", "array_col")  # columns of obs that are copied to outputs


class HestFormatError(ValueError):
    """Error for a file that does not follow HEST-1k's layout; the message names the file, the field and the fix.

    Examples
    --------
    >>> import peka_lite as pk
    >>> pk.read_cohort("my_slides")  # doctest: +ELLIPSIS
    Traceback (most recent call last):
        ...
    peka_lite.data._format.HestFormatError: my_slides/st: no .h5ad file. Give the folder with st, ...
    """

    def __init__(self, path, field: str, fix: str):
        super().__init__(f"{path}: {field}. {fix}")


def read_spots(path: Path) -> ad.AnnData:
    """Read raw counts (N, G) as CSR float32, with unique barcodes, integer counts and finite pixel centers."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="(Observation|Variable) names are not unique")
        return check_spots(read_h5ad(path), path)


def read_h5ad(path: Path) -> ad.AnnData:
    """Read X, obs, var and `PARTS` of an ``.h5ad`` file; raise `HestFormatError` for any other file."""
    try:
        return read_anndata(path, **PARTS, as_csr=True)
    except Hdf5Error as error:
        raise HestFormatError(error.path, error.problem, error.fix) from error


def check_spots(adata: ad.AnnData, path, *, raw: str = "X must hold raw counts") -> ad.AnnData:
    """Check spots and convert them in place to the form of `read_spots`; errors name `path`, and `raw` as the fix."""
    if adata.X is None:
        raise HestFormatError(path, "X is missing", raw)
    if not adata.n_obs:
        raise HestFormatError(path, "has no spots", "obs_names must be the barcodes of spots")
    if not adata.n_vars:
        raise HestFormatError(path, "has no genes", "var_names must be gene names")
    if not adata.obs_names.is_unique:
        twice = adata.obs_names[adata.obs_names.duplicated()][0]
        raise HestFormatError(path, f"barcode {twice!r} is duplicated in obs_names", "Barcodes must be unique")
    X = sparse.csr_matrix(adata.X)
    if (counts := X.data).dtype.kind not in "biuf":
        raise HestFormatError(path, f"X has dtype {counts.dtype}, not numbers", raw)
    for bad, kind in (
        (~np.isfinite(counts), "NaN or infinite"),
        (counts < 0, "negative"),
        (counts != np.rint(counts), "non-integer"),
        (counts > MAX_COUNT, "too large"),
    ):
        if bad.any():
            raise HestFormatError(path, f"X holds {kind} counts ({counts[bad][0]})", raw)
    adata.X = X.astype(np.float32)
    read_pixel_centers(adata, path)
    # Two genes (Ensembl ids) with one symbol stay two columns, with suffixes as in scanpy.
    adata.var_names_make_unique()
    return adata


def read_pixel_centers(adata: ad.AnnData, path) -> np.ndarray:
    """Return the centers of spots, (N, 2) float64, x first."""
    try:
        spatial = np.asarray(adata.obsm["spatial"])
        if spatial.dtype.kind not in "cV" and (np.abs(spatial[:, [0, 1]].astype(float)) < MAX_COORDINATE).all():
            return spatial[:, :2].astype(float)
    except (KeyError, IndexError, TypeError, ValueError):
        pass
    problem = "obsm['spatial'] is missing, not finite or beyond 1e9 pixels"
    raise HestFormatError(path, problem, "It must hold (N, 2) pixel centers")


def check_sparse(matrix, path) -> None:
    """Check that the arrays of a sparse matrix are consistent, before its rows are read."""
    if sparse.issparse(matrix) and matrix.format in ("csr", "csc"):
        shape = matrix.shape if matrix.format == "csr" else matrix.shape[::-1]
        try:
            check_compressed(matrix.data, matrix.indices, matrix.indptr, shape, path, "X")
        except Hdf5Error as error:
            raise HestFormatError(path, error.problem, "Read the counts again") from None


def read_tile_barcodes(path: Path) -> pd.Index:
    """Return the barcode of each tile of a patches file, after checking the tiles' shape and type."""
    try:
        with open_hdf5(path) as file:
            key = next((k for k in ("barcode", "barcodes") if isinstance(file.get(k), h5py.Dataset)), None)
            img = open_tiles(file, path)
            if key is None:
                raise Hdf5Error(
                    path, "dataset 'barcode' is missing", "Tiles are joined to spots on it ('barcodes' works too)"
                )
            if (n := math.prod(file[key].shape or ())) != len(img):
                raise Hdf5Error(path, f"{n:,} barcodes for {len(img):,} tiles", "There must be one barcode per tile")
            check_sizes(path, [file[key]])
            barcodes = decode_text(file[key][()])
    except Hdf5Error as error:
        raise HestFormatError(error.path, error.problem, error.fix) from None
    except (OSError, UnicodeDecodeError) as error:
        raise HestFormatError(path, f"cannot be read as HDF5 ({error})", "Download the file again") from None
    if not len(barcodes):
        raise HestFormatError(path, "img holds no tile", "Tiles must be uint8 (N, 224, 224, 3) with N above 0")
    if not barcodes.is_unique:
        twice = barcodes[barcodes.duplicated()][0]
        raise HestFormatError(path, f"barcode {twice!r} belongs to several tiles", "Barcodes must be unique")
    return barcodes


def decode_text(values: np.ndarray) -> pd.Index:
    """Return the texts of an HDF5 dataset of any shape, in one dimension."""
    return pd.Index([value.decode() if isinstance(value, bytes) else str(value) for value in np.ravel(values)])


def write_tiles(path: Path, tiles: Iterable[np.ndarray], barcodes: Sequence[str], corners: np.ndarray, *,
                attributes: Mapping[str, object], field: str = "barcode", of: Path | None = None) -> None:  # fmt: skip
    """Write a patches file: tiles (224, 224, 3) uint8 with the barcode and upper left corner (x, y) of each."""
    chunk = (1, *TILE_SHAPE)
    min_bytes = len(barcodes) * int(np.prod(TILE_SHAPE)) // 10  # tissue is compressed to about two thirds
    with open_new_file(path, min_bytes, of=of) as opened, h5py.File(opened, "w") as file:
        image = file.create_dataset("img", (len(barcodes), *TILE_SHAPE), "u1", chunks=chunk, compression="gzip")
        for row, tile in enumerate(tiles):
            image[row] = tile
            opened.check()
        for dataset in (image, file.create_dataset("coords", data=corners)):
            dataset.attrs.update(attributes)
        column = np.array([[barcode.encode()] for barcode in barcodes], dtype=object)  # (n_tiles, 1)
        file.create_dataset(field, data=column, dtype=h5py.string_dtype())


def clean_patient_name(value) -> str | None:
    """Return a patient's name, or None if the field is blank: null, NaN (valid in Python's JSON) or spaces."""
    if pd.api.types.is_scalar(value) and pd.isna(value):
        return None
    return str(value).replace("\0", "\ufffd").strip() or None  # HDF5 strings cannot contain NUL


def read_patients(patients, known: Collection[str]) -> dict[str, str]:
    """Return slide id -> patient from a mapping, or from a CSV file with columns id and patient.

    Columns are separated by commas, semicolons or tabs. Blank patients are skipped. The error for an invalid row, or
    for a slide that is not in `known`, names its line.
    """
    if patients is None or isinstance(patients, Mapping):
        return {str(i): name for i, value in (patients or {}).items() if (name := clean_patient_name(value))}
    path = Path(patients)
    if not path.is_file():
        raise HestFormatError(path, "file is missing", "Give a CSV file with columns id and patient")
    seen: dict[str, tuple[str | None, int]] = {}
    for line, row in _read_rows(path, ("id", "patient")):
        slide, patient = row["id"], row["patient"] or None
        if not slide:
            raise HestFormatError(path, f"line {line} names patient {patient!r} but no slide", "Fill in its id")
        if slide not in known:
            near = difflib.get_close_matches(slide, known, 1, 0.5)
            fix = f"Did you mean {near[0]}?" if near else f"The cohort has {', '.join(sorted(known)[:8])}"
            raise HestFormatError(path, f"line {line} names slide {slide!r}, which is not in the cohort", fix)
        before, first = seen.setdefault(slide, (patient, line))
        if patient != before:
            names = f"{before or 'blank'} and {patient or 'blank'}"
            problem = f"lines {first} and {line} give two patients for {slide}: {names}"
            raise HestFormatError(path, problem, "Keep the correct line")
    return {slide: patient for slide, (patient, _) in seen.items() if patient}


def _read_rows(path: Path, columns: Sequence[str]) -> Iterator[tuple[int, dict[str, str]]]:
    """Yield the line number, from 1, and the stripped cells in `columns` of each non-blank row of a CSV file."""
    try:
        raw = read_bytes(path)
    except ValueError as error:
        problem = str(error).removeprefix(f"{path}: ")
        raise HestFormatError(path, problem, "Write one line per slide: id,patient") from None
    try:
        text = raw.decode("utf-16" if raw[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE) else "utf-8-sig")
    except UnicodeDecodeError as error:
        raise HestFormatError(path, f"not UTF-8 text ({error})", "Save the table as CSV in UTF-8") from None
    head = text.lstrip().partition("\n")[0]
    lines = csv.reader(io.StringIO(text, newline=""), delimiter=max(",;\t", key=head.count), strict=True)
    try:
        table = [(lines.line_num, cells) for cells in lines]
    except csv.Error as error:
        raise HestFormatError(path, f"line {lines.line_num} is not valid CSV ({error})", "Save it as CSV") from None
    names, n_rows = [], 0
    for line, cells in table:
        cells = [cell.strip() for cell in cells]
        if not any(cells):
            continue
        if not names:
            names = [cell.lower() for cell in cells]
            if any(names.count(column) != 1 for column in columns):
                break
            continue
        n_rows += 1
        if any(cells[len(names) :]):
            problem = f"line {line} has {len(cells)} fields, the header {len(names)}"
            raise HestFormatError(path, problem, 'Put a field that contains the separator in "quotes"')
        cells += [""] * (len(names) - len(cells))  # spreadsheets omit trailing blanks
        yield line, {column: cells[names.index(column)] for column in columns}
    if not n_rows:
        reason = describe_mismatch(path, {"text", "empty"})
        problem = f"columns {' and '.join(columns)} are missing" + (f" ({reason})" if reason else "")
        raise HestFormatError(path, problem, f"Write one line per slide: {','.join(columns)}")


def read_metadata(path: Path) -> dict:
    """Read a slide's JSON fields."""
    try:
        fields = parse_json(read_text(path))
    except ValueError as error:
        reason = describe_mismatch(path, {"text", "pickle"}) or str(error).removeprefix(f"{path}: ")
        raise HestFormatError(path, f"not valid JSON ({reason})", "Download the file again") from None
    if not isinstance(fields, dict):
        raise HestFormatError(path, f"is a JSON {type(fields).__name__}", "It must be one JSON object")
    return fields
