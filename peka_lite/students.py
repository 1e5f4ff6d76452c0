"""A student taught on some rows of a cohort, and its features of all rows: made once, kept by fingerprint."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from peka_lite import __version__
from peka_lite.adapters import adapt, adapted_share, adapter_state, merge
from peka_lite.backbones import embed_tiles, load_backbone
from peka_lite.manifest import cache_dir
from peka_lite.provenance import row_ids
from peka_lite.teachers import embed_cohort
from peka_lite.teachers.stream import alone
from peka_lite.transfer import TransferModel, fit

TRAINING = (
    "backbone", "weights", "method", "r", "layers", "teacher", "label_method", "resolution", "n_clusters", "kd_space",
    "tau", "kd_weight", "ce_weight", "epochs", "batch_size", "lr", "seed", "shuffle_teacher",
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
        weights (where they came from), share (of weights adapted), n_labels.
    folder
        Holds ``adapter.safetensors`` and ``training.csv`` unless the student is frozen.
    """

    features: np.ndarray
    learned_from: dict[str, np.ndarray | None]
    embedding_ids: np.ndarray | None
    record: dict
    folder: Path


def taught_student(config, cohort, tiles, rows, *, teacher, data: str, device: str, progress: bool = False) -> Student:
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
        From `load_teacher`; fitted here if it learns from data.
    data
        `fingerprint` of the cohort.

    Notes
    -----
    Folders of ``students`` in the cache are named by a hash of data, rows, settings and versions. A stopped job goes
    on from its last epoch; of two jobs that want one student the second waits for the first.
    """
    key = _key(config, data, rows, teacher, device)
    folder = cache_dir() / "students" / key
    if not (folder / "record.json").is_file():
        with alone(folder):
            if not (folder / "record.json").is_file():
                _make(config, cohort, tiles(), rows, teacher, device, folder, progress)
    learned = dict(np.load(folder / "learned_from.npz"))
    embedding_ids = learned.pop("embedding", None)
    record = json.loads((folder / "record.json").read_text())
    learned |= dict.fromkeys(record.pop("pretrained"))
    return Student(np.load(folder / "features.npy", mmap_mode="r"), learned, embedding_ids, record, folder)


def _make(config, cohort, tiles, rows, teacher, device, folder: Path, progress) -> None:
    work = folder.with_name(folder.name + ".partial")
    work.mkdir(parents=True, exist_ok=True)
    student = load_backbone(config.backbone, weights=config.weights, seed=config.seed)
    record, ids, pretrained = {"weights": student.weights_origin, "share": 0.0, "n_labels": None}, {}, []
    if rows is not None:
        from safetensors.torch import save_file

        teacher.fit(cohort.by_slide(rows))
        E = embed_cohort(teacher, cohort, device=device, progress=progress)  # (N, D_t)
        labeler = config.labeler().fit(E[rows])
        student, history = _teach(config, student, tiles.select(rows), E[rows], labeler, work, device, progress)
        history.to_csv(work / "training.csv", index=False)
        record |= {"share": adapted_share(student), "n_labels": int(labeler.n_labels_)}
        meta = {"method": config.method, "backbone": config.backbone, "weights": record["weights"]}
        save_file(adapter_state(student), work / "adapter.safetensors", metadata=meta | {"r": str(config.block_size)})
        # A teacher that does not say what it learned from cannot be judged, so it must say None itself.
        ids = {"teacher": teacher.fitted_on_, "clusters": labeler.fitted_on_, "student": student.adapter.fitted_on}
        pretrained = [step for step, learned in ids.items() if learned is None]
        ids = {step: learned for step, learned in ids.items() if learned is not None} | {"embedding": row_ids(E)}
        student = merge(student)
    np.save(work / "features.npy", embed_tiles(student, tiles, device=device, progress=progress))
    np.savez(work / "learned_from.npz", **ids)
    (work / "student.pt").unlink(missing_ok=True)
    (work / "record.json").write_text(json.dumps(record | {"pretrained": pretrained}))
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(work, folder)


def _teach(config, student, tiles, E, labeler, work, device, progress) -> tuple[torch.nn.Module, pd.DataFrame]:
    labels = labeler.labels_
    if config.shuffle_teacher:  # a control: the tile of one spot with the expression of another
        order = np.random.default_rng(config.seed).permutation(len(E))
        E, labels = E[order], labels[order]
    steps = config.epochs * -(-len(E) // config.batch_size)
    adapt(
        student,
        config.method,
        r=config.block_size,
        targets=config.layers,
        total_steps=steps,
        seed=config.seed,
    )
    model = TransferModel(
        student, teacher_dim=E.shape[1], n_classes=labeler.n_labels_, kd_space=config.kd_space, seed=config.seed
    )
    wanted = {k: getattr(config, k) for k in ("epochs", "batch_size", "lr", "tau", "kd_weight", "ce_weight", "seed")}
    checkpoint = work / "student.pt"
    history = fit(
        model, tiles, E, labels, **wanted, device=device, checkpoint=checkpoint, resume=True, progress=progress
    )
    return student, history


def _key(config, data: str, rows, teacher, device: str) -> str:
    fields = ("backbone", "weights", "seed") if rows is None else TRAINING
    settings = {k: getattr(config, k) for k in fields}
    settings |= {
        "r": config.block_size if rows is not None else None,
        "data": data,
        "rows": None if rows is None else hashlib.sha256(np.ascontiguousarray(rows, dtype=np.int64)).hexdigest(),
        "teacher": None if rows is None else [repr(teacher), getattr(teacher, "fingerprint", None)],
        "labels": None if rows is None else repr(config.labeler()),
        "versions": [__version__, *(version(p) for p in ("torch", "timm", "peft", "scanpy", "scikit-learn"))],
        "device": torch.device(device).type,
    }
    if Path(config.weights).is_file():
        with open(config.weights, "rb") as file:
            settings["weights"] = hashlib.file_digest(file, "sha256").hexdigest()
    name = config.backbone if rows is None else f"{config.backbone}_{config.method}"
    return f"{name}_{hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]}"
