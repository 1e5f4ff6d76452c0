"""Read features that were made elsewhere, and match them to the spots of a cohort."""

from __future__ import annotations

import hashlib
import itertools
import logging
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import h5py
import numpy as np
import pandas as pd
from scipy.spatial import cKDTree

from peka_lite._core._file_kinds import describe_mismatch, read_text
from peka_lite._core.hashing import sha256
from peka_lite._core.hdf5 import check_sizes, open_hdf5, read_table
from peka_lite.data._format import decode_text, read_pixel_centers
from peka_lite.data.hest import Cohort, Slide

LOG = logging.getLogger("peka_lite")


def describe_features(path: str | os.PathLike) -> str:
    """Return the name of a file or folder of features with a hash of its content, as text."""
    path = Path(path)
    files = [path] if path.is_file() else sorted(file for file in path.iterdir() if file.is_file())
    digest = hashlib.sha256("".join(f"{file.name} {sha256(file)}" for file in files).encode()).hexdigest()
    return f"features of {path.resolve().name}, sha256 {digest[:12]}"


@dataclass(frozen=True)
class _Table:
    """Features (n, D) float32 of a file, with the slide and barcode of each row, or the center of its tile."""

    path: Path
    X: np.ndarray
    slides: pd.Index | None = None  # None: one slide
    barcodes: pd.Index | None = None  # None: joined by `centers`
    centers: np.ndarray | None = None  # (n, 2) float64, pixels
    size: float = np.nan  # of a tile, pixels


def read_features(path: str | os.PathLike, cohort: Cohort, *, key: str | None = None) -> tuple[Cohort, np.ndarray]:
    """Read features that were made elsewhere, one row for each spot of a cohort.

    Four kinds of files are read; `SLIDE` is the id of a slide:

    - ``SLIDE.h5`` with ``embeddings`` (or ``features``) and ``barcodes``, as HEST-bench writes it.
    - ``SLIDE.h5ad`` with the features in X or ``obsm[key]``, and the barcodes in ``obs["barcode"]`` or the names of the
      rows. A column ``obs["slide"]``, which ``peka-lite embed`` writes, lets one file hold several slides.
    - ``SLIDE.npy`` with ``SLIDE.barcodes.txt`` beside it, one barcode per line.
    - ``SLIDE.h5`` with ``features`` and ``coords`` alone, as TRIDENT and CLAM write it. A spot gets the features of the
      tile that contains its center: of several, the one whose center is nearest along both axes. ``coords`` are upper
      left corners (x, y) in pixels of the full image, as the positions of spots are. Attributes of ``coords`` give the
      size of tiles; CLAM's feature files have none, so there it is the median distance between tiles.

    The logger ``peka_lite`` reports at level INFO how many spots were joined, and how far tiles are from spots.

    Parameters
    ----------
    path
        Folder with one file per slide, or a file with all slides.
    cohort
        Cohort whose spots get features.
    key
        Entry of ``obsm`` that holds the features, for ``.h5ad`` files; by default X is read.

    Returns
    -------
    cohort : Cohort
        The same object if all spots have features. Joined by position, spots outside every tile are dropped.
    X : numpy.ndarray
        (N, D) float32, finite; row i belongs to spot i of the returned cohort.

    Raises
    ------
    FileNotFoundError
        If `path` does not exist, or slides have no file.
    ValueError
        If a file has another layout or is damaged, holds other values than finite numbers (n, D), lacks a spot's
        barcode or has it twice, if D differs between slides, or if fewer than 90% of a slide's spots lie in a tile.

    Examples
    --------
    >>> import h5py
    >>> import numpy as np
    >>> import peka_lite as pk
    >>> cohort = pk.open_cohort("mini", slides=["MINI1"])
    >>> with h5py.File("MINI1.h5", "w") as file:
    ...     file["embeddings"] = np.ones((len(cohort), 384), dtype="f4")
    ...     file["barcodes"] = cohort.obs["barcode"].to_list()
    >>> same, X = pk.data.read_features("MINI1.h5", cohort)
    >>> X.shape, same is cohort
    ((190, 384), True)
    """
    path, ids = Path(path), [slide.id for slide in cohort.slides]
    if path.is_dir():
        tables = map(_read_file, _find_files(path, ids), itertools.repeat(key))  # one in memory at a time
    else:
        whole = _read_file(path, key)
        if whole.slides is None and len(ids) > 1:
            raise ValueError(
                f"{path}: does not say which of {len(ids)} slides its rows are of; give a folder with one file per "
                "slide, or an .h5ad file with a column 'slide' in obs"
            )
        tables = itertools.repeat(whole)
    joined, parts = [], []
    for slide, table in zip(cohort.slides, tables, strict=False):
        rows = _join_positions(table, slide) if table.barcodes is None else _join_barcodes(table, slide)
        joined.append(rows)
        parts.append(table.X[rows[rows >= 0]])
        if (width := table.X.shape[1]) != parts[0].shape[1]:
            raise ValueError(
                f"{table.path}: has {width} features per row, {ids[0]} has {parts[0].shape[1]}; embed all slides alike"
            )
    has_features = np.concatenate(joined) >= 0
    if not has_features.all():
        cohort = cohort.select(has_features, reason="outside every tile with features")
    return cohort, np.concatenate(parts)


