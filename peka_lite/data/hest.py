"""Read slides and cohorts in HEST-1k's layout, with tiles and spots in the same row order.

A cohort folder holds ``st/{id}.h5ad`` (raw counts), ``patches/{id}.h5`` (224 px tiles) and ``metadata/{id}.json``,
as HEST-1k distributes them (Jaume et al. 2024, arXiv:2406.16192).
"""

from __future__ import annotations

import dataclasses
import os
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
from scipy import sparse

from peka_lite._core.hashing import row_ids
from peka_lite.data._format import (
    HestFormatError,
    clean_patient_name,
    read_metadata,
    read_patients,
    read_spots,
    read_tile_barcodes,
)
from peka_lite.data._gene_names import ONE_KIND, keep_one_naming
from peka_lite.data.tiles import TileStore

IMAGE_KEY = "downscaled_fullres"


@dataclass(frozen=True, repr=False)
class Slide:
    """One slide whose spots and tiles share one row order.

    Attributes
    ----------
    id
        HEST sample id.
    adata
        Raw counts (N, G) as CSR float32, all genes of the slide; ``obsm["spatial"]`` holds (N, 2) pixel centers.
    tiles
        `TileStore` of N tiles; row i is the tile of spot i.
    patient
        Patient of the tissue, or None if unknown.
    metadata
        The slide's JSON fields.
    dropped
        Number of rows of the files that were dropped, by reason: ``{"spots without a tile": 2, ...}``.

    Examples
    --------
    >>> import peka_lite as pk
    >>> slide = pk.data.read_slide(pk.data.cohort_root("mini"), "MINI1")
    >>> slide.tiles.shape, slide.adata.obsm["spatial"].shape
    ((190, 224, 224, 3), (190, 2))
    >>> slide.select(slide.adata.obs["domain"] == "immune", reason="in other tissue")
    Slide MINI1: 20 spots x 1500 genes, Mini patient 1; dropped 2 spots without a tile; dropped 170 in other tissue
    """

    id: str
    adata: ad.AnnData
    tiles: TileStore
    patient: str | None
    metadata: dict
    dropped: dict[str, int]

    @property
    def n_spots(self) -> int:
        """Number of spots, each with its tile."""
        return self.adata.n_obs

    def select(self, rows, *, reason: str) -> Slide:
        """Return the given rows (indices or mask); `dropped` counts the others under `reason`."""
        adata = self.adata[rows].copy()
        n_dropped = self.n_spots - adata.n_obs
        dropped = self.dropped | ({reason: self.dropped.get(reason, 0) + n_dropped} if n_dropped else {})
        return dataclasses.replace(self, adata=adata, tiles=self.tiles.select(rows), dropped=dropped)

    def __repr__(self) -> str:
        dropped = "".join(f"; dropped {n} {reason}" for reason, n in self.dropped.items())
        patient = self.patient or "patient unknown"
        return f"Slide {self.id}: {self.n_spots} spots x {self.adata.n_vars} genes, {patient}{dropped}"

    def _repr_html_(self) -> str:
        from peka_lite.data._html import render_slide

        return render_slide(self)


