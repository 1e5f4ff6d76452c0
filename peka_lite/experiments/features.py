"""Features for the probe: of a student trained on given rows, of the teacher, of a file, or of a control."""

from __future__ import annotations

import copy
import json
import os
import shutil
from collections.abc import Iterable, Sequence
from contextlib import suppress
from functools import cached_property, partial
from glob import escape
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from safetensors.torch import load_file, save_file

from peka_lite._core._processes import Processes
from peka_lite._core.cache import cached, find_cached
from peka_lite._core.device import default_device
from peka_lite._core.hashing import row_ids, sha256
from peka_lite._core.io import new_array, open_new_file, report_full_disk, write_file
from peka_lite._core.locks import RECORD
from peka_lite._core.progress import stage
from peka_lite.adapters.adapt import adapt, adapted_share, merge
from peka_lite.adapters.files import backbone_fingerprint, join_adapters, save_adapter
from peka_lite.backbones.custom import PACKAGED_NAMES, row_fields
from peka_lite.backbones.embed import embed_tiles
from peka_lite.backbones.load import identify_weights, load_backbone
from peka_lite.data.cohorts import hash_cohort
from peka_lite.data.tiles import TileStore
from peka_lite.evaluation.controls import color_features, coordinate_features, depth_features
from peka_lite.evaluation.leaks import FittedFeatures
from peka_lite.experiments.config import RunConfig
from peka_lite.experiments.settings import SETTINGS, settings_deciding
from peka_lite.experiments.targets import TeacherTargets, hash_rows, list_versions
from peka_lite.transfer.fit import fit
from peka_lite.transfer.model import NotFinite, TransferModel, mlp

#: Settings of a frozen student; all that decide a trained one are `settings_deciding("student")`.
_FROZEN = ("backbone", "weights")
_FITTING = ("epochs", "batch_size", "lr", "tau", "kd_weight", "ce_weight", "augment", "seed")
_PROJECTOR = "projector.safetensors"