def _find_files(folder: Path, ids: list[str]) -> list[Path]:
    files = {i: [file for end in _READERS if (file := folder / f"{i}{end}").is_file()] for i in ids}
    if missing := [i for i in ids if not files[i]]:
        raise FileNotFoundError(
            f"{folder}: no file for {len(missing)} of {len(ids)} slides ({_first(missing)}); name it {missing[0]}.h5, "
            ".h5ad or .npy, or leave the slides out"
        )
    if several := next((paths for paths in files.values() if len(paths) > 1), None):
        raise ValueError(f"{folder}: has {' and '.join(file.name for file in several)}; keep one file per slide")
    return [paths[0] for paths in files.values()]


def _read_file(path: Path, key: str | None) -> _Table:
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file or folder; give a folder with one file per slide, or a file")
    if path.suffix not in _READERS:
        raise ValueError(f"{path}: features are read from {', '.join(_READERS)}; save them as one of these")
    if key is not None and path.suffix != ".h5ad":
        raise ValueError(f"{path}: key names an entry of obsm in an .h5ad file; leave it out for {path.suffix}")
    try:
        return _READERS[path.suffix](path, key)
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: cannot be read ({error}); copy or write it again") from None


def _read_h5(path: Path, _) -> _Table:
    with open_hdf5(path) as file:
        names = [name for name in file if isinstance(file[name], h5py.Dataset)]
        values = next((name for name in ("embeddings", "features") if name in names), None)
        place = next((name for name in ("barcodes", "barcode", "coords") if name in names), None)
        if values is None or place is None:
            raise ValueError(
                f"{path}: has the datasets {_first(names, 20) or '(none)'}; features need 'embeddings' or 'features', "
                "with 'barcodes' or 'coords'"
            )
        check_sizes(path, [file[values], file[place]])
        X, size, rows = _check_values(file[values][()], path, values), _tile_size(file[place].attrs), file[place][()]
    if place != "coords":
        return _Table(path, X, barcodes=decode_text(rows))
    corners = rows[0] if np.ndim(rows) == 3 and len(rows) == 1 else np.asarray(rows)
    if corners.dtype.kind not in "iuf" or corners.shape != (len(X), 2) or not np.isfinite(corners).all():
        problem = f"coords are {corners.dtype} {corners.shape} for {len(X)} rows of features"
        raise ValueError(f"{path}: {problem}; they must be finite corners of tiles (n, 2), in pixels")
    corners = corners.astype(float)
    if n_twice := len(corners) - len(np.unique(corners, axis=0)):
        raise ValueError(f"{path}: {n_twice} coords are those of another row; keep one row of features per tile")
    if size is None:
        if len(corners) < 2:
            raise ValueError(f"{path}: coords do not give the size of tiles; set their attribute 'patch_size_level0'")
        size = float(np.median(cKDTree(corners).query(corners, k=2, p=np.inf)[0][:, 1]))
        LOG.info("coords do not give the size of tiles: taken as their distance, %g px (%s)", size, path)
    return _Table(path, X, centers=corners + size / 2, size=size)


def _tile_size(attributes: h5py.AttributeManager) -> float | None:
    """Return the edge of a tile in pixels of the full image, if the attributes of coords give it."""

    def read(name: str, default: float = np.nan) -> np.float64:
        try:
            return np.float64(np.ravel(attributes.get(name, default))[0])  # CLAM's downsample is a pair
        except (IndexError, TypeError, ValueError):  # text, which TRIDENT writes for None
            return np.float64(np.nan)

    with np.errstate(all="ignore"):
        sizes = (
            read("patch_size_level0"),
            read("patch_size_src"),
            read("patch_size") * read("level0_magnification") / read("target_magnification"),
            read("patch_size") * (read("downsample") if read("patch_level", 0) else 1),
        )
    return next((float(size) for size in sizes if 0 < size < np.inf), None)


def _read_h5ad(path: Path, key: str | None) -> _Table:
    name = "X" if key is None else f"obsm[{key!r}]"
    with open_hdf5(path) as file:
        embeddings = dict(file["obsm"]) if isinstance(file.get("obsm"), h5py.Group) else {}
        node = file.get("X") if key is None else embeddings.get(key)
        if not isinstance(node, h5py.Dataset) or "obs" not in file:
            raise ValueError(
                f"{path}: needs obs, and a dense array in {name}; key= may name an entry of obsm, which has "
                f"{_first(embeddings, 20) or 'none'}"
            )
        check_sizes(path, [file["obs"], node])
        obs, X = read_table(file["obs"], path), _check_values(node[()], path, name)
    slides = pd.Index(obs["slide"]).astype(str) if "slide" in obs else None
    return _Table(path, X, slides, pd.Index(obs.get("barcode", obs.index)).astype(str))