@dataclass(frozen=True, repr=False)
class Cohort:
    """Concatenated slides; row i is the same spot in every array made from the cohort.

    Attributes
    ----------
    slides
        The slides, in order.
    left_out
        Slides that were left out: id -> reason.

    Examples
    --------
    >>> import peka_lite as pk
    >>> cohort = pk.open_cohort("mini", slides=["MINI1", "MINI7"])
    >>> len(cohort), len(cohort.genes), cohort.tiles.shape
    (416, 1500, (416, 224, 224, 3))
    >>> cohort.obs.groupby(["patient", "slide"]).size()  # two sections of one patient
    patient         slide
    Mini patient 1  MINI1    190
                    MINI7    226
    dtype: int64
    >>> cohort.rows_of("MINI7")[:3].tolist()
    [190, 191, 192]
    """

    slides: tuple[Slide, ...]
    left_out: dict[str, str] = dataclasses.field(default_factory=dict)

    def __len__(self) -> int:
        return sum(s.n_spots for s in self.slides)

    @cached_property
    def obs(self) -> pd.DataFrame:
        """Table with one row per spot and columns slide, patient (None if unknown) and barcode."""
        sizes = [s.n_spots for s in self.slides]
        return pd.DataFrame(
            {
                "slide": np.repeat([s.id for s in self.slides], sizes),
                "patient": np.repeat(np.array([s.patient for s in self.slides], dtype=object), sizes),
                "barcode": np.concatenate([s.adata.obs_names for s in self.slides]),
            }
        )

    @cached_property
    def genes(self) -> pd.Index:
        """Genes measured in every slide, in the order of the first slide."""
        shared = set.intersection(*(set(s.adata.var_names) for s in self.slides))
        return self.slides[0].adata.var_names[self.slides[0].adata.var_names.isin(list(shared))]

    @cached_property
    def adata(self) -> ad.AnnData:
        """Raw counts of the shared genes (N, len(genes)) CSR float32; obs holds slide, patient and barcode."""
        by_slide = {s.id: s.adata[:, self.genes] for s in self.slides}
        joined = ad.concat(by_slide, merge="same", index_unique="/")
        joined.obs = joined.obs.drop(columns=self.obs.columns, errors="ignore")
        joined.obs_names = self.obs["slide"] + "/" + self.obs["barcode"].astype(str)
        for column in self.obs:
            joined.obs[column] = self.obs[column].to_numpy()
        joined.X = sparse.csr_matrix(joined.X)
        joined.X.sort_indices()  # concatenating slides with different genes leaves them unsorted
        return joined

    @cached_property
    def tiles(self) -> TileStore:
        """All tiles, (N, 224, 224, 3) uint8, read lazily."""
        return TileStore.concat([s.tiles for s in self.slides])

    @cached_property
    def count_ids(self) -> np.ndarray:
        """`row_ids` of the counts of the shared genes, (N,) uint64."""
        return row_ids(self.adata.X)

    @cached_property
    def slide_count_ids(self) -> np.ndarray:
        """`row_ids` of the counts of all genes of each slide, (N,) uint64: what a teacher is fitted on."""
        return np.concatenate([row_ids(s.adata.X) for s in self.slides])

    def rows_of(self, slide_id: str) -> np.ndarray:
        """Return the rows of one slide, as int64 indices into the cohort."""
        rows = np.flatnonzero(self.obs["slide"] == slide_id)
        if not len(rows):
            raise KeyError(f"no slide {slide_id!r} in this cohort; it has {', '.join(s.id for s in self.slides)}")
        return rows

    def by_slide(self, rows) -> list[ad.AnnData]:
        """Return the given rows (indices or mask) as one AnnData per slide, with all genes of the slide."""
        keep = np.zeros(len(self), dtype=bool)
        keep[rows] = True
        parts = [s.adata[keep[self.rows_of(s.id)]] for s in self.slides]
        return [part for part in parts if part.n_obs]

    def select(self, rows, *, reason: str) -> Cohort:
        """Return the given rows (indices or mask) in cohort order; `dropped` counts the others under `reason`."""
        keep = np.zeros(len(self), dtype=bool)
        keep[rows] = True
        masks = [keep[self.rows_of(s.id)] for s in self.slides]
        slides = [s.select(m, reason=reason) for s, m in zip(self.slides, masks, strict=True) if m.any()]
        left_out = {s.id: reason for s, m in zip(self.slides, masks, strict=True) if not m.any()}
        if not slides:
            raise ValueError(f"no spot is left: all {len(self)} were dropped for {reason!r}")
        return Cohort(tuple(slides), self.left_out | left_out)

    def __repr__(self) -> str:
        lines = [f"Cohort of {len(self.slides)} slides, {len(self)} spots, {len(self.genes)} shared genes"]
        lines += [f"  {s!r}" for s in self.slides]
        lines += [f"  left out {i}: {reason}" for i, reason in self.left_out.items()]
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        from peka_lite.data._html import render_cohort

        return render_cohort(self)


