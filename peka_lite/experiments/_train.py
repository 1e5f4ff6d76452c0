"""Training without scoring: one student and its probe, saved as a model for prediction."""

from __future__ import annotations

import json
import os
import shutil
import time
import warnings
from pathlib import Path

import numpy as np

from peka_lite._core._processes import Processes
from peka_lite._core.device import default_device
from peka_lite._core.io import write_file
from peka_lite._core.progress import Stage
from peka_lite.data.cohorts import open_cohort
from peka_lite.data.expression import expression_targets, top_hvg
from peka_lite.evaluation.evaluate import LeakChecker, choose_alpha
from peka_lite.evaluation.folds import protocol_folds
from peka_lite.experiments.config import RunConfig
from peka_lite.experiments.features import FeatureSource, select_training_spots
from peka_lite.experiments.folder import lock_run_folder, record_environment, start_run_folder
from peka_lite.probe.files import save_probes
from peka_lite.probe.moments import gather
from peka_lite.probe.pca_ridge import PCARidge


def train(config: RunConfig, out: str | os.PathLike, *, fold: int | None = None, progress: bool = False) -> dict:
    """Train a student and fit its probe on the whole cohort or on one fold's training spots, without scoring.

    The student of a fold is the one that `run` trains, and both share the cache. The folds can therefore be trained on
    several machines that share a cache.

    Parameters
    ----------
    config
        As for `run`, with features ``"student"`` or ``"frozen+student"``. With alpha ``"inner"`` one more student per
        fold is trained, to choose the regularization strength on spots that were held out.
    out
        Folder to create, once complete: ``config.yml``, ``summary.json``, ``probe.safetensors``, and for an adapted
        student ``training.csv`` and ``adapter.safetensors``. `load_trained` reads it.
    fold
        Fold whose test spots are left out. None trains on all spots, so only another cohort can evaluate the result.
    progress
        Print the plan, then progress bars, or a line every half minute if stderr is no terminal.

    Returns
    -------
    dict
        The summary; empty in all but the first process of an ``accelerate launch``.

    Raises
    ------
    FileExistsError
        If `out` exists, or ``{out}.partial`` has other settings. If another process is working on `out`, the
        call waits for it first.
    ValueError
        For features without a student, and a fold that does not exist.

    Examples
    --------
    >>> import peka_lite as pk
    >>> config = pk.RunConfig(method="none", slides=["MINI1", "MINI3", "MINI5"], n_splits=3, n_genes=10)
    >>> summary = pk.train(config, "student", fold=0)
    >>> summary["held_out"], summary["n_taught"], summary["n_spots"]
    (['MINI5'], 346, 580)
    >>> pk.load_trained("student").name
    'fold0'
    """
    out = Path(out)
    if config.features not in ("student", "frozen+student"):
        raise ValueError(f"features {config.features!r} have no student to train: use 'student' or 'frozen+student'")
    device = config.device or default_device()
    processes = Processes(device)
    with lock_run_folder(config, out, processes) as work, Stage("reading the cohort", reports=progress) as stage:
        options = {"device": device, "processes": processes, "stage": stage}
        return _train(config, work, **options, fold=fold, progress=progress)


def _train(
    config: RunConfig, work: Path, *, device: str, processes: Processes, stage: Stage, fold: int | None, progress: bool
) -> dict:
    """Train in the locked folder, with the current step as text of `stage`."""
    start = time.perf_counter()
    quality = {"min_genes": config.min_genes, "max_mito": config.max_mito}
    cohort = open_cohort(config.cohort, slides=config.slides, patients=config.patients, **quality)
    protocol, use = config.resolve_protocol(), select_training_spots(cohort, config.train_share, config.seed)
    inner = protocol.alpha == "inner"
    splits, left_out, fold_of = [], () if fold is None else (fold,), np.zeros(len(cohort), dtype=np.int64)
    if inner or left_out:
        splits = protocol_folds(cohort, protocol, config.n_splits, config.seed)
        checker = LeakChecker(cohort, splits, protocol)
        for i, (_, test) in enumerate(splits):
            fold_of[test] = i
    if left_out and not 0 <= fold < len(splits):
        raise ValueError(f"fold {fold} does not exist; this cohort has folds 0 to {len(splits) - 1}")
    source = FeatureSource(config, cohort, splits, use=use, scratch=work / "scratch", device=device, progress=progress)
    coverage = source.coverage()
    if processes.first:
        start_run_folder(config, work, "train" if fold is None else f"train --fold {fold}")
    others = [j for j in range(len(splits)) if j not in left_out] if inner else []
    stage.text = ""
    source.prepare([left_out, *(tuple(sorted((*left_out, j))) for j in others)])
    if not processes.first:
        return {}

    train_mask = use & ~np.isin(fold_of, left_out) if left_out else use
    genes = top_hvg(
        cohort.adata, n=config.n_genes, rows=None if protocol.genes == "all" else np.flatnonzero(train_mask),
        method=protocol.normalization,
    )  # fmt: skip
    Y = expression_targets(cohort.adata, genes, method=protocol.normalization)
    cells = np.where(use, fold_of, -1)
    alpha = protocol.alpha
    if inner:
        alpha = choose_alpha(left_out, len(splits), source, checker, Y=Y, cells=cells, standardize=protocol.standardize)
    stage.text = "fitting the probe"
    student = source(left_out)
    moments = gather(student.features, Y, np.where(train_mask, 0, -1)).over([0])
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*training rows of.*components")  # reported in summary.json
        probe = PCARidge(256, alpha, standardize=protocol.standardize, fit_intercept=True).fit_sums(moments)
    name = f"fold{fold}" if left_out else "all"
    record = source.record({name: left_out})
    save_probes(
        work / "probe.safetensors", {name: (probe, list(genes))},
        normalization=protocol.normalization, fingerprint=record["backbone_fingerprint"],
    )  # fmt: skip
    source.save(work, {name: left_out})
    train_rows = slice(None) if protocol.student == "all" or not left_out else splits[fold][0]
    train_slides = {str(s) for s in cohort.obs["slide"].to_numpy()[train_rows]}
    summary = {
        "protocol": protocol.name, "method": config.method, "features": config.features, "backbone": config.backbone,
        "shuffled": config.shuffle_teacher, "cohort": config.cohort, "split": protocol.split if left_out else None,
        "normalization": protocol.normalization, "mean_pcc": None, "fold": fold,
        "held_out": sorted({s.id for s in cohort.slides} - train_slides),
        "alpha": alpha, "pca_components": int(probe.n_components_),
        "epochs": config.epochs if source.trains_student else None,
        "teacher": None if source.teacher is None else repr(source.teacher),
        "teacher_fingerprint": getattr(source.teacher, "fingerprint", None), "teacher_coverage": coverage,
        **record, "n_spots": len(cohort), "n_taught": int(train_mask.sum()), "slides": [s.id for s in cohort.slides],
        "synthetic": any(bool(s.metadata.get("synthetic")) for s in cohort.slides),
        "data_fingerprint": source.data, "seconds": round(time.perf_counter() - start, 1), **record_environment(device),
    }  # fmt: skip
    write_file(work / "summary.json", json.dumps(summary, indent=1).encode())
    shutil.rmtree(work / "scratch", ignore_errors=True)
    return summary
