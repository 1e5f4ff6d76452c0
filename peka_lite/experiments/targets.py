"""Training targets of a student: the teacher's embedding and the pseudo-labels, each computed once and cached."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from functools import cached_property, partial
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch

from peka_lite import __version__
from peka_lite._core.cache import cached, find_cached
from peka_lite._core.hashing import row_ids
from peka_lite._core.io import save_array
from peka_lite._core.locks import RECORD
from peka_lite._core.progress import stage
from peka_lite.teachers.load import embed_cohort

FORMAT = 5  # increase when the same key would give other numbers
_EMBEDDING = ("torch", "numpy", "scipy", "scanpy", "scikit-learn")  # packages that affect its numbers
_CLUSTERING = ("igraph", "leidenalg", "umap-learn", "pynndescent")


class TeacherTargets:
    """Targets of a cohort's spots, from a teacher that is fitted on given rows unless it is pretrained.

    A teacher whose ``fitted_on_`` is None before any fit is pretrained: its embedding does not depend on the rows, and
    all folds share it.

    Parameters
    ----------
    teacher
        From `load_teacher`.
    data
        `hash_cohort` of the cohort.
    """

    def __init__(self, teacher, cohort, *, data: str, device: str, progress: bool = False):
        self.teacher, self.cohort, self.data, self.device, self.progress = teacher, cohort, data, device, progress
        self.is_pretrained = getattr(teacher, "fitted_on_", "not fitted") is None

    def make(self, rows: np.ndarray, labeler) -> tuple[np.ndarray, np.ndarray, int, dict[str, np.ndarray | None]]:
        """Return embedding (n, D_t) and labels (n,) of the rows, the number of labels, and what each step learned from.

        Only the embedding of these rows is clustered. The last is step -> `row_ids`, with the ids of every spot's
        embedding as ``"embedding"``.
        """
        E, learned_from = self.embed(rows)  # (N, D_t)
        selected = E[rows]
        key = self._key(rows) | {"labeler": _full_name(labeler), "labeled": hash_rows(rows)}
        key["clustering"] = list_versions(*_CLUSTERING)
        folder = cached("labels", key, partial(_cluster, labeler, selected))
        learned = {"teacher": learned_from, "clusters": np.load(folder / "learned_from.npy"), "embedding": row_ids(E)}
        n_labels = json.loads((folder / RECORD).read_text())["n_labels"]
        return selected, np.load(folder / "labels.npy"), n_labels, learned

    def embed(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
        """Return the embedding (N, D_t) float32 of every spot, and the `row_ids` that the fit recorded (or None)."""
        if self.is_pretrained:
            return self._pretrained, None
        folder = cached("embeddings", self._key(rows), partial(self._fit, rows))
        return np.load(folder / "E.npy", mmap_mode="r"), np.load(folder / "learned_from.npy")

    def count_missing(self, sets: Iterable[np.ndarray]) -> int:
        """Return how many spots the teacher must still embed for these sets of rows."""
        if self.is_pretrained:
            return 0  # by slide, and resumed within a slide
        folders = {find_cached("embeddings", self._key(rows)) for rows in sets}
        return len(self.cohort) * sum(not (folder / RECORD).is_file() for folder in folders)

    @cached_property
    def _pretrained(self) -> np.ndarray:
        if self.teacher.fit(self.cohort.by_slide(np.arange(len(self.cohort)))).fitted_on_ is not None:
            raise ValueError(
                f"{self.teacher!r} has fitted_on_ = None (pretrained) but learns in fit; set fitted_on_ only there"
            )
        return self._embed()

    def _fit(self, rows: np.ndarray, work: Path) -> dict:
        with stage("fitting the teacher"):
            learned_from = self.teacher.fit(self.cohort.by_slide(rows)).fitted_on_  # without it leaks go unnoticed
        save_array(work / "E.npy", self._embed())
        save_array(work / "learned_from.npy", learned_from)
        return {"teacher": repr(self.teacher)}

    def _embed(self) -> np.ndarray:
        with stage(f"teacher's embedding of {len(self.cohort):,} spots"):
            return embed_cohort(self.teacher, self.cohort, device=self.device, progress=self.progress)

    def _key(self, rows: np.ndarray) -> dict:
        key = {
            "teacher": [_full_name(self.teacher), getattr(self.teacher, "fingerprint", None)], "data": self.data,
            "rows": None if self.is_pretrained else hash_rows(rows), "device": torch.device(self.device).type,
            "versions": list_versions(*_EMBEDDING),
        }  # fmt: skip
        if hasattr(self.teacher, "cache_key"):  # further settings that change the numbers, such as the compute type
            key["options"] = self.teacher.cache_key(self.cohort.slides[0].adata, device=self.device)
        return key


def hash_rows(rows: np.ndarray) -> str:
    """Hash row numbers for the key of a cached result."""
    return hashlib.sha256(np.ascontiguousarray(rows, dtype=np.int64)).hexdigest()


def list_versions(*packages: str) -> list:
    """Return the versions that are part of the key of a cached result: of the format, of this package and others."""
    return [FORMAT, __version__, *map(version, packages)]


def _cluster(labeler, E: np.ndarray, work: Path) -> dict:
    with stage(f"clustering {len(E):,} spots"):
        labeler.fit(E)
    save_array(work / "labels.npy", labeler.labels_)
    save_array(work / "learned_from.npy", labeler.fitted_on_)
    return {"labeler": repr(labeler), "n_labels": int(labeler.n_labels_)}


def _full_name(model) -> str:
    return f"{type(model).__module__}.{type(model).__qualname__} {model!r}"