def _read_npy(path: Path, _) -> _Table:
    beside = path.with_suffix(".barcodes.txt")
    if not beside.is_file():
        raise ValueError(f"{beside}: is missing; write the barcodes of {path.name}, one per line")
    try:
        values = np.load(path, mmap_mode="r", allow_pickle=False)  # the size of the file limits memory
    except ValueError as error:
        seen = describe_mismatch(path, {"numpy"}) or error
        raise ValueError(f"{path}: cannot be read as .npy ({seen}); write it with numpy.save") from None
    return _Table(path, _check_values(values, path, "the array"), barcodes=pd.Index(read_text(beside).split()))


_READERS = {".h5": _read_h5, ".h5ad": _read_h5ad, ".npy": _read_npy}


def _check_values(values, path: Path, name: str) -> np.ndarray:
    """Return features (n, D) as float32; other programs may store (1, n, D)."""
    values = np.asarray(values)
    rows = values[0] if values.ndim == 3 and len(values) == 1 else values
    if rows.dtype.kind not in "iuf" or rows.ndim != 2 or not rows.size:
        raise ValueError(f"{path}: {name} is {values.dtype} {values.shape}; features must be numbers (n, D), n, D > 0")
    with np.errstate(over="ignore"):
        rows = rows.astype(np.float32)
    if n_bad := int((~np.isfinite(rows)).any(1).sum()):
        raise ValueError(f"{path}: {name} is not finite in {n_bad} of {len(rows)} rows; make these features again")
    return rows


def _join_barcodes(table: _Table, slide: Slide) -> np.ndarray:
    """Return the row of each spot of a slide."""
    if (n := len(table.barcodes)) != len(table.X):
        raise ValueError(f"{table.path}: {n} barcodes for {len(table.X)} rows of features; give each row its barcode")
    rows = np.arange(len(table.X)) if table.slides is None else np.flatnonzero(table.slides == slide.id)
    barcodes = table.barcodes[rows]
    if not barcodes.is_unique:
        twice = barcodes[barcodes.duplicated()].unique()
        raise ValueError(f"{table.path}: barcodes of {slide.id} come twice ({_first(twice)}); keep one row of each")
    joined = barcodes.get_indexer(slide.adata.obs_names)
    if len(missing := slide.adata.obs_names[joined < 0]):
        raise ValueError(
            f"{table.path}: no features for {len(missing)} of {slide.n_spots} spots of {slide.id} ({_first(missing)}), "
            f"its barcodes are {_first(barcodes) or 'none'}; embed these spots, or spell barcodes as the cohort does"
        )
    LOG.info("features of %s: %d spots joined by barcode (%s)", slide.id, slide.n_spots, table.path)
    return rows[joined]


def _join_positions(table: _Table, slide: Slide) -> np.ndarray:
    """Return the row of the tile that contains each spot of a slide, -1 outside every tile."""
    spots = read_pixel_centers(slide.adata, slide.id)
    distance, rows = cKDTree(table.centers).query(spots, p=np.inf)  # in this norm a tile is a ball
    inside = distance <= table.size / 2
    share = f"{inside.sum()} of {len(spots)} spots of {slide.id} ({inside.mean():.1%}) lie in a tile"
    if 10 * inside.sum() < 9 * len(spots):
        tiles, places = (f"{xy.min(0).round()} to {xy.max(0).round()}" for xy in (table.centers, spots))
        raise ValueError(
            f"{table.path}: only {share} of {table.size:g} px, and 90% must (tiles: {tiles}, spots: {places}); give "
            "coords of this slide, in pixels of the image that the spots are on, and tiles wherever there are spots"
        )
    away = np.linalg.norm(table.centers[rows] - spots, axis=1)[inside]
    sizes = (slide.metadata.get(f"pixel_size_um{kind}") for kind in ("", "_estimated", "_embedded"))
    um = next((size for size in sizes if isinstance(size, int | float) and 0 < size < np.inf), None)
    median, most = (f"{px:.1f} px" + (f" ({px * um:.1f} um)" if um else "") for px in (np.median(away), away.max()))
    LOG.info("%s, %s from its center (median), at most %s (%s)", share, median, most, table.path)
    return np.where(inside, rows, -1)


def _first(names: Iterable, n: int = 3) -> str:
    names = list(map(str, names))
    return ", ".join(names[:n]) + (", ..." if len(names) > n else "")