class Features:
    """Features of every spot of a cohort, fitted on given rows only; results are cached.

    Parameters
    ----------
    config
        `RunConfig`; its `features` say which. Those of a file are not made here (`read_features`).
    cohort
        From `open_cohort`.
    train_mask
        (N,) bool, rows that may be trained on at all; None allows all. Under a protocol whose student is trained on
        ``"all"`` rows, these are the rows of every student.
    scratch
        Folder for a memory map of the tiles; None reads the tiles from the cohort's files each time.
    device
        None: that of the config, or a GPU if there is one.
    processes
        Processes that train together; None for this process alone.

    Examples
    --------
    >>> import peka_lite as pk
    >>> config = pk.RunConfig(slides=["MINI3"], split="spot", method="none")
    >>> cohort = pk.open_cohort("mini", slides=["MINI3"])
    >>> train, test = pk.folds(cohort, "spot")[0]
    >>> features = pk.experiments.Features(config, cohort).for_fold(train)
    >>> features.values.shape, features.learned_from  # a frozen student learned from no row
    ((156, 192), {})
    """

    def __init__(
        self, config: RunConfig, cohort, *, train_mask: np.ndarray | None = None, scratch: Path | None = None,
        device: str | None = None, processes: Processes | None = None, progress: bool = False,
    ):  # fmt: skip
        self.config, self.cohort, self.scratch, self.progress = config, cohort, scratch, progress
        self.device = device or config.device or default_device()
        self.processes = processes or Processes(self.device, alone=True)
        self.train_mask = np.ones(len(cohort), dtype=bool) if train_mask is None else train_mask
        self.trains_student = config.method != "none"
        self.kind = config.feature_kind
        self.teacher = config.load_teacher() if self.trains_student or self.kind == "teacher" else None
        self.data = hash_cohort(cohort)
        self.targets = TeacherTargets(self.teacher, cohort, data=self.data, device=self.device, progress=self.progress)
        self._uses_all = config.resolve_protocol().student == "all"
        self._latest: tuple[tuple, FittedFeatures] = ((), None)

    def for_fold(self, rows: np.ndarray) -> FittedFeatures:
        """Return the features (N, D) of all spots, whose teacher, clusters and student learned from `rows` only."""
        rows = self.student_rows(rows)
        depends = self.trains_student or self.kind == "teacher"  # on the rows; the others are the same for every fold
        key = (self.kind, hash_rows(rows) if depends else None)
        if self._latest[0] != key:
            self._latest = key, self._compute(rows)
        return self._latest[1]

    def student_rows(self, rows: np.ndarray) -> np.ndarray:
        """Return the rows that a fold's student is trained on: the given ones, or all, as the protocol says."""
        return np.flatnonzero(self.train_mask) if self._uses_all else np.asarray(rows)

    def entry(self, rows: np.ndarray | None) -> dict:
        """Return the arguments of `cached` for the student trained on `rows`; None for the frozen student."""
        name = self.config.spec.name + ("" if rows is None else f"_{self.config.method}")
        make = partial(self._make_student, rows)
        return {"kind": "students", "key": self._key(rows), "make": make, "name": name, "processes": self.processes}

    def required(self, sets: Iterable[np.ndarray]) -> list[np.ndarray | None]:
        """Return the rows of each different student that these sets of rows need; None for the frozen student."""
        rows = {hash_rows(r): r for r in map(self.student_rows, sets)} if self.trains_student else {}
        frozen = self.kind.startswith("frozen+") or (self.kind == "student" and not self.trains_student)
        return [*rows.values(), *([None] if frozen else [])]

    def missing(self, sets: Iterable[np.ndarray]) -> list[np.ndarray | None]:
        """Return the rows of those required students that are not in the cache, the same in every process."""
        missing = [rows for rows in self.required(sets) if not (self.folder(rows) / RECORD).is_file()]
        return self.processes.same(missing)  # another job may finish one of them meanwhile

    def folder(self, rows: np.ndarray | None) -> Path:
        """Return the cache folder of a student, which may be missing."""
        entry = self.entry(rows)
        return find_cached(entry["kind"], entry["key"], name=entry["name"])

    def describe_work(self, sets: Sequence[np.ndarray], missing: Sequence[np.ndarray | None]) -> str:
        """Return the amount of work for these sets of rows: trainings, and spots and tiles to embed."""
        n, trainings = len(self.cohort), [rows for rows in missing if rows is not None]
        parts = [f"{len(trainings) or 'no'} {'training' if len(trainings) < 2 else 'trainings'}"]
        if trainings:
            steps = sum(self.config.epochs * -(-len(rows) // self.config.batch_size) for rows in trainings)
            parts.append(f"{steps:,} optimizer steps")
        if ready := len(self.required(sets)) - len(missing):
            parts.append(f"{ready}{' more' if missing else ''} from the cache")
        needed = map(self.student_rows, sets) if self.kind == "teacher" else trainings
        if spots := self.targets.count_missing(needed):
            parts.append(f"{spots:,} spots for the teacher to embed")
        if missing:
            parts.append(f"{len(missing) * n:,} tiles to embed")
        if self.kind == "color":
            parts.append(f"{n:,} tiles to measure")
        return ", ".join(parts)

    def coverage(self) -> float | None:
        """Return the smallest share, over slides, of expressed genes in a pretrained teacher's gene list."""
        if not hasattr(self.teacher, "coverage"):
            return None
        return min(self.teacher.coverage(slide.adata) for slide in self.cohort.slides)

    def save_students(self, students: dict[str, np.ndarray], work: Path) -> dict:
        """Write the adapters and training curves of students (name -> rows) to a run folder; return their record.

        The record has weights (their origin), backbone_fingerprint, adapted_share and n_labels_per_fold.
        """
        if self.trains_student:
            folders = {name: self.folder(self.student_rows(rows)) for name, rows in students.items()}
        else:
            folders = {"frozen": self.folder(None)} if self.kind == "student" else {}
        records = [json.loads((folder / RECORD).read_text()) for folder in folders.values()]
        if self.trains_student:
            paths = {name: folder / "adapter.safetensors" for name, folder in folders.items()}
            join_adapters(paths, work / "adapter.safetensors")
            curves = [
                pd.read_csv(folder / "training.csv").assign(fold=name.removeprefix("fold"))
                for name, folder in folders.items()
            ]
            write_file(work / "training.csv", pd.concat(curves, ignore_index=True).to_csv(index=False).encode())
        first = records[0] if records else {}
        return {
            "weights": first.get("weights"),
            "backbone_fingerprint": first.get("fingerprint"),
            "adapted_share": first.get("share", 0.0),
            "n_labels_per_fold": [record["n_labels"] for record in records if self.trains_student],
        }

    @cached_property
    def tiles(self):
        """Tiles of the cohort, as a memory map in `scratch`."""
        tiles = self.cohort.tiles
        if self.scratch is None:
            return tiles
        path = self.scratch / "tiles.npy"
        if self.processes.first:
            path.unlink(missing_ok=True)  # left by a stopped run, possibly of an older version
            tiles = tiles.to_memmap(path)
        self.processes.wait()
        if self.processes.first:
            return tiles
        return TileStore([path], np.zeros(len(tiles)), np.arange(len(tiles)), tiles.ids)

    @cached_property
    def _frozen(self) -> torch.nn.Module:
        """The student before training, read once; each training adapts a copy."""
        with stage(f"loading {self.config.backbone}"):
            return load_backbone(self.config.backbone, weights=self.config.weights, seed=self.config.seed)

    @cached_property
    def _fingerprint(self) -> str:
        return backbone_fingerprint(self._frozen)

    def end_training(self) -> None:
        """Release the network, and end the work with other processes."""
        self.processes = Processes(self.device, alone=True)
        self.__dict__.pop("_frozen", None)

    def _compute(self, rows: np.ndarray) -> FittedFeatures:
        if self.kind == "color":
            return FittedFeatures(color_features(self.tiles, progress=self.progress), {})
        if self.kind in ("coordinates", "depth"):
            compute = coordinate_features if self.kind == "coordinates" else depth_features
            return FittedFeatures(compute(self.cohort), {})
        if self.kind == "teacher":
            E, learned_from = self.targets.embed(rows)
            return FittedFeatures(E, {"teacher": learned_from}, row_ids(E))
        if self.kind == "file":
            raise ValueError(f"features of a file are read, not computed: {self.config.features}")
        folder = cached(**self.entry(rows if self.trains_student else None))
        X = np.load(folder / "features.npy", mmap_mode="r")
        if self.kind.endswith("projector"):
            X = _project(X, folder / _PROJECTOR)
        if self.kind.startswith("frozen+"):
            X = np.hstack([np.load(cached(**self.entry(None)) / "features.npy", mmap_mode="r"), X])
        learned = dict(np.load(folder / "learned_from.npz"))
        embedding_ids = learned.pop("embedding", None)
        learned |= dict.fromkeys(json.loads((folder / RECORD).read_text())["pretrained"])
        return FittedFeatures(X, learned, embedding_ids)

    def _key(self, rows: np.ndarray | None) -> dict:
        config, trained = self.config, rows is not None
        names = settings_deciding("student") if trained else _FROZEN
        key = {name: _identify(name, getattr(config, name)) for name in names}
        key |= {
            "backbone": config.spec.name, "weights": identify_weights(config.spec, config.weights), "data": self.data,
            "versions": list_versions("torch", "timm", "peft", "scanpy", "scikit-learn"),
            "device": torch.device(self.device).type,
        }  # fmt: skip
        if config.weights == "random":
            key["seed"] = config.seed
        if config.spec.name not in PACKAGED_NAMES:
            key["row"] = row_fields(config.spec)
        if trained:
            key |= {"r": config.block_size, "rows": hash_rows(rows), "labeler": repr(config.make_labeler())}
            key["teacher"] = [repr(self.teacher), getattr(self.teacher, "fingerprint", None)]
        return key

    def _make_student(self, rows: np.ndarray | None, work: Path) -> dict:
        """Train a student on `rows` (None: leave it frozen) and write it with its features of all spots."""
        config, first = self.config, self.processes.first
        student, record = self._frozen, {}
        learned: dict[str, np.ndarray | None] = {}  # step -> ids of the rows that it was fitted on
        if rows is not None:
            if first:
                _copy_checkpoint(work, self.folder(rows))
            else:
                self.processes.wait()  # until the first process has cached the targets
            E, labels, n_labels, learned = self.targets.make(rows, config.make_labeler())
            if first:
                self.processes.wait()
            if config.shuffle_teacher:  # control: each tile gets the targets of another spot
                order = np.random.default_rng(config.seed).permutation(len(rows))
                E, labels = E[order], labels[order]
            student, steps = copy.deepcopy(student), config.epochs * -(-len(rows) // config.batch_size)
            adapt(
                student, config.method, r=config.block_size, targets=config.layers, total_steps=steps, seed=config.seed
            )
            model = TransferModel(
                student, teacher_dim=E.shape[1], n_classes=n_labels, kd_space=config.kd_space, seed=config.seed
            )
            fitting = {name: getattr(config, name) for name in (*_FITTING, "micro_batch", "recompute", "compile")}
            try:
                history = fit(
                    model, self.tiles.select(rows), E, labels, **fitting, device=self.device,
                    checkpoint=work / "student.pt", resume=True, progress=self.progress and first,
                )  # fmt: skip
            except NotFinite as error:
                raise NotFinite(f"{error} ({self._name_spots(rows[error.rows[:8]])})", error.rows) from None
            learned["student"] = student.adapter.fitted_on
            record = {"share": adapted_share(student), "n_labels": n_labels}
            if first:
                write_file(work / "training.csv", history.to_csv(index=False).encode())
                save_adapter(student, work / "adapter.safetensors", data=self.data)
                with report_full_disk(work / _PROJECTOR):
                    projector = {name: p.detach().cpu() for name, p in model.projector.named_parameters()}
                    save_file(projector, work / _PROJECTOR)
            student = merge(student)
        self._write_features(student, work / "features.npy")
        self._frozen.cpu()  # the next training adapts a copy of it
        if first:
            with open_new_file(work / "learned_from.npz") as file:
                np.savez(file, **{step: ids for step, ids in learned.items() if ids is not None})
            (work / "student.pt").unlink(missing_ok=True)
        record |= {"weights": self._frozen.weights_origin, "fingerprint": self._fingerprint}
        return record | {"pretrained": [step for step, ids in learned.items() if ids is None]}

    def _name_spots(self, rows: np.ndarray) -> str:
        spots = self.cohort.obs.iloc[rows]
        return ", ".join(f"{slide} {code}" for slide, code in zip(spots["slide"], spots["barcode"], strict=True))

    def _write_features(self, student, path: Path) -> None:
        """Embed the tiles and write (N, D_s) features, each process its share of the rows."""
        n, processes = len(self.tiles), self.processes
        if processes.first:
            new_array(path, (n, student.spec.dim), np.float32)
        processes.wait()
        start, stop = (n * k // processes.count for k in (processes.rank, processes.rank + 1))
        if stop > start:
            share = self.tiles.select(np.arange(start, stop)) if processes.count > 1 else self.tiles
            X = embed_tiles(student, share, device=self.device, progress=self.progress and processes.first)
            X = np.ascontiguousarray(X, np.float32)
            # Not through a memory map: a full disk would kill the process with SIGBUS.
            with report_full_disk(path), path.open("r+b") as file:
                file.seek(np.load(path, mmap_mode="r").offset + start * X[0].nbytes)
                file.write(X)
        processes.wait()


def select_training_spots(cohort, share: float, seed: int) -> np.ndarray:
    """Select the spots that may be trained on, the same share of every slide; (N,) bool."""
    use = np.ones(len(cohort), dtype=bool)
    if share < 1:
        rng = np.random.default_rng(seed)
        for slide in cohort.slides:
            rows = cohort.rows_of(slide.id)
            use[rng.permutation(rows)[max(1, round(share * len(rows))) :]] = False
    return use


def _project(X: np.ndarray, path: Path) -> np.ndarray:
    """Return the student's projected features: S of the paper's equation 4, (N, D_t) float32."""
    state = load_file(path)
    hidden, dim = state["0.weight"].shape
    projector = mlp(dim, hidden, len(state["2.weight"]))
    projector.load_state_dict(state)
    with torch.inference_mode():
        return torch.cat([projector(batch) for batch in torch.from_numpy(np.array(X)).split(4096)]).numpy()


def _copy_checkpoint(work: Path, folder: Path) -> None:
    """Copy the newest checkpoint of another process that trains this student, unless `work` has one.

    Checkpoints are written atomically, and training from any of them gives the same student.
    """
    if (work / "student.pt").is_file():
        return
    with suppress(FileNotFoundError):  # the other process has just finished
        checkpoints = folder.parent.glob(f"{escape(folder.name)}.*.partial/student.pt")
        if newest := max(checkpoints, key=lambda path: path.stat().st_mtime, default=None):
            with newest.open("rb") as source, open_new_file(work / "student.pt.copy", newest.stat().st_size) as target:
                shutil.copyfileobj(source, target)
            os.replace(work / "student.pt.copy", work / "student.pt")


def _identify(name: str, value):
    """Return a setting's value, or the content's hash where it is the path of a file."""
    if SETTINGS[name].path and isinstance(value, str) and Path(value).is_file():
        return f"sha256 {sha256(Path(value))}"
    return list(value) if isinstance(value, tuple) else value
