"""Cache of students trained on some rows of a cohort, with their features of all rows."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from glob import escape
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from peka_lite import __version__
from peka_lite._core._processes import Processes
from peka_lite._core.hashing import sha256
from peka_lite._core.io import new_array, open_new_file, report_full_disk, write_file
from peka_lite._core.locks import RECORD, lock_work_folder, move_into_place
from peka_lite._core.progress import Stage
from peka_lite.adapters.adapt import adapt, adapted_share, merge
from peka_lite.adapters.files import backbone_fingerprint, save_adapter
from peka_lite.backbones._packaged import find_packaged
from peka_lite.backbones.custom import PACKAGED_NAMES, row_fields
from peka_lite.backbones.embed import embed_tiles
from peka_lite.backbones.load import load_backbone
from peka_lite.backbones.registry import BACKBONES
from peka_lite.data.download import cache_dir
from peka_lite.experiments._teacher_labels import TeacherTargets, make_targets
from peka_lite.transfer.fit import fit
from peka_lite.transfer.losses import NotFinite
from peka_lite.transfer.model import TransferModel, mlp

TRAINING = (
    "backbone", "weights", "method", "r", "layers", "teacher", "label_method", "resolution", "n_clusters", "kd_space",
    "tau", "kd_weight", "ce_weight", "epochs", "batch_size", "lr", "augment", "seed", "shuffle_teacher",
)  # fmt: skip

PROJECTOR = "projector.safetensors"
FITTING = (
    "epochs", "batch_size", "lr", "tau", "kd_weight", "ce_weight", "augment", "seed", "micro_batch", "recompute",
    "compile",
)  # fmt: skip


@dataclass(frozen=True)
class Student:
    """Features of every spot, and the rows that each step behind them learned from.

    Attributes
    ----------
    features
        (N, D_s) float32, a memory map.
    learned_from
        Step -> `row_ids` recorded by its fit, None for a pretrained step; empty for a frozen student.
    embedding_ids
        (N,) `row_ids` of the teacher's embedding of every spot, input of the clustering; None for a frozen student.
    record
        weights (their origin), fingerprint (`backbone_fingerprint`), and for an adapted student share (of adapted
        weights) and n_labels.
    folder
        Contains ``adapter.safetensors``, ``projector.safetensors`` and ``training.csv`` unless the student is frozen.

    Examples
    --------
    >>> import numpy as np
    >>> import peka_lite as pk
    >>> cohort = pk.open_cohort("mini", slides=["MINI1", "MINI3"])
    >>> splits, protocol = pk.folds(cohort, "patient", 2, 0), pk.evaluation.PROTOCOLS["hest"]
    >>> everything = np.concatenate([pk.evaluation.row_ids(slide.adata.X) for slide in cohort.slides])
    >>> student = pk.experiments.Student(np.zeros((len(cohort), 2)), {"teacher": everything}, None, {}, None)
    >>> pk.evaluate(cohort, splits, lambda left_out: student, protocol=protocol)
    Traceback (most recent call last):
    peka_lite.evaluation.leaks.LeakError: fold 0: the teacher learned from 156 of 346 rows outside the training ...
    """

    features: np.ndarray
    learned_from: dict[str, np.ndarray | None]
    embedding_ids: np.ndarray | None
    record: dict
    folder: Path


def train_student(
    config, cohort, tiles, rows, *, teacher, data: str, device: str,
    processes: Processes | None = None, progress: bool = False,
) -> Student:  # fmt: skip
    """Return the student trained on the given rows, from the cache if possible.

    Parameters
    ----------
    config
        `RunConfig`; the fields in `TRAINING` determine the student.
    tiles
        Function that returns the cohort's tiles; called only if the student is not cached.
    rows
        Training rows; None for a frozen student (method ``"none"``).
    teacher
        From `load_teacher`; `make_targets` computes the targets from it.
    data
        `hash_cohort` of the cohort.
    processes
        Processes that train together; each must request the same students in the same order. None: this process alone.

    Notes
    -----
    Folders in ``students`` of the cache are named by a hash of data, rows, settings, versions and the content of the
    weights file, if there is one. A stopped job resumes from its last epoch, also on another machine. If two jobs need
    the same student, the second waits for the first. On a disk without locks both train it, and the first to finish
    moves it into place.
    """
    processes = processes or Processes(device)
    folder = student_folder(config, rows, teacher=teacher, data=data, device=device)

    def missing() -> bool:
        return processes.same(not (folder / RECORD).is_file())

    if missing():
        with lock_work_folder(folder) if processes.first else nullcontext(folder) as work:
            if missing():
                work = folder.with_name(processes.same(work.name))
                if processes.first:
                    work.mkdir(parents=True, exist_ok=True)
                    _copy_checkpoint(folder, work)
                _make(config, cohort, tiles(), rows, teacher, data, device, work, processes, progress)
                if processes.first:
                    move_into_place(work, folder)
                processes.wait()
    learned = dict(np.load(folder / "learned_from.npz"))
    embedding_ids = learned.pop("embedding", None)
    record = json.loads((folder / RECORD).read_text())
    learned |= dict.fromkeys(record.pop("pretrained"))
    return Student(np.load(folder / "features.npy", mmap_mode="r"), learned, embedding_ids, record, folder)


def student_folder(config, rows, *, teacher, data: str, device: str) -> Path:
    """Return the cache folder of these rows' student, complete once it contains `RECORD`."""
    return cache_dir() / "students" / _key(config, data, rows, teacher, device)


