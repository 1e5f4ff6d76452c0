"""What each file of a HEST-1k folder must hold, and the one error that says so."""

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

# What is read of a slide beside X, obs, var and uns["spatial"]; all but the first two is the embedded cohort's.
PARTS = {"obsm": ("spatial", "mixture", "niche"), "layers": ("counts", "rate")}
MOST_COUNTS = 1e9  # of a gene in a spot
FARTHEST = 1e9  # pixels from a corner; the largest images have 1e6
PLACES = ("in_tissue", "array_row", "array_col")  # columns of obs that outputs keep


class HestFormatError(ValueError):
    """A file that is not what HEST-1k's layout says; the message names the file, the field and the fix.

    Examples
    --------
    >>> import peka_lite as pk
    >>> pk.read_cohort("my_slides")  # doctest: +ELLIPSIS
    Traceback (most recent call last):
        ...
    peka_lite.data._format.HestFormatError: my_slides/st: no .h5ad file here. Give the folder that holds st, ...
    """

    def __init__(self, path, field: str, fix: str):
        super().__init__(f"{path}: {field}. {fix}")


def read_spots(path: Path) -> ad.AnnData:
    """Read raw counts (N, G) as CSR float32, with unique barcodes, whole counts and finite pixel centers."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="(Observation|Variable) names are not unique")
        return check_spots(read_h5ad(path), path)


def read_h5ad(path: Path) -> ad.AnnData:
    """Read counts, their tables and `PARTS` of an ``.h5ad`` file; `HestFormatError` says what another file is."""
    try:
        return read_anndata(path, **PARTS, as_csr=True)
    except Hdf5Error as error:
        raise HestFormatError(error.path, error.what, error.fix) from error


def check_spots(adata: ad.AnnData, path, *, raw: str = "X must hold raw counts") -> ad.AnnData:
    """Bring spots into the form that `read_spots` promises, in place; errors name `path`, and `raw` as the fix."""
    if adata.X is None:
        raise HestFormatError(path, "X is missing", raw)
    if not adata.n_obs:
        raise HestFormatError(path, "holds no spot", "obs_names must be the barcodes of spots")
    if not adata.n_vars:
        raise HestFormatError(path, "holds no gene", "var_names must be the names of genes")
    if not adata.obs_names.is_unique:
        twice = adata.obs_names[adata.obs_names.duplicated()][0]
        raise HestFormatError(path, f"barcode {twice!r} stands more than once in obs_names", "Barcodes must be unique")
    X = sparse.csr_matrix(adata.X)
    if (counts := X.data).dtype.kind not in "biuf":
        raise HestFormatError(path, f"X holds {counts.dtype}, not numbers", raw)
    for bad, what in (
        (~np.isfinite(counts), "NaN or infinite"),
        (counts < 0, "negative"),
        (counts != np.rint(counts), "non-integer"),
        (counts > MOST_COUNTS, "impossible"),
    ):
        if bad.any():
            raise HestFormatError(path, f"X holds {what} counts ({counts[bad][0]})", raw)
    adata.X = X.astype(np.float32)
    pixel_centers(adata, path)
    # A symbol that names two genes (two Ensembl ids) keeps both columns, told apart as scanpy does.
    adata.var_names_make_unique()
    return adata


def pixel_centers(adata: ad.AnnData, path) -> np.ndarray:
    """Return the centers of spots, (N, 2) float64, x first."""
    try:
        spatial = np.asarray(adata.obsm["spatial"])
        if spatial.dtype.kind not in "cV" and (np.abs(spatial[:, [0, 1]].astype(float)) < FARTHEST).all():
            return spatial[:, :2].astype(float)
    except (KeyError, IndexError, TypeError, ValueError):
        pass
    raise HestFormatError(
        path, "obsm['spatial'] is missing or not finite, or lies 1e9 pixels away", "It must hold (N, 2) pixel centers"
    )


def check_sparse(matrix, path) -> None:
    """Refuse a sparse matrix whose arrays do not fit each other, before anything reads rows of it."""
    if sparse.issparse(matrix) and matrix.format in ("csr", "csc"):
        shape = matrix.shape if matrix.format == "csr" else matrix.shape[::-1]
        try:
            check_compressed(matrix.data, matrix.indices, matrix.indptr, shape, path, "X")
        except Hdf5Error as error:
            raise HestFormatError(path, error.what, "Read the counts again") from None


def read_tile_barcodes(path: Path) -> pd.Index:
    """Return the barcode of each tile of a patches file, after checking its tiles' shape and type."""
    try:
        with open_hdf5(path) as file:
            key = next((k for k in ("barcode", "barcodes") if isinstance(file.get(k), h5py.Dataset)), None)
            img = open_tiles(file, path)
            if key is None:
                what = "dataset 'barcode' is missing"
                raise HestFormatError(path, what, "Tiles join spots on it; 'barcodes' will do")
            if math.prod(file[key].shape or ()) != len(img):
                what = f"{math.prod(file[key].shape or ()):,} barcodes for {len(img):,} tiles"
                raise HestFormatError(path, what, "There must be one a tile")
            check_sizes(path, [file[key]])
            barcodes = pd.Index([b.decode() if isinstance(b, bytes) else str(b) for b in np.ravel(file[key][()])])
    except Hdf5Error as error:
        raise HestFormatError(error.path, error.what, error.fix) from None
    except (OSError, UnicodeDecodeError) as error:
        raise HestFormatError(path, f"cannot be read as HDF5 ({error})", "Download the file again") from None
    if not len(barcodes):
        raise HestFormatError(path, "img holds no tile", "Tiles must be uint8 (N, 224, 224, 3) with N above 0")
    if not barcodes.is_unique:
        twice = barcodes[barcodes.duplicated()][0]
        raise HestFormatError(path, f"barcode {twice!r} names more than one tile", "Barcodes must be unique")
    return barcodes