def read_slide(root: str | os.PathLike, slide_id: str, *, patient: str | None = None) -> Slide:
    """Read one slide and join its tiles to its spots on the barcode.

    Rows follow the order of the ``.h5ad``; spots without a tile and tiles without a spot are dropped and counted.

    Parameters
    ----------
    root
        Folder with ``st``, ``patches`` and ``metadata``.
    slide_id
        HEST sample id, for example ``"TENX39"``.
    patient
        Patient of the slide; by default the metadata's ``patient``.

    Raises
    ------
    HestFormatError
        If a file, dataset or coordinate is missing, barcodes are duplicated or not shared, tiles have a wrong shape or
        dtype, or counts are negative, NaN or not integers.

    Examples
    --------
    >>> import peka_lite as pk
    >>> slide = pk.data.read_slide(pk.data.cohort_root("mini"), "MINI1")
    >>> slide.n_spots, slide.patient, slide.dropped
    (190, 'Mini patient 1', {'spots without a tile': 2})
    """
    root = Path(root)
    kinds = {"st": ".h5ad", "patches": ".h5", "metadata": ".json"}
    st, patches, meta = (root / kind / f"{slide_id}{end}" for kind, end in kinds.items())
    for path in (st, patches, meta):
        if not path.is_file():  # reading a pipe would hang
            problem = "not a regular file" if path.exists() else "file is missing"
            raise HestFormatError(path, problem, f"HEST-1k distributes it as {path.parent.name}/{path.name}")
    metadata = read_metadata(meta)
    adata = read_spots(st)
    barcodes = read_tile_barcodes(patches)
    tile_of = pd.Series(np.arange(len(barcodes)), index=barcodes)
    has_tile = adata.obs_names.isin(tile_of.index)
    if not has_tile.any():
        problem = f"no barcode is shared with {st} (tiles: {barcodes[0]!r}, spots: {adata.obs_names[0]!r})"
        raise HestFormatError(patches, problem, "Both files must come from one slide and spell barcodes the same way")
    n_joined = int(has_tile.sum())
    dropped = {"spots without a tile": adata.n_obs - n_joined, "tiles without a spot": len(barcodes) - n_joined}
    adata = adata[has_tile].copy()
    rows = tile_of.loc[adata.obs_names].to_numpy()
    tiles = TileStore([patches], np.zeros(len(rows)), rows)
    patient = clean_patient_name(patient) or clean_patient_name(metadata.get("patient"))
    return Slide(slide_id, adata, tiles, patient, metadata, {reason: n for reason, n in dropped.items() if n})