def count_optimizer_steps(config, n: int) -> int:
    """Return the number of optimizer steps of a training on `n` tiles."""
    return config.epochs * -(-n // config.batch_size)


def project_features(student: Student) -> np.ndarray:
    """Return an adapted student's projected features: S of the paper's equation 4, (N, D_t) float32."""
    state = load_file(student.folder / PROJECTOR)
    hidden, dim = state["0.weight"].shape
    projector = mlp(dim, hidden, len(state["2.weight"]))
    projector.load_state_dict(state)
    with torch.inference_mode():
        batches = torch.from_numpy(np.array(student.features)).split(4096)
        return torch.cat([projector(batch) for batch in batches]).numpy()


def _make(config, cohort, tiles, rows, teacher, data, device, work: Path, processes: Processes, progress) -> None:
    progress = progress and processes.first
    with Stage(f"loading {config.backbone}"):
        student = load_backbone(config.backbone, weights=config.weights, seed=config.seed)
    ids, record = {}, {"weights": student.weights_origin, "fingerprint": backbone_fingerprint(student)}
    if rows is not None:
        if not processes.first:
            processes.wait()  # until the first process has cached the targets
        targets = make_targets(config, cohort, rows, teacher=teacher, data=data, device=device, progress=progress)
        if processes.first:
            processes.wait()
        ids |= targets.ids
        history, projector = _train(config, student, tiles.select(rows), targets, cohort, rows, work, device, progress)
        record |= {"share": adapted_share(student), "n_labels": targets.n_labels}
        ids["student"] = student.adapter.fitted_on
        if processes.first:
            write_file(work / "training.csv", history.to_csv(index=False).encode())
            save_adapter(student, work / "adapter.safetensors", data=data)
            with report_full_disk(work / PROJECTOR):
                save_file({name: p.detach().cpu() for name, p in projector.named_parameters()}, work / PROJECTOR)
        student = merge(student)
    _write_features(student, tiles, work / "features.npy", device, processes, progress)
    if processes.first:
        pretrained = [step for step, learned in ids.items() if learned is None]
        with open_new_file(work / "learned_from.npz") as file:
            np.savez(file, **{step: learned for step, learned in ids.items() if learned is not None})
        (work / "student.pt").unlink(missing_ok=True)
        write_file(work / RECORD, json.dumps(record | {"pretrained": pretrained}).encode())


def _copy_checkpoint(folder: Path, work: Path) -> None:
    """Copy the newest checkpoint of another process that trains this student, unless `work` has one.

    Checkpoints are written atomically, and training from any of them gives the same student.
    """
    if (work / "student.pt").is_file():
        return
    with suppress(FileNotFoundError):  # the other process has just finished
        checkpoints = folder.parent.glob(f"{escape(folder.name)}.*.partial/student.pt")
        if newest := max(checkpoints, key=lambda path: path.stat().st_mtime, default=None):
            with newest.open("rb") as source, open_new_file(work / "student.pt.copy", newest.stat().st_size) as copy:
                shutil.copyfileobj(source, copy)
            os.replace(work / "student.pt.copy", work / "student.pt")


def _write_features(student, tiles, path: Path, device, processes: Processes, progress) -> None:
    """Embed the tiles and write (N, D_s) features, each process its share of the rows."""
    n = len(tiles)
    if processes.first:
        new_array(path, (n, student.spec.dim), np.float32)
    processes.wait()
    start, stop = (n * k // processes.count for k in (processes.rank, processes.rank + 1))
    if stop > start:
        share = tiles.select(np.arange(start, stop)) if processes.count > 1 else tiles
        features = np.ascontiguousarray(embed_tiles(student, share, device=device, progress=progress), np.float32)
        # Not through a memory map: a full disk would kill the process with SIGBUS.
        with report_full_disk(path), path.open("r+b") as file:
            file.seek(np.load(path, mmap_mode="r").offset + start * features[0].nbytes)
            file.write(features)
    processes.wait()


def _train(config, student, tiles, targets: TeacherTargets, cohort, rows, work, device, progress):
    E, labels, n_labels = targets.embedding, targets.labels, targets.n_labels
    if config.shuffle_teacher:  # control: each tile gets the targets of another spot
        order = np.random.default_rng(config.seed).permutation(len(E))
        E, labels = E[order], labels[order]
    adapt(
        student,
        config.method,
        r=config.block_size,
        targets=config.layers,
        total_steps=count_optimizer_steps(config, len(E)),
        seed=config.seed,
    )
    model = TransferModel(
        student, teacher_dim=E.shape[1], n_classes=n_labels, kd_space=config.kd_space, seed=config.seed
    )
    try:
        history = fit(
            model, tiles, E, labels, **{k: getattr(config, k) for k in FITTING}, device=device,
            checkpoint=work / "student.pt", resume=True, progress=progress,
        )  # fmt: skip
        return history, model.projector
    except NotFinite as error:
        spots = cohort.obs.iloc[rows[error.rows[:8]]]
        names = ", ".join(f"{slide} {barcode}" for slide, barcode in zip(spots["slide"], spots["barcode"], strict=True))
        raise NotFinite(f"{error} ({names})", error.rows) from None


def _key(config, data: str, rows, teacher, device: str) -> str:
    fields = ("backbone", "weights", "seed") if rows is None else TRAINING
    settings = {k: getattr(config, k) for k in fields}
    settings |= {
        "r": config.block_size if rows is not None else None,
        "data": data,
        "rows": None if rows is None else hashlib.sha256(np.ascontiguousarray(rows, dtype=np.int64)).hexdigest(),
        "teacher": None if rows is None else [repr(teacher), getattr(teacher, "fingerprint", None)],
        "labels": None if rows is None else repr(config.make_labeler()),
        "versions": [4, __version__, *(version(p) for p in ("torch", "timm", "peft", "scanpy", "scikit-learn"))],
        "device": torch.device(device).type,
    }
    file = find_packaged(BACKBONES[config.backbone]) if config.weights == "hub" else Path(config.weights)
    if file is not None and file.is_file():
        settings["weights"] = sha256(file)
    if config.backbone not in PACKAGED_NAMES:
        settings["row"] = row_fields(BACKBONES[config.backbone])
    name = config.backbone if rows is None else f"{config.backbone}_{config.method}"
    return f"{name}_{hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]}"
