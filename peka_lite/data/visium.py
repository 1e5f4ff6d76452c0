"""Add a custom slide to a folder in HEST-1k's layout: spot counts, and tiles cut from the slide image."""

from __future__ import annotations

import dataclasses
import json
import os
import shlex
import shutil
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
from pandas.api.types import is_numeric_dtype
from scipy import sparse
from sklearn.neighbors import NearestNeighbors

from peka_lite._core._signals import defer_signals
from peka_lite._core.io import write_file, write_h5ad
from peka_lite._core.locks import lock_work_folder
from peka_lite._core.outputs import check_work
from peka_lite._core.progress import logger, progress_bar, stage
from peka_lite.data._format import (
    POSITION_COLUMNS,
    HestFormatError,
    check_sparse,
    check_spots,
    clean_patient_name,
    read_metadata,
    read_pixel_centers,
    write_tiles,
)
from peka_lite.data.expression import load_in_memory
from peka_lite.data.hest import IMAGE_KEY, Slide, read_slide
from peka_lite.data.tiles import TILE_SHAPE
from peka_lite.data.tissue import check_stain
from peka_lite.data.wsi import ResolutionError, SlideError, WholeSlide, open_slide

FILES = {"patches": ".h5", "metadata": ".json", "st": ".h5ad"}  # st last: a cohort lists the slides in st
MOVING = "moving.json"  # in the draft: inode, size and time of the three files, which a move does not change
PITCH_UM, SPOT_UM = 100.0, 55.0  # Visium: distance between spot centers, spot diameter
GENE_COLUMNS = {  # columns of var, in lower case, that may name the genes in another way
    "gene", "genes", "gene_id", "gene_ids", "gene_name", "gene_names", "gene_symbol", "gene_symbols", "symbol",
    "symbols", "hgnc_symbol", "feature_id", "feature_name", "ensembl", "ensembl_id", "ensembl_ids", "ensembl_gene_id",
    "ensg", "original_name", "name", "id",
}  # fmt: skip
MAX_PITCH_ERROR = 0.1  # of the distance between spots, relative to PITCH_UM


def add_slide(
    root: str | os.PathLike,
    slide_id: str,
    counts: ad.AnnData,
    image: str | os.PathLike,
    *,
    patient: str | None = None,
    mpp: float | str | None = None,
    technology: str = "Visium",
    spot_um: float = SPOT_UM,
    metadata: Mapping | None = None,
    progress: bool = False,
) -> Slide:
    """Add a slide to a folder in HEST-1k's layout; a missing folder is created.

    A tile of 224 px at 0.5 um/px (112 um) is cut around every spot. The three files are written to a temporary folder
    and moved into place when all are complete.

    Parameters
    ----------
    root
        The cohort's folder.
    slide_id
        Id of the slide, new to the folder.
    counts
        Raw counts (N, G) with barcodes as ``obs_names`` and ``obsm["spatial"]`` (N, 2): spot centers, x first, in
        pixels of the full-resolution image, as `squidpy.read.visium` and `scanpy.read_visium` return them. Spots with
        ``obs["in_tissue"]`` 0 are dropped. Written are in_tissue, array_row and array_col of ``obs`` and other gene
        names (such as gene_ids) of ``var``; layers and other tables are not.
    image
        The full-resolution image that Space Ranger read, as for `open_slide`; not its ``hires`` or ``lowres`` image.
    patient
        Patient id, the same for all sections of a patient. None: unknown, which rules out splits by patient.
    mpp
        Microns per pixel of the image. None: from the file. ``"visium"``: from the spots, which are 100 um apart.
    technology
        ``"Visium"``: the distance between spots must agree with the resolution. Other names: no such check.
    spot_um
        Spot diameter in um, for maps.
    metadata
        More fields for the slide's JSON file, such as organ or disease_state.
    progress
        Show a progress bar in a terminal or a notebook; the plan goes to the logger ``peka_lite``.

    Returns
    -------
    Slide
        As `read_slide` returns it. ``dropped`` counts spots off the tissue and spots whose tile crosses the image's
        edge.

    Raises
    ------
    FileExistsError
        If the folder holds a file of that slide, or another process has added it meanwhile.
    HestFormatError
        If counts are not raw, barcodes repeat, coordinates are missing, or centers do not fit the image.
    FileNotFoundError, SlideError
        As `open_slide`. Also if the resolution is unknown, the image has an Orientation tag, or it is gray, fluorescent
        or inverted around the spots.

    Examples
    --------
    >>> import anndata as ad
    >>> import numpy as np
    >>> import peka_lite as pk
    >>> from PIL import Image
    >>> Image.new("RGB", (800, 600), (220, 180, 210)).save("scan.png")
    >>> counts = ad.AnnData(np.ones((3, 4), dtype=int))  # three spots, 200 px apart; the last is at the edge
    >>> counts.obsm["spatial"] = np.array([[300, 300], [500, 300], [700, 300]])
    >>> pk.data.add_slide("my_slides", "S1", counts, "scan.png", patient="P1", mpp=0.5)
    Slide S1: 2 spots x 4 genes, P1; dropped 1 spots without a tile
    """
    root = Path(root)
    _check_names(root, slide_id, metadata)
    if not spot_um > 0:
        raise ValueError(f"spot_um must be a spot diameter in um above 0, not {spot_um}")
    with lock_work_folder(root / slide_id) as draft:
        check_work(draft, (*FILES, Path(MOVING).stem))
        _remove_leftovers(draft, root, slide_id)
        _check_slide_is_new(root, slide_id)
        try:
            return _create_slide(
                root, slide_id, counts, image, draft, patient=patient, mpp=mpp, technology=technology, spot_um=spot_um,
                metadata=metadata, progress=progress,
            )  # fmt: skip
        finally:
            shutil.rmtree(draft, ignore_errors=True)


