"""A student taught on some rows of a cohort, and its features of all rows: made once, kept by fingerprint."""

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
from peka_lite.backbones.custom import PACKAGE, row_fields
from peka_lite.backbones.embed import embed_tiles
from peka_lite.backbones.load import load_backbone
from peka_lite.backbones.registry import BACKBONES
from peka_lite.data.download import cache_dir
from peka_lite.experiments._teacher_labels import TeacherTargets, make_targets
from peka_lite.transfer.fit import fit
from peka_lite.transfer.model import NotFinite, TransferModel, mlp

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
    """Features of every spot, and what each step behind them learned from.

    Attributes
    ----------
    features
        (N, D_s) float32, a memory map.
    learned_from
        Step -> `row_ids` recorded by its fit, None where it came trained from elsewhere; empty for a frozen student.
    embedding_ids
        (N,) `row_ids` of the teacher's embedding of every spot, which the clusters learned from; None for a frozen one.
    record
        weights (where they came from), fingerprint (`backbone_fingerprint`), and of a taught one share (of weights
        adapted) and n_labels.
    folder
        Holds ``adapter.safetensors``, ``projector.safetensors`` and ``training.csv`` unless the student is frozen.

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
    """Return the student that the given rows taught, from the cache where the same was made before.

    Parameters
    ----------
    config
        `RunConfig`; the fields of `TRAINING` decide the student.
    tiles
        Function that returns the cohort's tiles; called only when there is work to do.
    rows
        Training rows; None for a frozen student (method ``"none"``).
    teacher
        From `load_teacher`; what it says comes from `make_targets`.
    data
        `hash_cohort` of the cohort.
    processes
        Those that make it together: each asks for the same students in the same order. None: this process alone.

    Notes
    -----
    Folders of ``students`` in the cache are named by a hash of data, rows, settings, versions and, where the weights
    are a file of one's own or of the package, its content. A stopped job goes
    on from its last epoch, on another machine too; of two jobs that want one student the second waits for the first
    (`alone`), and where a disk has no locks both make it, and the one that is through first puts it there.
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
                    _take_over(folder, work)
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
    """Return where the cache keeps the student of these rows: whole once its record is there (`RECORD`)."""
    return cache_dir() / "students" / _key(config, data, rows, teacher, device)


def optimizer_steps(config, n: int) -> int:
    """Return how many steps a training on `n` tiles takes."""
    return config.epochs * -(-n // config.batch_size)


def project_features(student: Student) -> np.ndarray:
    """Return what a taught student's projector makes of its features: S of the paper's equation 4, (N, D_t) float32."""
    state = load_file(student.folder / PROJECTOR)
    hidden, dim = state["0.weight"].shape
    projector = mlp(dim, hidden, len(state["2.weight"]))
    projector.load_state_dict(state)
    with torch.inference_mode():
        pieces = torch.from_numpy(np.array(student.features)).split(4096)
        return torch.cat([projector(piece) for piece in pieces]).numpy()


def _make(config, cohort, tiles, rows, teacher, data, device, work: Path, processes: Processes, progress) -> None:
    progress = progress and processes.first
    with Stage(f"loading {config.backbone}"):
        student = load_backbone(config.backbone, weights=config.weights, seed=config.seed)
    ids, record = {}, {"weights": student.weights_origin, "fingerprint": backbone_fingerprint(student)}
    if rows is not None:
        if not processes.first:
            processes.wait()  # the first makes the lesson, and the others find it
        taught = make_targets(config, cohort, rows, teacher=teacher, data=data, device=device, progress=progress)
        if processes.first:
            processes.wait()
        ids |= taught.ids
        history, projector = _teach(config, student, tiles.select(rows), taught, cohort, rows, work, device, progress)
        record |= {"share": adapted_share(student), "n_labels": taught.n_labels}
        ids["student"] = student.adapter.fitted_on
        if processes.first:
            write_file(work / "training.csv", history.to_csv(index=False).encode())
            save_adapter(student, work / "adapter.safetensors", data=data)
            with report_full_disk(work / PROJECTOR):
                save_file({name: p.detach().cpu() for name, p in projector.named_parameters()}, work / PROJECTOR)
        student = merge(student)
    _embed(student, tiles, work / "features.npy", device, processes, progress)
    if processes.first:
        pretrained = [step for step, learned in ids.items() if learned is None]
        with open_new_file(work / "learned_from.npz") as file:
            np.savez(file, **{step: learned for step, learned in ids.items() if learned is not None})
        (work / "student.pt").unlink(missing_ok=True)
        write_file(work / RECORD, json.dumps(record | {"pretrained": pretrained}).encode())


def _take_over(folder: Path, work: Path) -> None:
    """Copy the newest checkpoint that another writer of this student left, where there is none here.

    A checkpoint is whole whenever it is read, and whoever made it would go on to the same student.
    """
    if (work / "student.pt").is_file():
        return
    with suppress(FileNotFoundError):  # whoever it belongs to has just finished
        left = folder.parent.glob(f"{escape(folder.name)}.*.partial/student.pt")
        if newest := max(left, key=lambda path: path.stat().st_mtime, default=None):
            with newest.open("rb") as left, open_new_file(work / "student.pt.copy", newest.stat().st_size) as copy:
                shutil.copyfileobj(left, copy)
            os.replace(work / "student.pt.copy", work / "student.pt")


def _embed(student, tiles, path: Path, device, processes: Processes, progress) -> None:
    """Write (N, D_s) features, each process its share of the rows."""
    n = len(tiles)
    if processes.first:
        new_array(path, (n, student.spec.dim), np.float32)
    processes.wait()
    start, stop = (n * k // processes.count for k in (processes.rank, processes.rank + 1))
    if stop > start:
        mine = tiles.select(np.arange(start, stop)) if processes.count > 1 else tiles
        features = np.ascontiguousarray(embed_tiles(student, mine, device=device, progress=progress), np.float32)
        # Not by a memory map: where a disk without room meets one, the process dies.
        with report_full_disk(path), path.open("r+b") as file:
            file.seek(np.load(path, mmap_mode="r").offset + start * features[0].nbytes)
            file.write(features)
    processes.wait()


def _teach(config, student, tiles, lesson: TeacherTargets, cohort, rows, work, device, progress):
    E, labels, n_labels = lesson.embedding, lesson.labels, lesson.n_labels
    if config.shuffle_teacher:  # a control: the tile of one spot with the expression of another
        order = np.random.default_rng(config.seed).permutation(len(E))
        E, labels = E[order], labels[order]
    adapt(
        student,
        config.method,
        r=config.block_size,
        targets=config.layers,
        total_steps=optimizer_steps(config, len(E)),
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
        "labels": None if rows is None else repr(config.labeler()),
        "versions": [4, __version__, *(version(p) for p in ("torch", "timm", "peft", "scanpy", "scikit-learn"))],
        "device": torch.device(device).type,
    }
    file = find_packaged(BACKBONES[config.backbone]) if config.weights == "hub" else Path(config.weights)
    if file is not None and file.is_file():
        settings["weights"] = sha256(file)
    if config.backbone not in PACKAGE:
        settings["row"] = row_fields(BACKBONES[config.backbone])
    name = config.backbone if rows is None else f"{config.backbone}_{config.method}"
    return f"{name}_{hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]}"
