"""The first half of a run alone: teach one student and its probe, and keep them as a model to predict with."""

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
from peka_lite.experiments.features import FeatureSource, training_spots
from peka_lite.experiments.folder import lock_run_folder, record_environment, start_run_folder
from peka_lite.probe.files import save_probes
from peka_lite.probe.moments import gather
from peka_lite.probe.pca_ridge import PCARidge


def train(config: RunConfig, out: str | os.PathLike, *, fold: int | None = None, progress: bool = False) -> dict:
    """Teach a student and fit its probe on the whole cohort, or on one fold's training spots; nothing is scored.

    The student of a fold is the one that `run` teaches for it, and both keep it in one cache: whichever comes second
    finds it there. Folds can so be taught on different machines that share a cache.

    Parameters
    ----------
    config
        As for `run`, with features ``"student"`` or ``"frozen+student"``. A penalty of ``"inner"`` takes a student more
        for each fold, to be judged on spots that it did not see.
    out
        Folder to make, when all is complete: ``config.yml``, ``summary.json``, ``probe.safetensors``, and where a
        student was taught ``training.csv`` and ``adapter.safetensors``. `load_trained` reads it.
    fold
        Fold whose test spots are left out. None: nothing is left out, so only another cohort can judge the result.
    progress
        Print the plan, then bars, or where stderr is no terminal a line every half minute.

    Returns
    -------
    dict
        The summary; in other processes than the first of an ``accelerate launch``, nothing.

    Raises
    ------
    FileExistsError
        If `out` is there already, or ``{out}.partial`` holds other settings. Where another process is at work on `out`,
        that is seen when it is through.
    ValueError
        For features that have no student, and a fold that is not there.

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
        raise ValueError(f"features {config.features!r} have no student to train: take 'student' or 'frozen+student'")
    device = config.device or default_device()
    processes = Processes(device)
    with lock_run_folder(config, out, processes) as work, Stage("reading the cohort", reports=progress) as stage:
        at = {"device": device, "processes": processes, "stage": stage}
        return _train(config, work, **at, fold=fold, progress=progress)


def _train(
    config: RunConfig, work: Path, *, device: str, processes: Processes, stage: Stage, fold: int | None, progress: bool
) -> dict:
    """Do `train`'s work, and say in `stage` what is being done where nothing inside says it."""
    begun = time.perf_counter()
    quality = {"min_genes": config.min_genes, "max_mito": config.max_mito}
    cohort = open_cohort(config.cohort, slides=config.slides, patients=config.patients, **quality)
    protocol, use = config.settled_protocol(), training_spots(cohort, config.train_share, config.seed)
    inner = protocol.alpha == "inner"
    splits, left, fold_of = [], () if fold is None else (fold,), np.zeros(len(cohort), dtype=np.int64)
    if inner or left:
        splits = protocol_folds(cohort, protocol, config.n_splits, config.seed)
        judge = LeakChecker(cohort, splits, protocol)
        for i, (_, test) in enumerate(splits):
            fold_of[test] = i
    if left and not 0 <= fold < len(splits):
        raise ValueError(f"fold {fold} is not there; this cohort has folds 0 to {len(splits) - 1}")
    source = FeatureSource(config, cohort, splits, use=use, scratch=work / "scratch", device=device, progress=progress)
    coverage = source.coverage()
    if processes.first:
        start_run_folder(config, work, "train" if fold is None else f"train --fold {fold}")
    others = [j for j in range(len(splits)) if j not in left] if inner else []
    stage.text = ""
    source.prepare([left, *(tuple(sorted((*left, j))) for j in others)])
    if not processes.first:
        return {}

    keep = use & ~np.isin(fold_of, left) if left else use
    genes = top_hvg(
        cohort.adata, n=config.n_genes, rows=None if protocol.genes == "all" else np.flatnonzero(keep),
        method=protocol.normalization,
    )  # fmt: skip
    Y = expression_targets(cohort.adata, genes, method=protocol.normalization)
    cells = np.where(use, fold_of, -1)
    alpha = protocol.alpha
    if inner:
        alpha = choose_alpha(left, len(splits), source, judge, Y=Y, cells=cells, standardize=protocol.standardize)
    stage.text = "fitting the probe"
    student = source(left)
    moments = gather(student.features, Y, np.where(keep, 0, -1)).over([0])
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*training rows of.*components")  # told in summary.json
        probe = PCARidge(256, alpha, standardize=protocol.standardize, fit_intercept=True).fit_sums(moments)
    name = f"fold{fold}" if left else "all"
    record = source.record({name: left})
    save_probes(
        work / "probe.safetensors", {name: (probe, list(genes))},
        normalization=protocol.normalization, fingerprint=record["backbone_fingerprint"],
    )  # fmt: skip
    source.save(work, {name: left})
    everything = protocol.student == "all" or not left
    seen = {str(s) for s in cohort.obs["slide"].to_numpy()[slice(None) if everything else splits[fold][0]]}
    summary = {
        "protocol": protocol.name, "method": config.method, "features": config.features, "backbone": config.backbone,
        "shuffled": config.shuffle_teacher, "cohort": config.cohort, "split": protocol.split if left else None,
        "normalization": protocol.normalization, "mean_pcc": None, "fold": fold,
        "held_out": sorted({s.id for s in cohort.slides} - seen),
        "alpha": alpha, "pca_components": int(probe.n_components_), "epochs": config.epochs if source.taught else None,
        "teacher": None if source.teacher is None else repr(source.teacher),
        "teacher_fingerprint": getattr(source.teacher, "fingerprint", None), "teacher_coverage": coverage,
        **record, "n_spots": len(cohort), "n_taught": int(keep.sum()), "slides": [s.id for s in cohort.slides],
        "synthetic": any(bool(s.metadata.get("synthetic")) for s in cohort.slides),
        "data_fingerprint": source.data, "seconds": round(time.perf_counter() - begun, 1), **record_environment(device),
    }  # fmt: skip
    write_file(work / "summary.json", json.dumps(summary, indent=1).encode())
    shutil.rmtree(work / "scratch", ignore_errors=True)
    return summary
