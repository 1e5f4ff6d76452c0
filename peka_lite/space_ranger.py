"""Counts of a Visium slide as Space Ranger wrote them, with the centres of their spots."""

from __future__ import annotations

import os
import warnings
from pathlib import Path

import anndata as ad
import h5py
import pandas as pd
from scipy import sparse

from peka_lite._hest_files import HestFormatError, read_h5ad


def read_counts(path: str | os.PathLike) -> ad.AnnData:
    """Read counts and centres of spots: an ``.h5ad`` file, or the ``outs`` folder that Space Ranger wrote.

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
    >>> counts = pk.read_counts(pk.cohort_root("mini") / "st" / "MINI1.h5ad")
    >>> counts.obsm["spatial"].shape == (counts.n_obs, 2)
    True
    """
    path = Path(path)
    if path.is_file() and path.suffix == ".h5ad":
        return read_h5ad(path)
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
        import scanpy as sc

        return sc.read_10x_mtx(folder)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; Space Ranger writes it, and a folder of that name")
    try:
        with h5py.File(path, "r") as file:
            matrix = file["matrix"]
            fields = {name: data for name, data in matrix["features"].items() if isinstance(data, h5py.Dataset)}
            features = {name: data.asstr()[:] for name, data in fields.items() if data.dtype.kind in "SO"}
            barcodes = matrix["barcodes"].asstr()[:]
            X = sparse.csr_matrix(
                (matrix["data"][:], matrix["indices"][:], matrix["indptr"][:]), shape=matrix["shape"][:][::-1]
            )
            names = features.pop("name", features["id"])
    except (OSError, KeyError, ValueError) as error:
        raise HestFormatError(
            path, f"cannot be read as Space Ranger's matrix ({error})", "Take the one from its outs folder"
        ) from None
    var = pd.DataFrame(
        {"gene_ids": features.pop("id", names)} | {k: v for k, v in features.items() if len(v) == len(names)},
        index=names,
    ).rename(columns={"feature_type": "feature_types"})
    counts = ad.AnnData(X, obs=pd.DataFrame(index=barcodes), var=var)
    if "feature_types" in var:
        counts = counts[:, var["feature_types"] == "Gene Expression"].copy()
    if not counts.n_vars:
        raise HestFormatError(path, "holds no feature of type Gene Expression", "Give the matrix of gene counts")
    return counts


def _read_places(outs: Path) -> pd.DataFrame:
    """Read the table of positions, by barcode; older versions of Space Ranger wrote it without a header."""
    names = ["barcode", "in_tissue", "array_row", "array_col", "pxl_row_in_fullres", "pxl_col_in_fullres"]
    files = [outs / "spatial" / name for name in ("tissue_positions.csv", "tissue_positions_list.csv")]
    path = next((file for file in files if file.is_file()), None)
    if path is None:
        raise FileNotFoundError(f"{files[0]}: no such file, nor {files[1].name}; Space Ranger writes one of them")
    places = pd.read_csv(path, header=None, dtype=str, keep_default_na=False)
    if places.iloc[0, 0] == "barcode":
        places = places.iloc[1:].set_axis(places.iloc[0], axis=1)
    elif places.shape[1] == len(names):
        places = places.set_axis(names, axis=1)
    try:
        places = places.set_index("barcode")[names[1:]]
        return places.replace({"in_tissue": {"True": "1", "False": "0"}}).astype(float)  # as pandas writes it
    except (KeyError, ValueError) as error:
        raise HestFormatError(
            path, f"is no table of positions ({error})", f"It has columns {', '.join(names)}"
        ) from None