def _create_slide(
    root: Path, slide_id: str, counts: ad.AnnData, image, draft: Path, *, patient, mpp, technology, spot_um, metadata,
    progress,
) -> Slide:  # fmt: skip
    """Check the slide, write its files by way of the new folder `draft`, and read it back."""
    spots = _select_spots(counts, f"counts of {slide_id}")
    off_tissue = counts.n_obs - spots.n_obs
    centers = spots.obsm["spatial"]  # (N, 2)
    distance = spot_distance(centers) if len(centers) > 1 else None  # px
    embedded = mpp is None
    if isinstance(mpp, str):
        mpp = _compute_mpp(mpp, distance)
    try:
        opened = open_slide(image, mpp=mpp)
    except ResolutionError as error:
        fix = f"{error.fix}; for Visium, 'visium' derives them from the distance between spots"
        raise ResolutionError(error.path, error.problem, fix) from None
    with opened as slide:
        if slide.orientation != 1:
            problem = f"its Orientation tag, {slide.orientation}, rotates or mirrors it, so spot centers could refer to"
            fix = "Save it as Space Ranger read it, without the tag"
            raise SlideError(image, f"{problem} the image as stored or as displayed", fix)
        _check_centers(centers, slide, slide_id)
        if technology == "Visium" and distance is not None:
            _check_distance(distance, slide, slide_id)
        half = np.array(slide.tile) / 2
        inside = ((centers - half >= 0) & (centers + half <= slide.size)).all(1)  # (N,)
        if not inside.any():
            problem = f"none of {len(centers)} tiles of 112 um is inside it"
            raise HestFormatError(slide.path, problem, "Give an uncropped image")
        picture, scale = slide.thumbnail(1000)
        check_stain(slide, _select_pixels(picture, centers[inside] * scale, half * scale))
        um = slide.mpp[0]  # of a pixel
        fields = {  # HEST's
            "dataset_title": "own slides",
            "id": slide_id,
            "patient": clean_patient_name(patient),
            "st_technology": technology,
            "image": slide.path.name,
            "pixel_size_um": um,
            "pixel_size_um_estimated": PITCH_UM / distance if technology == "Visium" and distance else None,
            "fullres_px_width": slide.size[0],
            "fullres_px_height": slide.size[1],
            "spots_under_tissue": spots.n_obs,
            "inter_spot_dist": distance and distance * um,
            "nb_genes": spots.n_vars,
            **(metadata or {}),
            "spot_diameter": spot_um,
            "pixel_size_um_embedded": um if embedded else None,
        }
        factors = {"spot_diameter_fullres": spot_um / um, f"tissue_{IMAGE_KEY}_scalef": scale}
        spots.uns["spatial"] = {"ST": {"images": {IMAGE_KEY: picture}, "scalefactors": factors}}
        _write_files(root, slide_id, slide, spots, np.flatnonzero(inside), fields, draft, progress)
    stored = read_slide(root, slide_id)
    dropped = stored.dropped | ({"spots off the tissue": off_tissue} if off_tissue else {})
    return dataclasses.replace(stored, dropped=dropped)