def write_tiles(path: Path, tiles: Iterable[np.ndarray], barcodes: Sequence[str], corners: np.ndarray, *,
                attributes: Mapping[str, object], field: str = "barcode", of: Path | None = None) -> None:  # fmt: skip
    """Write a patches file: tiles (224, 224, 3) uint8 one by one, the barcode and upper left corner (x, y) of each."""
    one = (1, *TILE_SHAPE)
    least = len(barcodes) * int(np.prod(TILE_SHAPE)) // 10  # bytes; tissue is compressed to about two thirds
    with open_new_file(path, least, of=of) as opened, h5py.File(opened, "w") as file:
        image = file.create_dataset("img", (len(barcodes), *TILE_SHAPE), "u1", chunks=one, compression="gzip")
        for row, tile in enumerate(tiles):
            image[row] = tile
            opened.check()
        for dataset in (image, file.create_dataset("coords", data=corners)):
            dataset.attrs.update(attributes)
        column = np.array([[barcode.encode()] for barcode in barcodes], dtype=object)  # (n_tiles, 1)
        file.create_dataset(field, data=column, dtype=h5py.string_dtype())


def patient_name(value) -> str | None:
    """Return a patient's name, or None where the field is blank: null, NaN (Python's JSON knows it) or spaces."""
    if pd.api.types.is_scalar(value) and pd.isna(value):
        return None
    return str(value).replace("\0", "\ufffd").strip() or None  # no file of HDF5 takes NUL


def read_patients(patients, known: Collection[str]) -> dict[str, str]:
    """Return slide id -> patient from a mapping, or from a CSV file with columns id and patient on slides in `known`.

    Every row of a file counts: a blank patient leaves what the metadata say, and what cannot be used is refused by its
    line. Commas, semicolons or tabs part the columns, as spreadsheets write them.
    """
    if patients is None or isinstance(patients, Mapping):
        return {str(i): name for i, value in (patients or {}).items() if (name := patient_name(value))}
    path = Path(patients)
    if not path.is_file():
        raise HestFormatError(path, "file is missing", "Give a CSV file with columns id and patient")
    found: dict[str, tuple[str | None, int]] = {}
    for line, row in _read_rows(path, ("id", "patient")):
        slide, who = row["id"], row["patient"] or None
        if not slide:
            raise HestFormatError(path, f"line {line} names patient {who!r} and no slide", "Fill in its id")
        if slide not in known:
            near = difflib.get_close_matches(slide, known, 1, 0.5)
            fix = f"Is it {near[0]}?" if near else f"The cohort has {', '.join(sorted(known)[:8])}"
            raise HestFormatError(path, f"line {line} names slide {slide!r}, which the cohort does not have", fix)
        before, first = found.setdefault(slide, (who, line))
        if who != before:
            raise HestFormatError(
                path,
                f"lines {first} and {line} name two patients of {slide}: {before or 'blank'} and {who or 'blank'}",
                "Keep the one that is right",
            )
    return {slide: who for slide, (who, _) in found.items() if who}


def _read_rows(path: Path, columns: Sequence[str]) -> Iterator[tuple[int, dict[str, str]]]:
    """Give the number of each line of a table, from 1, and its stripped cells in `columns`; blank lines are skipped."""
    try:
        raw = read_bytes(path)
    except ValueError as error:
        raise HestFormatError(path, _reason(path, error), "Give one line a slide: id,patient") from None
    try:
        text = raw.decode("utf-16" if raw[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE) else "utf-8-sig")
    except UnicodeDecodeError as error:
        raise HestFormatError(path, f"is no text in UTF-8 ({error})", "Save the table as CSV in UTF-8") from None
    head = text.lstrip().partition("\n")[0]
    lines = csv.reader(io.StringIO(text, newline=""), delimiter=max(",;\t", key=head.count), strict=True)
    try:
        table = [(lines.line_num, cells) for cells in lines]
    except csv.Error as error:
        what = f"line {lines.line_num} is no line of a table ({error})"
        raise HestFormatError(path, what, "Save the table as CSV") from None
    names: list[str] = []
    n_rows = 0
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
            raise HestFormatError(
                path,
                f"line {line} has {len(cells)} fields, the first line {len(names)}",
                'Put a field that holds the separator in "quotes"',
            )
        cells += [""] * (len(names) - len(cells))  # spreadsheets leave blanks at the end out
        yield line, {column: cells[names.index(column)] for column in columns}
    if not n_rows:
        seen = describe_mismatch(path, {"text", "empty"})
        raise HestFormatError(
            path,
            f"columns {' and '.join(columns)} are missing" + (f" ({seen})" if seen else ""),
            f"Give one line a slide: {','.join(columns)}",
        )


def read_metadata(path: Path) -> dict:
    """Read a slide's JSON fields."""
    try:
        fields = parse_json(read_text(path))
    except ValueError as error:
        seen = describe_mismatch(path, {"text", "pickle"}) or _reason(path, error)
        raise HestFormatError(path, f"not valid JSON ({seen})", "Download the file again") from None
    if not isinstance(fields, dict):
        raise HestFormatError(path, f"holds a {type(fields).__name__}", "It must hold one object of named fields")
    return fields


def _reason(path: Path, error: ValueError) -> str:
    return str(error).removeprefix(f"{path}: ")