def read_cohort(
    root: str | os.PathLike,
    ids: Sequence[str] | None = None,
    *,
    patients: Mapping[str, str] | str | os.PathLike | None = None,
    keep_targeted: bool = False,
) -> Cohort:
    """Read the slides of a folder in HEST-1k's layout.

    Parameters
    ----------
    root
        Folder with ``st/{id}.h5ad``, ``patches/{id}.h5`` and ``metadata/{id}.json``.
    ids
        Slides to read, in this order; by default every slide of ``st``, sorted by name.
    patients
        Slide id -> patient, or a CSV file with columns ``id`` and ``patient``. Overrides the metadata, which HEST
        leaves blank for whole cohorts. Give all blocks of one person the same name. A row of the file with an unknown
        slide, or with another patient than an earlier row, is an error.
    keep_targeted
        Keep slides measured with a targeted panel. By default a slide with fewer than half of the cohort's median
        number of genes is left out, with a warning and an entry in `Cohort.left_out`, because the shared genes of the
        cohort would shrink to its panel.

    Raises
    ------
    HestFormatError
        As in `read_slide`, and if the folder has no slides, `patients` is not such a table, or fewer than two of
        several slides have the same gene naming.

    Warns
    -----
    UserWarning
        For each slide that is left out or whose gene names are taken from elsewhere (`keep_one_naming`), and if the
        slides share fewer than half of the genes of the smallest.

    Examples
    --------
    Two blocks of one person get the same patient:

    >>> import peka_lite as pk
    >>> cohort = pk.read_cohort(pk.data.cohort_root("mini"), ["MINI1", "MINI2"], patients={"MINI2": "Mini patient 1"})
    >>> {slide.id: slide.patient for slide in cohort.slides}
    {'MINI1': 'Mini patient 1', 'MINI2': 'Mini patient 1'}
    """
    root = Path(root)
    available = sorted(p.stem for p in (root / "st").glob("*.h5ad"))
    if not available:
        raise HestFormatError(root / "st", "no .h5ad file", "Give the folder with st, patches and metadata")
    ids = list(available if ids is None else ids)
    if missing := [i for i in ids if i not in available]:
        raise HestFormatError(root / "st", f"no slide {', '.join(missing)}", f"It has {', '.join(available)}")
    if twice := [i for i, n in Counter(ids).items() if n > 1]:
        raise ValueError(f"slides given more than once: {', '.join(twice)}")
    if invalid := [i for i in ids if not i.isascii() and i != i.encode(errors="replace").decode()]:
        raise HestFormatError(root / "st", f"file name {invalid[0]!r} is not UTF-8", "Rename the slide's files")
    patients = read_patients(patients, available)
    if patients and not patients.keys() & set(available):
        given, expected = (", ".join(list(names)[:3]) for names in (patients, available))
        raise ValueError(f"patients names none of the slides: it has {given}, ..., the cohort has {expected}, ...")
    slides, left_out = keep_one_naming([read_slide(root, i, patient=patients.get(i)) for i in ids], root / "st")

    median = np.median([s.adata.n_vars for s in slides])
    targeted = {} if keep_targeted else {s.id: s.adata.n_vars for s in slides if s.adata.n_vars < median / 2}
    targeted = {i: f"targeted panel of {n} genes (cohort median {median:.0f})" for i, n in targeted.items()}
    for slide_id, reason in targeted.items():
        warnings.warn(f"left out {slide_id}: {reason}; keep_targeted=True keeps it", stacklevel=2)
    slides = [s for s in slides if s.id not in targeted]
    if left_out and len(slides) == 1:
        problem = f"only {slides[0].id} is left, without {', '.join(left_out | targeted)}"
        raise HestFormatError(root / "st", problem, ONE_KIND)

    # "Patient 1" of two studies is two people, so names from metadata get their study appended. Names in `patients`
    # stay unchanged, also if metadata use them: merging two patients costs data, splitting one causes leakage.
    if len({str(s.metadata.get("dataset_title")) for s in slides}) > 1:  # str: a title may have any type
        for i, s in enumerate(slides):
            if s.patient not in {None, *patients.values()}:
                slides[i] = dataclasses.replace(s, patient=f"{s.patient} ({s.metadata.get('dataset_title')})")
    cohort = Cohort(tuple(slides), left_out | targeted)
    fewest = min(slides, key=lambda s: s.adata.n_vars)
    if not len(cohort.genes):
        raise HestFormatError(root / "st", "the slides share no gene", ONE_KIND)
    if 2 * len(cohort.genes) < fewest.adata.n_vars:
        shared = f"the slides share {len(cohort.genes)} genes, but {fewest.id} has {fewest.adata.n_vars}"
        warnings.warn(f"{shared}: read fewer slides (ids, --slides) to share more genes", stacklevel=2)
    return cohort


def tissue_window(adata: ad.AnnData) -> tuple[np.ndarray, float, float, tuple[int, int, int, int]]:
    """Return a slide's image, its scale, the spots' diameter in full-resolution pixels, and the window with tissue.

    The window is (x0, y0, x1, y1) in image pixels: the bounding box of the spot centers plus two diameters. It is the
    whole image for predictions on a grid of tiles, which need not cover all tissue.
    """
    library = next(iter(adata.uns["spatial"].values()))
    image, factors = library["images"][IMAGE_KEY], library["scalefactors"]
    if missing := {f"tissue_{IMAGE_KEY}_scalef", "spot_diameter_fullres"} - set(factors):
        raise ValueError(f"uns['spatial'] has no scale factor {', '.join(sorted(missing))}; HEST-1k's slides have both")
    scale, diameter = float(factors[f"tissue_{IMAGE_KEY}_scalef"]), float(factors["spot_diameter_fullres"])
    coords = np.asarray(adata.obsm["spatial"], dtype=float)[:, :2]  # (N, 2) full-resolution pixels
    edge = image.shape[1::-1]  # width, height
    if not ((coords * scale >= 0) & (coords * scale <= edge)).all(1).any():
        problem = f"no spot is inside the slide's image of {edge[0]} x {edge[1]} px"
        fix = f"obsm['spatial'] times the scale factor {scale:g} must give pixel coordinates of the image"
        raise ValueError(f"{problem}: {fix}")
    if "tissue_share" in adata.obs:
        return image, scale, diameter, (0, 0, *edge)
    low = np.clip((coords.min(0) - 2 * diameter) * scale, 0, edge).astype(int)
    high = np.clip(np.ceil((coords.max(0) + 2 * diameter) * scale), 0, edge).astype(int)
    return image, scale, diameter, (*low.tolist(), *high.tolist())