def describe_next_step(root: str | os.PathLike) -> str:
    """Return a sentence with the next command for a folder of added slides."""
    root = Path(root)
    patients = [clean_patient_name(read_metadata(path).get("patient")) for path in (root / "metadata").glob("*.json")]
    known, unknown = len(set(patients) - {None}), patients.count(None)
    has = f"{root} has {len(patients)} slide" + "s" * (len(patients) != 1)
    has += f" of {known} patient" + "s" * (known != 1) if known else ""
    if unknown:
        has += f", {unknown} with no patient named"
    cohort, out = shlex.quote(str(root)), shlex.quote(f"runs/{root.resolve().name}")
    run = f"peka-lite run --cohort {cohort} --method none --n-splits {min(max(known, 2), 5)} --out {out}"
    if known + unknown < 2:
        return f"{has}; next: add a slide of another patient, then `{run}`; `peka-lite train` takes one patient"
    if unknown:
        return f"{has}; next: name the patients in a file with the columns id,patient, then `{run} --patients FILE.csv`"
    return f"{has}; next: add more, or `{run}`"


def spot_distance(centers: np.ndarray) -> float:
    """Return the distance between the centers of neighboring spots, in the unit of `centers` (N, 2).

    Examples
    --------
    >>> import numpy as np
    >>> import peka_lite as pk
    >>> x, y = np.meshgrid(np.arange(5) * 20.0, np.arange(5) * 20.0)
    >>> pk.data.spot_distance(np.column_stack([x.ravel(), y.ravel()]))
    20.0
    """
    n = min(7, len(centers))  # the spot and its six neighbors on a hexagonal grid
    near = NearestNeighbors(n_neighbors=n).fit(centers).kneighbors(centers)[0][:, 1:]  # (N, n - 1)
    return float(np.median(near[near <= 1.2 * np.median(near[:, 0])]))


def _check_names(root: Path, slide_id: str, metadata: Mapping | None) -> None:
    if not slide_id or slide_id.startswith(".") or Path(slide_id).name != slide_id:
        raise ValueError(f"{slide_id!r} is not a slide id: give a file name without a folder or a leading dot")
    if str(root) == "mini" or (root / "mini.json").is_file():
        raise ValueError(f"{root}: this is the embedded cohort, which must not change; give another folder")
    if reserved := {"id", "patient", "st_technology", "spot_diameter"} & set(metadata or {}):
        raise ValueError(f"metadata: remove {', '.join(sorted(reserved))}, which arguments of add_slide set")


def _check_slide_is_new(root: Path, slide_id: str) -> None:
    for folder in (root, *(root / name for name in FILES)):
        if os.path.lexists(folder) and not folder.is_dir():
            raise NotADirectoryError(f"{folder} is not a folder; give another --cohort")
    existing = [path for path in _slide_paths(root, slide_id).values() if os.path.lexists(path)]
    if existing:
        raise FileExistsError(f"{existing[0]} is there already; choose another id, or remove the slide's files")


def _slide_paths(root: Path, slide_id: str) -> dict[str, Path]:
    return {folder: root / folder / f"{slide_id}{end}" for folder, end in FILES.items()}


def _remove_leftovers(draft: Path, root: Path, slide_id: str) -> None:
    """Remove the draft of a killed job, and the files that it moved unless it moved all of them."""
    try:
        moving = json.loads((draft / MOVING).read_text("utf-8"))
    except (FileNotFoundError, ValueError):  # killed before any move
        moving = {}
    paths = _slide_paths(root, slide_id)
    if moving and not os.path.lexists(paths["st"]):
        for folder, path in paths.items():
            if path.is_file() and (path.stat().st_size == 0 or _identify(path) == moving[folder]):
                path.unlink()
    shutil.rmtree(draft, ignore_errors=True)


def _identify(path: Path) -> list[int]:
    """Return inode, size and time: a move leaves them unchanged, a write does not."""
    stat = path.stat()
    return [stat.st_ino, stat.st_size, stat.st_mtime_ns]


def _select_spots(counts: ad.AnnData, name: str) -> ad.AnnData:
    """Return a copy of the spots on tissue, in the form of `read_spots`."""
    if "spatial" not in counts.obsm:
        fix = "Read the counts with squidpy.read.visium, or add the (N, 2) pixel centers"
        raise HestFormatError(name, "obsm['spatial'] is missing", fix)
    spatial = read_pixel_centers(counts, name)
    rows = np.ones(counts.n_obs, dtype=bool)
    if "in_tissue" in counts.obs:
        rows = pd.to_numeric(counts.obs["in_tissue"].astype(object), errors="coerce").to_numpy(float) == 1
    if not rows.any():
        raise HestFormatError(name, "no spot is on the tissue", "obs['in_tissue'] must be 1 for spots on tissue")
    hint = " They may be in layers['counts']: X = layers['counts']." if "counts" in counts.layers else ""
    if counts.X is not None:
        counts = load_in_memory(counts)
        check_sparse(counts.X, name)  # before indexing rows
    positions = [c for c in POSITION_COLUMNS if c in counts.obs and is_numeric_dtype(counts.obs[c])]
    spots = ad.AnnData(
        sparse.csr_matrix(counts.X[rows]) if counts.X is not None else None,
        obs=counts.obs.loc[rows, positions].copy(),
        var=counts.var[[c for c in counts.var if str(c).lower() in GENE_COLUMNS]].copy(),
        obsm={"spatial": spatial[rows]},
    )
    return check_spots(spots, name, raw=f"X must hold raw counts, neither normalized nor logarithms.{hint}")


