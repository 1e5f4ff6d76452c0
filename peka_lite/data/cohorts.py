"""Find and open cohorts: the embedded one, a fetched one, or any folder in HEST-1k's layout."""

from __future__ import annotations

import dataclasses
import hashlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from peka_lite._core.cache import cache_dir
from peka_lite._core.progress import steps
from peka_lite.data._choices import MINI_FORMAT
from peka_lite.data._fetch import read_record
from peka_lite.data.download import find_fetched, patients_of, read_manifest

# Readers and writers are imported in the functions that use them: finding a cohort's folder needs none of them.
if TYPE_CHECKING:
    from peka_lite.data.hest import Cohort


def find_cohort(name: str | os.PathLike) -> Path:
    """Return a cohort's folder without writing it; that of ``"mini"`` may not exist yet.

    Raises
    ------
    FileNotFoundError
        If `name` is neither a folder nor a fetched cohort; the message gives the fix.
    """
    if name == "mini":
        return cache_dir() / f"mini-{MINI_FORMAT}"  # older formats stay for older versions of the library
    if Path(name).is_dir():
        return Path(name)
    known = [entry.name for entry in read_manifest().values() if entry.kind == "cohort"]
    if name not in known:
        raise FileNotFoundError(
            f"{name}: no such cohort folder; give one in HEST-1k's layout, 'mini', or one to fetch: {', '.join(known)}"
        )
    if (folder := find_fetched(name)) is None:
        raise FileNotFoundError(f"cohort {name!r} is not downloaded yet: run `peka-lite fetch {name}`")
    return folder


def cohort_root(name: str | os.PathLike) -> Path:
    """Return a cohort's folder; the embedded cohort is written to the cache on first use.

    Examples
    --------
    >>> import peka_lite as pk
    >>> sorted(path.name for path in pk.data.cohort_root("mini").iterdir())
    ['metadata', 'mini.json', 'patches', 'st']
    """
    root = find_cohort(name)
    if name == "mini":
        from peka_lite.data.mini.cohort import write_mini_cohort

        root = write_mini_cohort(root)
    return root


def open_cohort(
    name: str | os.PathLike,
    *,
    slides: Sequence[str] | None = None,
    patients: str | os.PathLike | None = None,
    min_genes: int = 200,
    max_mito: float | None = None,
) -> Cohort:
    """Read a cohort by name or folder and apply quality control, as every run does.

    Parameters are those of `cohort_root`, `read_cohort` and `qc`. For a cohort of the manifest, `patients` defaults to
    the manifest's patients, and `slides` to all but those that show the section of another slide.

    Examples
    --------
    >>> import peka_lite as pk
    >>> pk.open_cohort("mini", slides=["MINI1", "MINI2"])
    Cohort of 2 slides, 395 spots, 1500 shared genes
      Slide MINI1: 190 spots x 1500 genes, Mini patient 1; dropped 2 spots without a tile
      Slide MINI2: 205 spots x 1500 genes, Mini patient 2; dropped 2 spots without a tile
    """
    from peka_lite.data.expression import qc
    from peka_lite.data.hest import read_cohort

    root = cohort_root(name)
    entry = read_manifest().artifacts.get(str(read_record(root).get("name")))
    copies = {}
    if entry is not None and entry.kind == "cohort":
        patients = patients_of(entry) if patients is None else patients
        if slides is None:
            available = {path.stem for path in (root / "st").glob("*.h5ad")}
            copies = {s.id: f"same section as {s.same_as}" for s in entry.slides if {s.id, s.same_as} <= available}
            slides = sorted(available - copies.keys())
    cohort = read_cohort(root, slides, patients=patients)
    cohort = dataclasses.replace(cohort, left_out=cohort.left_out | copies)
    return qc(cohort, min_genes=min_genes, max_mito=max_mito)


def hash_cohort(cohort: Cohort) -> str:
    """Hash a cohort's ids, barcodes, counts and a sample of its tiles; 16 hex digits.

    Examples
    --------
    >>> import peka_lite as pk
    >>> cohort, same = (pk.open_cohort("mini", slides=["MINI3"]) for _ in range(2))
    >>> stricter = pk.open_cohort("mini", slides=["MINI3"], min_genes=450)
    >>> len(cohort), len(stricter)
    (156, 151)
    >>> a, b, c = (pk.data.hash_cohort(data) for data in (cohort, same, stricter))
    >>> a == b, a == c
    (True, False)
    """
    from peka_lite.data.expression import hash_counts

    digest = hashlib.sha256()
    for slide in steps("hashing the data: slide", cohort.slides):
        digest.update(f"{slide.id} {hash_counts(slide.adata)}".encode())
        sample = np.unique(np.linspace(0, slide.n_spots - 1, 16).astype(int))
        digest.update(slide.tiles[sample].tobytes())
    return digest.hexdigest()[:16]
