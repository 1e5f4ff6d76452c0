"""Cache of a teacher's embeddings of a cohort and of pseudo-labels."""

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

FORMAT = 1  # increase when the same key would give other numbers
EMBEDDING_PACKAGES = ("torch", "numpy", "scipy", "scanpy", "scikit-learn")
CLUSTERING_PACKAGES = ("igraph", "leidenalg", "umap-learn", "pynndescent")


@dataclass(frozen=True)
class TeacherTargets:
    """Training targets of a student.

    Attributes
    ----------
    embedding
        (n, D_t) float32, the teacher's embedding of the training rows.
    labels
        (n,) int64 pseudo-labels of the training rows.
    n_labels
        Number of different labels.
    ids
        `row_ids` of the rows that the ``"teacher"`` (None if pretrained) and the ``"clusters"`` were fitted on, and of
        the teacher's ``"embedding"`` of every spot.
    """

    embedding: np.ndarray
    labels: np.ndarray
    n_labels: int
    ids: dict[str, np.ndarray | None]


def embed_teacher(
    teacher, cohort, rows: np.ndarray, *, data: str, device: str, progress: bool = False
) -> tuple[np.ndarray, np.ndarray | None]:
    """Return the teacher's embedding of every spot, from the cache if possible.

    Parameters
    ----------
    teacher
        From `load_teacher`; fitted on `rows` if the embedding is not cached. A teacher whose ``fitted_on_`` is None
        before any fit is pretrained: its embedding does not depend on `rows`, and all folds share it.
    rows
        Training rows.
    data
        `hash_cohort` of the cohort.

    Returns
    -------
    embedding : numpy.ndarray
        (N, D_t) float32, a read-only memory map.
    learned_from : numpy.ndarray or None
        `row_ids` recorded by the teacher's fit; None if pretrained.

    Raises
    ------
    ValueError
        If a teacher marked as pretrained is fitted on rows.

    Notes
    -----
    Folders in ``embeddings`` of the cache are named by a hash of teacher, data, versions, kind of device and, for a
    fitted teacher, the rows. If two jobs need the same embedding, the second waits for the first. A stopped job loses
    nothing that `embed_cohort` has stored.
    """
    return _load_or_embed(_find_folder(teacher, cohort, rows, data, device), teacher, cohort, rows, device, progress)


def make_targets(
    config, cohort, rows: np.ndarray, *, teacher, data: str, device: str, progress: bool = False
) -> TeacherTargets:
    """Return the training targets of the given rows, from the cache if possible.

    Parameters
    ----------
    config
        `RunConfig`, for its `labeler`.
    teacher, rows, data
        As in `embed_teacher`; only the embedding of these rows is clustered.

    Notes
    -----
    Folders in ``labels`` of the cache are named by a hash of the embedding's key, labeler, rows and versions.
    """
    folder = _find_folder(teacher, cohort, rows, data, device)
    E, learned_from = _load_or_embed(folder, teacher, cohort, rows, device, progress)  # (N, D_t)
    labeler, selected = config.make_labeler(), E[rows]  # (n, D_t)
    key = [folder.name, _full_name(labeler), _hash_rows(rows), _list_versions(CLUSTERING_PACKAGES)]
    folder = cache_dir() / "labels" / _hash(key)
    if not (folder / RECORD).is_file():
        with lock(folder):
            if not (folder / RECORD).is_file():
                with Stage(f"clustering {len(selected):,} spots"):
                    labeler.fit(selected)
                arrays = {"labels": labeler.labels_, "learned_from": labeler.fitted_on_}
                _store(folder, arrays, {"labeler": repr(labeler), "n_labels": labeler.n_labels_})
    ids = {"teacher": learned_from, "clusters": np.load(folder / "learned_from.npy"), "embedding": row_ids(E)}
    n_labels = json.loads((folder / RECORD).read_text())["n_labels"]
    return TeacherTargets(selected, np.load(folder / "labels.npy"), n_labels, ids)


def count_missing_embeddings(teacher, cohort, rows: Iterable[np.ndarray], *, data: str, device: str) -> int:
    """Return how many of the embeddings that `embed_teacher` returns for these sets of rows are not cached."""
    folders = {_find_folder(teacher, cohort, chosen, data, device) for chosen in rows}
    return sum(not (folder / RECORD).is_file() for folder in folders)


def _load_or_embed(folder: Path, teacher, cohort, rows, device, progress) -> tuple[np.ndarray, np.ndarray | None]:
    if not (folder / RECORD).is_file():
        with lock(folder):
            if not (folder / RECORD).is_file():
                _embed(teacher, cohort, rows, folder, device, progress)
    pretrained = json.loads((folder / RECORD).read_text())["pretrained"]
    return np.load(folder / "E.npy", mmap_mode="r"), None if pretrained else np.load(folder / "learned_from.npy")


def _embed(teacher, cohort, rows, folder, device, progress) -> None:
    pretrained = _is_pretrained(teacher)
    with Stage("fitting the teacher"):
        learned = teacher.fit(cohort.by_slide(rows)).fitted_on_  # required: without it, leakage cannot be checked
    if pretrained and learned is not None:
        raise ValueError(f"{teacher!r} has fitted_on_ = None (pretrained) but learns in fit; set fitted_on_ only there")
    with Stage(f"teacher's embedding of {len(cohort):,} spots"):
        E = embed_cohort(teacher, cohort, device=device, progress=progress)
    arrays = {"E": E} if learned is None else {"E": E, "learned_from": learned}
    _store(folder, arrays, {"teacher": repr(teacher), "pretrained": learned is None})


def _store(folder: Path, arrays: dict[str, np.ndarray], record: dict) -> None:
    """Write a folder atomically; if another process has written it first, keep that one."""
    work = partial_path(folder, locked=False)
    work.mkdir()
    try:
        for name, array in arrays.items():
            save_array(work / f"{name}.npy", array)
        write_file(work / RECORD, json.dumps(record).encode())
        move_into_place(work, folder)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _is_pretrained(teacher) -> bool:
    return getattr(teacher, "fitted_on_", "not fitted") is None


def _find_folder(teacher, cohort, rows, data: str, device: str) -> Path:
    settings = {
        "teacher": [_full_name(teacher), getattr(teacher, "fingerprint", None)],
        "data": data,
        "rows": None if _is_pretrained(teacher) else _hash_rows(rows),
        "device": str(device).split(":")[0],
        "versions": _list_versions(EMBEDDING_PACKAGES),
    }
    if hasattr(teacher, "cache_key"):  # further settings that change the numbers, such as the compute type
        settings["own"] = teacher.cache_key(cohort.slides[0].adata, device=device)
    return cache_dir() / "embeddings" / _hash(settings)


def _full_name(model) -> str:
    return f"{type(model).__module__}.{type(model).__qualname__} {model!r}"


def _hash_rows(rows) -> str:
    return hashlib.sha256(np.ascontiguousarray(rows, dtype=np.int64)).hexdigest()


def _list_versions(packages) -> list:
    return [FORMAT, __version__, *(version(package) for package in packages)]


def _hash(settings) -> str:
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]
