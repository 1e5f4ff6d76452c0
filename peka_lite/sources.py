"""Where the probe's features come from: a taught student, the frozen one, the teacher, or a control without either."""

from __future__ import annotations

from dataclasses import replace
from functools import cached_property
from pathlib import Path

import numpy as np
import pandas as pd

from peka_lite.controls import colour_texture, coordinates, depth
from peka_lite.provenance import row_ids
from peka_lite.results import fingerprint
from peka_lite.students import Student, taught_student
from peka_lite.teachers import embed_cohort


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
        self.data = fingerprint(cohort)
        self._made: dict[str, Student] = {}  # students by name, kept as long as no other is asked for

    def __call__(self, left_out: tuple[int, ...]) -> Student:
        """Return a `Student` (features and what they learned from)."""
        kind = self.config.features
        if kind in ("colour", "coordinates", "depth"):
            return self._once(kind, self._control)
        who = "all" if self.config.settled_protocol().student == "all" else "-".join(map(str, left_out))
        if not self.taught and kind == "student":
            return self._once("frozen", lambda: self._student(None))
        if kind == "teacher":
            return self._once(f"teacher {who}", lambda: self._embedding(self._rows(left_out)))
        if kind == "student":
            return self._once(who, lambda: self._student(self._rows(left_out)))
        return self._once(f"both {who}", lambda: self._both(self._rows(left_out)))

    def save(self, work: Path) -> None:
        """Write the taught students' adapters and training curves into a run folder."""
        if not self.taught:
            return
        from safetensors import safe_open
        from safetensors.torch import save_file

        tensors, curves, meta = {}, [], {}
        for name, student in self._each_fold():
            with safe_open(student.folder / "adapter.safetensors", "pt") as file:
                meta = file.metadata()
                tensors |= {f"{name}.{k}": file.get_tensor(k) for k in file.keys()}  # noqa: SIM118 - safe_open is no dict
            curves.append(pd.read_csv(student.folder / "training.csv").assign(fold=name.removeprefix("fold")))
        save_file(tensors, work / "adapter.safetensors", metadata=meta)
        pd.concat(curves, ignore_index=True).to_csv(work / "training.csv", index=False)

    def record(self) -> dict:
        """Return weights, adapted_share and n_labels_per_fold for the summary."""
        if self.taught:
            records = [student.record for _, student in self._each_fold()]
            labels = [r["n_labels"] for r in records]
            return {"weights": records[0]["weights"], "adapted_share": records[0]["share"], "n_labels_per_fold": labels}
        frozen = self._student(None).record["weights"] if self.config.features == "student" else None
        return {"weights": frozen, "adapted_share": 0.0, "n_labels_per_fold": []}

    def _each_fold(self):
        """Yield each outer fold's taught student, or the one of all."""
        if self.config.settled_protocol().student == "all":
            yield "all", self._student(self._rows(()))
            return
        for fold in range(len(self.folds)):
            yield f"fold{fold}", self._student(self._rows((fold,)))

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
        return self.cohort.tiles.to_memmap(self.scratch / "tiles.npy")

    def _student(self, rows: np.ndarray | None) -> Student:
        return taught_student(
            self.config,
            self.cohort,
            lambda: self._tiles,
            rows,
            teacher=self.teacher,
            data=self.data,
            device=self.device,
            progress=self.progress,
        )

    def _both(self, rows: np.ndarray) -> Student:
        taught, frozen = self._student(rows), self._student(None)
        return replace(taught, features=np.hstack([frozen.features, taught.features]))

    def _embedding(self, rows: np.ndarray) -> Student:
        self.teacher.fit(self.cohort.by_slide(rows))
        E = embed_cohort(self.teacher, self.cohort, device=self.device, progress=self.progress)
        return Student(E, {"teacher": self.teacher.fitted_on_}, row_ids(E), {}, None)

    def _control(self) -> Student:
        name = self.config.features
        X = {
            "colour": lambda: colour_texture(self._tiles, progress=self.progress),
            "coordinates": lambda: coordinates(self.cohort),
            "depth": lambda: depth(self.cohort),
        }[name]()
        return Student(X, {}, None, {}, None)
