"""Where the probe's features come from: a taught student, the frozen one, the teacher, or a control without either."""

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
from peka_lite.experiments._teacher_labels import embed_teacher, missing_embeddings
from peka_lite.experiments.cache import Student, optimizer_steps, project_features, student_folder, train_student
from peka_lite.experiments.folder import hash_cohort


def training_spots(cohort, share: float, seed: int) -> np.ndarray:
    """Choose the spots that may teach, the same share of every slide; (N,) bool."""
    use = np.ones(len(cohort), dtype=bool)
    if share < 1:
        rng = np.random.default_rng(seed)
        for slide in cohort.slides:
            rows = cohort.rows_of(slide.id)
            use[rng.permutation(rows)[max(1, round(share * len(rows))) :]] = False
    return use


class FeatureSource:
    """Gives `evaluate` the features that learned from none of the given folds' test rows.

    Parameters
    ----------
    config, cohort, folds
        The run; with protocol ``"paper"`` one student learns from the whole cohort, whatever the fold.
    use
        (N,) bool, rows that may teach.
    scratch
        Folder for a memory map of the tiles; written only when tiles are needed.
    """

    def __init__(self, config, cohort, folds, *, use, scratch: Path, device: str, progress: bool = False):
        self.config, self.cohort, self.folds, self.use = config, cohort, folds, use
        self.scratch, self.device, self.progress = scratch, device, progress
        self.taught = config.method != "none"
        self.teacher = config.load_teacher() if self.taught or config.features == "teacher" else None
        self.data = hash_cohort(cohort)
        self.processes = Processes(device)
        self._sees_all = config.settled_protocol().student == "all"
        self._made: dict[str, Student] = {}  # students by name, kept as long as no other is asked for

    def __call__(self, left_out: tuple[int, ...]) -> Student:
        """Return a `Student` (features and what they learned from)."""
        kind = self.config.features
        if kind in ("color", "coordinates", "depth"):
            return self._once(kind, self._control)
        who = "all" if self._sees_all else "-".join(map(str, left_out))
        if not self.taught and kind == "student":
            return self._once("frozen", lambda: self._student(None))
        if kind == "teacher":
            return self._once(f"teacher {who}", lambda: self._embedding(self._rows(left_out)))
        if kind == "student":
            return self._once(who, lambda: self._student(self._rows(left_out)))
        make = {"frozen+student": self._both, "projector": self._projected}[kind]
        return self._once(f"{kind} {who}", lambda: make(self._rows(left_out)))

    def coverage(self) -> float | None:
        """Return the share of expressed genes that a pretrained teacher knows, on the slide where it knows fewest."""
        if not hasattr(self.teacher, "coverage"):
            return None
        return min(self.teacher.coverage(slide.adata) for slide in self.cohort.slides)

    def prepare(self, left_out: Sequence[tuple[int, ...]]) -> None:
        """Print the plan and make the students these folds ask for, with every process; the others do no more."""
        asked = {}  # folder -> folds left out, None for the frozen student
        for folds in left_out if self.taught else ():
            asked.setdefault(self._folder(self._rows(folds)), () if self._sees_all else folds)
        if self.config.features == "frozen+student" or (self.config.features == "student" and not self.taught):
            asked[self._folder(None)] = None
        missing = [folds for folder, folds in asked.items() if not (folder / RECORD).is_file()]
        missing = self.processes.same(missing)  # a job beside this one may be through with one of them meanwhile
        print_line(f"plan: {self._plan(missing, cached=len(asked) - len(missing), sets=left_out)}")
        for folds in Stage("training", [folds for folds in missing if folds is not None]):
            self._student(self._rows(folds))
        if None in missing:
            self._student(None)
        if self.config.features == "color":
            self._tiles  # noqa: B018 - the processes write it together
        self.processes = Processes(self.device, alone=True)

    def _plan(self, missing: list[tuple[int, ...] | None], *, cached: int, sets: Sequence[tuple[int, ...]]) -> str:
        """Say in numbers what is to be done for the students that are missing, or without any for these folds."""
        n, trainings = len(self.cohort), [folds for folds in missing if folds is not None]
        parts = [f"{len(trainings) or 'no'} {'training' if len(trainings) < 2 else 'trainings'}"]
        if trainings:
            kinds = {0: "on all spots", 1: "leaving out one fold", 2: "leaving out two"}
            counts = {words: sum(len(folds) == k for folds in trainings) for k, words in kinds.items()}
            told = [f"{count} {words}" if count < len(trainings) else words for words, count in counts.items() if count]
            parts[0] += f" ({', '.join(told)})"
            steps = sum(optimizer_steps(self.config, len(self._rows(folds))) for folds in trainings)
            parts.append(f"{steps:,} optimizer steps")
        if cached:
            parts.append(f"{cached} more from the cache" if missing else f"{cached} from the cache")
        asked = sets if self.config.features == "teacher" else trainings
        at = {"data": self.data, "device": self.device}
        if asked and (fits := missing_embeddings(self.teacher, self.cohort, map(self._rows, asked), **at)):
            parts.append(f"{fits * n:,} spots for the teacher to embed")
        if missing:
            each = f" ({n:,} after each training)" if len(trainings) > 1 else ""
            parts.append(f"{len(missing) * n:,} tiles to embed{each}")
        if self.config.features == "color":
            parts.append(f"{n:,} tiles to measure")
        return ", ".join(parts)

    def outer(self) -> dict[str, tuple[int, ...]]:
        """Return the name of each outer fold's student and the folds left out: one ``"all"`` where it saw every row."""
        if self._sees_all:
            return {"all": ()}
        return {f"fold{fold}": (fold,) for fold in range(len(self.folds))}

    def save(self, work: Path, named: Mapping[str, tuple[int, ...]]) -> None:
        """Write adapters and training curves of these students, by name and folds left out, into a run folder."""
        if not self.taught:
            return
        adapters, curves = {}, []
        for name, left_out in named.items():
            student = self._student(self._rows(left_out))
            adapters[name] = student.folder / "adapter.safetensors"
            curves.append(pd.read_csv(student.folder / "training.csv").assign(fold=name.removeprefix("fold")))
        join_adapters(adapters, work / "adapter.safetensors")
        write_file(work / "training.csv", pd.concat(curves, ignore_index=True).to_csv(index=False).encode())

    def record(self, named: Mapping[str, tuple[int, ...]]) -> dict:
        """Return weights, backbone_fingerprint, adapted_share and n_labels_per_fold for the summary."""
        students = [self._student(self._rows(left_out)) for left_out in named.values()] if self.taught else []
        if not self.taught and self.config.features == "student":
            students = [self._student(None)]
        of = students[0].record if students else {}
        return {
            "weights": of.get("weights"),
            "backbone_fingerprint": of.get("fingerprint"),
            "adapted_share": of.get("share", 0.0),
            "n_labels_per_fold": [student.record["n_labels"] for student in students if self.taught],
        }

    def _rows(self, left_out: tuple[int, ...]) -> np.ndarray:
        keep = self.use.copy()
        if self.config.settled_protocol().student == "train":
            for fold in left_out:
                keep[self.folds[fold][1]] = False
        return np.flatnonzero(keep)

    def _once(self, name: str, make) -> Student:
        if name not in self._made:
            self._made = {name: make()}
        return self._made[name]

    @cached_property
    def _tiles(self):
        path, tiles = self.scratch / "tiles.npy", self.cohort.tiles
        if self.processes.first:
            path.unlink(missing_ok=True)  # of a stopped run, maybe of an older version
            tiles = tiles.to_memmap(path)
        self.processes.wait()
        return (
            tiles if self.processes.first else TileStore([path], np.zeros(len(tiles)), np.arange(len(tiles)), tiles.ids)
        )

    def _folder(self, rows: np.ndarray | None) -> Path:
        return student_folder(self.config, rows, teacher=self.teacher, data=self.data, device=self.device)

    def _student(self, rows: np.ndarray | None) -> Student:
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

    def _both(self, rows: np.ndarray) -> Student:
        taught, frozen = self._student(rows), self._student(None)
        return replace(taught, features=np.hstack([frozen.features, taught.features]))

    def _projected(self, rows: np.ndarray) -> Student:
        taught = self._student(rows)
        return replace(taught, features=project_features(taught))

    def _embedding(self, rows: np.ndarray) -> Student:
        at = {"data": self.data, "device": self.device, "progress": self.progress}
        E, learned_from = embed_teacher(self.teacher, self.cohort, rows, **at)
        return Student(E, {"teacher": learned_from}, row_ids(E), {}, None)

    def _control(self) -> Student:
        name = self.config.features
        X = {
            "color": lambda: color_features(self._tiles, progress=self.progress),
            "coordinates": lambda: coordinate_features(self.cohort),
            "depth": lambda: depth_features(self.cohort),
        }[name]()
        return Student(X, {}, None, {}, None)