def _compute_mpp(mpp: str, distance: float | None) -> float:
    if mpp != "visium":
        raise ValueError(f"mpp must be microns per pixel, 'visium' or None, not {mpp!r}")
    if not distance:
        raise ValueError("mpp='visium' needs two spots at least: it derives the resolution from their distance")
    return PITCH_UM / distance


def _check_centers(centers: np.ndarray, slide: WholeSlide, slide_id: str) -> None:
    outside = ((centers < 0) | (centers > slide.size)).any(1)
    if outside.any():
        place = f"{slide.path.name}, {slide.size[0]} x {slide.size[1]} px"
        most = "(the largest are x={:.0f}, y={:.0f})".format(*centers.max(0))
        problem = f"{outside.sum()} of {len(centers)} centers are outside {place} {most}"
        fix = "obsm['spatial'] is in pixels of the full-resolution image: give the input image of Space Ranger"
        raise HestFormatError(f"counts of {slide_id}", problem, fix)


def _check_distance(distance: float, slide: WholeSlide, slide_id: str) -> None:
    pitch = distance * float(np.sqrt(np.prod(slide.mpp)))  # um
    if abs(pitch / PITCH_UM - 1) > MAX_PITCH_ERROR:
        problem = f"spots are {pitch:.0f} um apart at {slide.mpp[0]:.4g} um/px, Visium's {PITCH_UM:.0f} um"
        fix = f"If {slide.path.name} is the input image of Space Ranger, 'visium' as mpp derives "
        fix += f"{PITCH_UM / distance:.4g} um/px from the spots; for other spots, give their technology"
        raise HestFormatError(f"counts of {slide_id}", problem, fix)


def _select_pixels(picture: np.ndarray, centers: np.ndarray, half: np.ndarray) -> np.ndarray:
    """Return the pixels (n, 3) of a picture inside any tile, given the tiles' centers and half their sides."""
    covered = np.zeros(picture.shape[:2], dtype=bool)
    for (left, top), (right, bottom) in zip((centers - half).astype(int), (centers + half).astype(int), strict=True):
        covered[top : bottom + 1, left : right + 1] = True
    return picture[covered]


def _write_files(
    root: Path, slide_id: str, slide: WholeSlide, spots: ad.AnnData, rows, fields: dict, draft: Path, progress: bool
) -> None:
    """Write the three files to `draft` and move them into place; remove all of them on an error."""
    centers, side = spots.obsm["spatial"][rows], TILE_SHAPE[0]
    corners = np.rint(centers - np.array(slide.tile) / 2).astype(np.int64)  # (n_tiles, 2)
    attributes = {"patch_size_src": slide.tile[0], "patch_size_target": side}
    attributes |= {"downsample": slide.tile[0] / side, "pixel_size": slide.mpp[0]}
    text = json.dumps(fields, indent=1) + "\n"
    draft.mkdir()
    paths, moved = _slide_paths(root, slide_id), []
    try:
        logger.info(f"plan: {len(centers):,} tiles of {slide.tile[0]:.0f} px to cut from {slide.path.name}")
        with progress_bar(centers, desc="cut tiles", unit=" tiles", enabled=progress) as shown_centers:
            tiles = (slide.read_around(x, y) for x, y in shown_centers)
            names = spots.obs_names[rows]
            write_tiles(draft / "patches", tiles, names, corners, attributes=attributes, of=paths["patches"])
        write_file(draft / "metadata", text.encode())
        with stage("writing the counts"):
            write_h5ad(spots, draft / "st", compression="gzip", of=paths["st"])
        for folder in FILES:
            (root / folder).mkdir(exist_ok=True)
        _check_slide_is_new(root, slide_id)  # never overwrite a slide that another program wrote meanwhile
        write_file(draft / MOVING, json.dumps({folder: _identify(draft / folder) for folder in FILES}).encode())
        with defer_signals():
            try:
                paths["patches"].open("x").close()  # without locks, the first process to create it wins
            except FileExistsError:
                _check_slide_is_new(root, slide_id)
                raise
            moved.append(paths["patches"])
            for folder, path in paths.items():
                os.replace(draft / folder, path)
                moved.append(path)
    except BaseException:
        for path in moved:
            path.unlink(missing_ok=True)
        raise
    finally:
        for folder in FILES:
            with suppress(OSError):  # removed only if empty
                (root / folder).rmdir()
