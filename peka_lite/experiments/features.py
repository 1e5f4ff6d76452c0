"""Features for the probe: of an adapted student, a frozen student, the teacher, or a control without either."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path

import numpy as np
import pandas as pd

from peka_lite._core._processes import Processes
from peka_lite._core.hashing import row_ids
from peka_lite._core.io import write_file
from peka_lite._core.locks import RECORD
from peka_lite._core.progress import Stage, print_line
from peka_lite.adapters.files import join_adapters
from peka_lite.data.tiles import TileStore
from peka_lite.evaluation.controls import color_features, coordinate_features, depth_features
from peka_lite.experiments._teacher_labels import count_missing_embeddings, embed_teacher
from peka_lite.experiments.cache import Student, count_optimizer_steps, project_features, student_folder, train_student
from peka_lite.experiments.folder import hash_cohort


def select_training_spots(cohort, share: float, seed: int) -> np.ndarray:
    """Select the spots that may be trained on, the same share of every slide; (N,) bool."""
    use = np.ones(len(cohort), dtype=bool)
    if share < 1:
        rng = np.random.default_rng(seed)
        for slide in cohort.slides:
            rows = cohort.rows_of(slide.id)
            use[rng.permutation(rows)[max(1, round(share * len(rows))) :]] = False
    return use


class FeatureSource:
    """Features for `evaluate`, fitted without the test rows of the given folds.

    Parameters
    ----------
    config, cohort, folds
        Those of the run. With protocol ``"paper"`` one student is trained on the whole cohort and used for all folds.
    use
        (N,) bool, rows that may be trained on.
    scratch
        Folder for a memory map of the tiles, written only when tiles are needed.
    """

    def __init__(self, config, cohort, folds, *, use, scratch: Path, device: str, progress: bool = False):
        self.config, self.cohort, self.folds, self.use = config, cohort, folds, use
        self.scratch, self.device, self.progress = scratch, device, progress
        self.trains_student = config.method != "none"
        self.teacher = config.load_teacher() if self.trains_student or config.features == "teacher" else None
        self.data = hash_cohort(cohort)
        self.processes = Processes(device)
        self._uses_all = config.resolve_protocol().student == "all"
        self._latest: dict[str, Student] = {}  # the last student by name

    def __call__(self, left_out: tuple[int, ...]) -> Student:
        """Return a `Student`: features, and the rows that each step learned from."""
        kind = self.config.features
        if kind in ("color", "coordinates", "depth"):
            return self._reuse(kind, self._compute_control)
        key = "all" if self._uses_all else "-".join(map(str, left_out))
        if not self.trains_student and kind == "student":
            return self._reuse("frozen", lambda: self._get_student(None))
        if kind == "teacher":
            return self._reuse(f"teacher {key}", lambda: self._embed_teacher(self._rows(left_out)))
        if kind == "student":
            return self._reuse(key, lambda: self._get_student(self._rows(left_out)))
        make = {"frozen+student": self._concatenate, "projector": self._project}[kind]
        return self._reuse(f"{kind} {key}", lambda: make(self._rows(left_out)))

    def coverage(self) -> float | None:
        """Return the smallest share, over slides, of expressed genes in a pretrained teacher's gene list."""
        if not hasattr(self.teacher, "coverage"):
            return None
        return min(self.teacher.coverage(slide.adata) for slide in self.cohort.slides)

    def prepare(self, left_out: Sequence[tuple[int, ...]]) -> None:
        """Print the plan and train the missing students of these folds, with every process."""
        required = {}  # folder -> folds left out, None for the frozen student
        for folds in left_out if self.trains_student else ():
            required.setdefault(self._find_folder(self._rows(folds)), () if self._uses_all else folds)
        if self.config.features == "frozen+student" or (self.config.features == "student" and not self.trains_student):
            required[self._find_folder(None)] = None
        missing = [folds for folder, folds in required.items() if not (folder / RECORD).is_file()]
        missing = self.processes.same(missing)  # another job may finish one of them meanwhile
        print_line(f"plan: {self._plan(missing, cached=len(required) - len(missing), sets=left_out)}")
        for folds in Stage("training", [folds for folds in missing if folds is not None]):
            self._get_student(self._rows(folds))
        if None in missing:
            self._get_student(None)
        if self.config.features == "color":
            self._tiles  # noqa: B018 - needs every process
        self.processes = Processes(self.device, alone=True)

    def _plan(self, missing: list[tuple[int, ...] | None], *, cached: int, sets: Sequence[tuple[int, ...]]) -> str:
        """Return the amount of work: trainings and tiles for the missing students, or embeddings for these folds."""
        n, trainings = len(self.cohort), [folds for folds in missing if folds is not None]
        parts = [f"{len(trainings) or 'no'} {'training' if len(trainings) < 2 else 'trainings'}"]
        if trainings:
            kinds = {0: "on all spots", 1: "leaving out one fold", 2: "leaving out two"}
            counts = {words: sum(len(folds) == k for folds in trainings) for k, words in kinds.items()}
            counted = [f"{k} {words}" if k < len(trainings) else words for words, k in counts.items() if k]
            parts[0] += f" ({', '.join(counted)})"
            steps = sum(count_optimizer_steps(self.config, len(self._rows(folds))) for folds in trainings)
            parts.append(f"{steps:,} optimizer steps")
        if cached:
            parts.append(f"{cached} more from the cache" if missing else f"{cached} from the cache")
        used = sets if self.config.features == "teacher" else trainings
        options = {"data": self.data, "device": self.device}
        if used and (fits := count_missing_embeddings(self.teacher, self.cohort, map(self._rows, used), **options)):
            parts.append(f"{fits * n:,} spots for the teacher to embed")
        if missing:
            each = f" ({n:,} after each training)" if len(trainings) > 1 else ""
            parts.append(f"{len(missing) * n:,} tiles to embed{each}")
        if self.config.features == "color":
            parts.append(f"{n:,} tiles to measure")
        return ", ".join(parts)

    def outer(self) -> dict[str, tuple[int, ...]]:
        """Return student name -> folds left out, for the outer folds or the one student ``"all"``."""
        if self._uses_all:
            return {"all": ()}
        return {f"fold{fold}": (fold,) for fold in range(len(self.folds))}

    def save(self, work: Path, named: Mapping[str, tuple[int, ...]]) -> None:
        """Write the adapters and training curves of these students (name -> folds left out) to a run folder."""
        if not self.trains_student:
            return
        adapters, curves = {}, []
        for name, left_out in named.items():
            student = self._get_student(self._rows(left_out))
            adapters[name] = student.folder / "adapter.safetensors"
            curves.append(pd.read_csv(student.folder / "training.csv").assign(fold=name.removeprefix("fold")))
        join_adapters(adapters, work / "adapter.safetensors")
        write_file(work / "training.csv", pd.concat(curves, ignore_index=True).to_csv(index=False).encode())

    def record(self, named: Mapping[str, tuple[int, ...]]) -> dict:
        """Return the summary's weights, backbone_fingerprint, adapted_share and n_labels_per_fold."""
        students = (
            [self._get_student(self._rows(left_out)) for left_out in named.values()] if self.trains_student else []
        )
        if not self.trains_student and self.config.features == "student":
            students = [self._get_student(None)]
        record = students[0].record if students else {}
        return {
            "weights": record.get("weights"),
            "backbone_fingerprint": record.get("fingerprint"),
            "adapted_share": record.get("share", 0.0),
            "n_labels_per_fold": [student.record["n_labels"] for student in students if self.trains_student],
        }

    def _rows(self, left_out: tuple[int, ...]) -> np.ndarray:
        keep = self.use.copy()
        if self.config.resolve_protocol().student == "train":
            for fold in left_out:
                keep[self.folds[fold][1]] = False
        return np.flatnonzero(keep)

    def _reuse(self, name: str, make) -> Student:
        if name not in self._latest:
            self._latest = {name: make()}
        return self._latest[name]

    @cached_property
    def _tiles(self):
        path, tiles = self.scratch / "tiles.npy", self.cohort.tiles
        if self.processes.first:
            path.unlink(missing_ok=True)  # left by a stopped run, possibly of an older version
            tiles = tiles.to_memmap(path)
        self.processes.wait()
        return (
            tiles if self.processes.first else TileStore([path], np.zeros(len(tiles)), np.arange(len(tiles)), tiles.ids)
        )

    def _find_folder(self, rows: np.ndarray | None) -> Path:
        return student_folder(self.config, rows, teacher=self.teacher, data=self.data, device=self.device)

    def _get_student(self, rows: np.ndarray | None) -> Student:
        return train_student(
            self.config,
            self.cohort,
            lambda: self._tiles,
            rows,
            teacher=self.teacher,
            data=self.data,
            device=self.device,
            processes=self.processes,
            progress=self.progress,
        )

    def _concatenate(self, rows: np.ndarray) -> Student:
        adapted, frozen = self._get_student(rows), self._get_student(None)
        return replace(adapted, features=np.hstack([frozen.features, adapted.features]))

    def _project(self, rows: np.ndarray) -> Student:
        adapted = self._get_student(rows)
        return replace(adapted, features=project_features(adapted))

    def _embed_teacher(self, rows: np.ndarray) -> Student:
        options = {"data": self.data, "device": self.device, "progress": self.progress}
        E, learned_from = embed_teacher(self.teacher, self.cohort, rows, **options)
        return Student(E, {"teacher": learned_from}, row_ids(E), {}, None)

    def _compute_control(self) -> Student:
        name = self.config.features
        X = {
            "color": lambda: color_features(self._tiles, progress=self.progress),
            "coordinates": lambda: coordinate_features(self.cohort),
            "depth": lambda: depth_features(self.cohort),
        }[name]()
        return Student(X, {}, None, {}, None)
