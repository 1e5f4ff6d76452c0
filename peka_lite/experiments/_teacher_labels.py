"""What a teacher says about a cohort: embeddings and pseudo-labels, made once, kept by fingerprint."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import numpy as np

from peka_lite import __version__
from peka_lite._core.hashing import row_ids
from peka_lite._core.io import save_array, write_file
from peka_lite._core.locks import RECORD, lock, move_into_place, partial_path
from peka_lite._core.progress import Stage
from peka_lite.data.download import cache_dir
from peka_lite.teachers.load import embed_cohort

FORMAT = 1  # raise it when the same key would hold other numbers
EMBEDDED_BY = ("torch", "numpy", "scipy", "scanpy", "scikit-learn")
CLUSTERED_BY = ("igraph", "leidenalg", "umap-learn", "pynndescent")


@dataclass(frozen=True)
class TeacherTargets:
    """What a student learns from the rows that teach.

    Attributes
    ----------
    embedding
        (n, D_t) float32, the teacher's, of these rows.
    labels
        (n,) int64 pseudo-labels of these rows.
    n_labels
        How many there are.
    ids
        `row_ids`: of what the ``"teacher"`` (None where it came trained) and the ``"clusters"`` learned from, and of
        the teacher's ``"embedding"`` of every spot.
    """

    embedding: np.ndarray
    labels: np.ndarray
    n_labels: int
    ids: dict[str, np.ndarray | None]


def embed_teacher(
    teacher, cohort, rows: np.ndarray, *, data: str, device: str, progress: bool = False
) -> tuple[np.ndarray, np.ndarray | None]:
    """Return the teacher's embedding of every spot, from the cache where the same was made before.

    Parameters
    ----------
    teacher
        From `load_teacher`; fitted here, on `rows`, if the embedding is not there yet. One whose ``fitted_on_`` is None
        before any fit came trained: its embedding is the same whatever the rows, and all folds share it.
    rows
        Training rows.
    data
        `hash_cohort` of the cohort.

    Returns
    -------
    embedding : numpy.ndarray
        (N, D_t) float32, a read-only memory map.
    learned_from : numpy.ndarray or None
        `row_ids` that the teacher's fit recorded; None for one that came trained.

    Raises
    ------
    ValueError
        For a teacher that says it came trained, yet learns from the rows.

    Notes
    -----
    Folders of ``embeddings`` in the cache, named by a hash of teacher, data, versions, kind of device, and for a
    teacher that learns the rows. Of two jobs that want one the second waits for the first. A stopped job loses nothing
    that `embed_cohort` keeps.
    """
    return _kept(_folder(teacher, cohort, rows, data, device), teacher, cohort, rows, device, progress)


def make_targets(
    config, cohort, rows: np.ndarray, *, teacher, data: str, device: str, progress: bool = False
) -> TeacherTargets:
    """Return what the given rows teach: their embedding and its clusters, from the cache where the same was made.

    Parameters
    ----------
    config
        `RunConfig`, for its `labeler`.
    teacher, rows, data
        As in `embed_teacher`; the clusters see the embedding of these rows alone.

    Notes
    -----
    Folders of ``labels`` in the cache, named by a hash of the embedding's key, labeler, rows and versions.
    """
    folder = _folder(teacher, cohort, rows, data, device)
    E, taught = _kept(folder, teacher, cohort, rows, device, progress)  # (N, D_t)
    labeler, mine = config.labeler(), E[rows]  # (n, D_t)
    key = [folder.name, _name(labeler), _digest(rows), _versions(CLUSTERED_BY)]
    folder = cache_dir() / "labels" / _hash(key)
    if not (folder / RECORD).is_file():
        with lock(folder):
            if not (folder / RECORD).is_file():
                with Stage(f"clustering {len(mine):,} spots"):
                    labeler.fit(mine)
                arrays = {"labels": labeler.labels_, "learned_from": labeler.fitted_on_}
                _keep(folder, arrays, {"labeler": repr(labeler), "n_labels": labeler.n_labels_})
    ids = {"teacher": taught, "clusters": np.load(folder / "learned_from.npy"), "embedding": row_ids(E)}
    n_labels = json.loads((folder / RECORD).read_text())["n_labels"]
    return TeacherTargets(mine, np.load(folder / "labels.npy"), n_labels, ids)


def missing_embeddings(teacher, cohort, rows: Iterable[np.ndarray], *, data: str, device: str) -> int:
    """Return how many embeddings the cache lacks of those that `embed_teacher` would return for these sets of rows."""
    folders = {_folder(teacher, cohort, chosen, data, device) for chosen in rows}
    return sum(not (folder / RECORD).is_file() for folder in folders)


def _kept(folder: Path, teacher, cohort, rows, device, progress) -> tuple[np.ndarray, np.ndarray | None]:
    if not (folder / RECORD).is_file():
        with lock(folder):
            if not (folder / RECORD).is_file():
                _embed(teacher, cohort, rows, folder, device, progress)
    pretrained = json.loads((folder / RECORD).read_text())["pretrained"]
    return np.load(folder / "E.npy", mmap_mode="r"), None if pretrained else np.load(folder / "learned_from.npy")


def _embed(teacher, cohort, rows, folder, device, progress) -> None:
    came_trained = _came_trained(teacher)
    # A teacher that does not say what it learned from cannot be judged, so it must say None itself.
    with Stage("fitting the teacher"):
        learned = teacher.fit(cohort.by_slide(rows)).fitted_on_
    if came_trained and learned is not None:
        raise ValueError(f"{teacher!r} says by fitted_on_ = None that it came trained, yet its fit learned from rows")
    with Stage(f"teacher's embedding of {len(cohort):,} spots"):
        E = embed_cohort(teacher, cohort, device=device, progress=progress)
    arrays = {"E": E} if learned is None else {"E": E, "learned_from": learned}
    _keep(folder, arrays, {"teacher": repr(teacher), "pretrained": learned is None})


def _keep(folder: Path, arrays: dict[str, np.ndarray], record: dict) -> None:
    """Write a folder whole, unless another writer was first: then his is kept, and is what all of them read."""
    work = partial_path(folder, held=False)
    work.mkdir()
    try:
        for name, array in arrays.items():
            save_array(work / f"{name}.npy", array)
        write_file(work / RECORD, json.dumps(record).encode())
        move_into_place(work, folder)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _came_trained(teacher) -> bool:
    return getattr(teacher, "fitted_on_", "not fitted") is None


def _folder(teacher, cohort, rows, data: str, device: str) -> Path:
    settings = {
        "teacher": [_name(teacher), getattr(teacher, "fingerprint", None)],
        "data": data,
        "rows": None if _came_trained(teacher) else _digest(rows),
        "device": str(device).split(":")[0],
        "versions": _versions(EMBEDDED_BY),
    }
    if hasattr(teacher, "cache_key"):  # it knows what else decides: its compute type on this device
        settings["own"] = teacher.cache_key(cohort.slides[0].adata, device=device)
    return cache_dir() / "embeddings" / _hash(settings)


def _name(thing) -> str:
    return f"{type(thing).__module__}.{type(thing).__qualname__} {thing!r}"


def _digest(rows) -> str:
    return hashlib.sha256(np.ascontiguousarray(rows, dtype=np.int64)).hexdigest()


def _versions(packages) -> list:
    return [FORMAT, __version__, *(version(package) for package in packages)]


def _hash(settings) -> str:
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]
