"""One experiment, from a cohort to a table of Pearson correlations, a summary, adapters and maps."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd

from peka_lite._core._processes import Processes
from peka_lite._core.device import default_device
from peka_lite._core.hdf5 import read_anndata
from peka_lite._core.io import write_file, write_h5ad
from peka_lite._core.names import read_metrics, write_metrics
from peka_lite._core.progress import Stage
from peka_lite._core.untrusted_files import file_inside
from peka_lite.backbones._packaged import describe_file, find_packaged
from peka_lite.backbones.registry import BACKBONES
from peka_lite.data.cohorts import open_cohort
from peka_lite.data.expression import NORMALIZATIONS
from peka_lite.data.hest import Cohort
from peka_lite.evaluation.ceiling import expression_ceiling
from peka_lite.evaluation.evaluate import LeakChecker, evaluate, left_out_sets
from peka_lite.evaluation.folds import protocol_folds
from peka_lite.evaluation.scores import bootstrap_interval, pool_pcc
from peka_lite.experiments._unfinished import explain_missing
from peka_lite.experiments.config import RunConfig
from peka_lite.experiments.features import FeatureSource, select_training_spots
from peka_lite.experiments.folder import (
    draw_maps,
    join_predictions,
    lock_run_folder,
    record_environment,
    start_run_folder,
)
from peka_lite.experiments.model import read_run
from peka_lite.probe.files import save_probes


def run(config: RunConfig, out: str | os.PathLike, *, maps: bool = True, progress: bool = False) -> dict:
    """Run one experiment and write its folder.

    The protocol sets what is held out and which rows each step may be fitted on (`PROTOCOLS`). Without a protocol,
    highly variable genes, teacher, clusters, student and probe are all fitted on training rows.

    Parameters
    ----------
    config
        Settings of the run.
    out
        Folder to create, once the run is complete: ``config.yml``, ``metrics.csv`` (tidy: method, backbone, split,
        protocol, features, normalization, fold, gene, pcc, n_train, n_test; for the protocol's normalization, PCC
        pooled over the fold's test spots), ``slides.parquet`` (`slide_moments` for both normalizations, from which all
        scores are computed), ``summary.json``, ``predictions.h5ad`` (held-out predictions, NaN where a gene was not
        among a fold's targets; layer ``measured``), ``maps/*.png``, ``backbone.yml`` for a custom backbone, and for an
        adapted student ``training.csv`` and ``adapter.safetensors`` (one set of tensors per fold, or one for all
        folds). With features ``"student"`` or ``"frozen+student"`` there is also ``probe.safetensors`` (one probe per
        fold), and `load_trained` reads the folder. An incomplete run is in ``{out}.partial``. Students are cached
        (`train_student`), so an interrupted run resumes when it is started again.
    maps
        Draw the maps, the slowest part of a run with cached students.
    progress
        Print the plan, then progress bars, or a line every half minute if stderr is no terminal.

    Returns
    -------
    dict
        The summary; empty in all but the first process of an ``accelerate launch``.

    Raises
    ------
    FileExistsError
        If `out` exists, or ``{out}.partial`` is a run with other settings. If another process is
        working on `out`, the call waits for it first.

    Examples
    --------
    >>> from pathlib import Path
    >>> import peka_lite as pk
    >>> from peka_lite.experiments import run
    >>> slides = ["MINI1", "MINI3", "MINI5"]
    >>> config = pk.RunConfig(features="depth", method="none", slides=slides, n_splits=3, n_genes=10)
    >>> summary = run(config, "first_run", maps=False)
    >>> round(summary["mean_pcc"], 2), summary["split"], summary["n_folds"], summary["n_spots"]
    (0.02, 'patient', 3, 580)
    >>> sorted(path.name for path in Path("first_run").iterdir())
    ['config.yml', 'metrics.csv', 'predictions.h5ad', 'slides.parquet', 'summary.json']
    """
    out = Path(out)
    device = config.device or default_device()
    processes = Processes(device)
    with lock_run_folder(config, out, processes) as work, Stage("reading the cohort", reports=progress) as stage:
        options = {"device": device, "processes": processes, "stage": stage}
        return _run(config, work, **options, maps=maps, progress=progress)


def _run(
    config: RunConfig, work: Path, *, device: str, processes: Processes, stage: Stage, maps: bool, progress: bool
) -> dict:
    """Run in the locked folder, with the current step as text of `stage`."""
    start = time.perf_counter()
    cohort = open_cohort(
        config.cohort,
        slides=config.slides,
        patients=config.patients,
        min_genes=config.min_genes,
        max_mito=config.max_mito,
    )
    protocol = config.resolve_protocol()
    stage.text = "checking the folds"
    splits = protocol_folds(cohort, protocol, config.n_splits, config.seed)
    use = select_training_spots(cohort, config.train_share, config.seed)
    # Before any work, raise for folds that violate the protocol and for a teacher that does not match the data.
    LeakChecker(cohort, splits, protocol)
    source = FeatureSource(config, cohort, splits, use=use, scratch=work / "scratch", device=device, progress=progress)
    coverage = source.coverage()
    if processes.first:
        start_run_folder(config, work, "run")
    stage.text = ""
    source.prepare(left_out_sets(len(splits), inner=protocol.alpha == "inner"))
    if not processes.first:
        return {}

    result = evaluate(cohort, splits, source, protocol=protocol, n_genes=config.n_genes, train_mask=use)
    stage.text = "scores and files"
    write_file(work / "slides.parquet", result.moments.to_parquet(index=False))
    table = _make_table(config, protocol, splits, use, result.moments)
    write_metrics(table, work / "metrics.csv")
    source.save(work, source.outer())
    record = source.record(source.outer())
    if config.features in ("student", "frozen+student"):
        probes = {f"fold{i}": probe for i, probe in result.probes.items()}
        options = {"normalization": protocol.normalization, "fingerprint": record["backbone_fingerprint"]}
        save_probes(work / "probe.safetensors", probes, **options)
    predictions = join_predictions(cohort, result.predicted)
    write_h5ad(predictions, work / "predictions.h5ad")
    if maps:
        draw_maps(cohort, predictions, table, work / "maps")
    patients = result.moments.loc[result.moments["normalization"] == protocol.normalization, "patient"]
    scores = {
        m: {how: bootstrap_interval(moments, how=how, seed=config.seed) for how in ("pooled", "slides")}
        for m, moments in result.moments.groupby("normalization", sort=False)
    }
    score, undefined = scores[protocol.normalization]["pooled"], table[table["pcc"].isna()]
    summary = {
        "mean_pcc": score["pcc"],
        "ci_low": score["ci_low"],
        "ci_high": score["ci_high"],
        "mean_pcc_per_fold": score["per_fold"],
        "n_nan": len(undefined),
        "nan_genes": sorted(set(undefined["gene"].astype(str))),
        "protocol": protocol.name,
        "method": config.method,
        "features": config.features,
        "shuffled": config.shuffle_teacher,
        "backbone": config.backbone,
        "cohort": config.cohort,
        "split": protocol.split,
        "normalization": protocol.normalization,
        "scores": scores,
        "unit": score["unit"],
        "one_patient": patients.nunique() == 1 and patients.iloc[0] != "unknown",
        "ceiling": _compute_ceiling(cohort, result, splits),
        "alphas": result.alphas[protocol.normalization],
        "epochs": config.epochs if source.trains_student else None,
        "teacher": None if source.teacher is None else repr(source.teacher),
        "teacher_fingerprint": getattr(source.teacher, "fingerprint", None),
        "teacher_coverage": coverage,
        **record,
        "n_folds": len(splits),
        "n_spots": len(cohort),
        "slides": [s.id for s in cohort.slides],
        "synthetic": any(bool(s.metadata.get("synthetic")) for s in cohort.slides),
        "pca_components": result.n_components,
        "data_fingerprint": source.data,
        "seconds": round(time.perf_counter() - start, 1),
        **record_environment(device),
    }
    write_file(work / "summary.json", json.dumps(summary, indent=1).encode())
    shutil.rmtree(work / "scratch", ignore_errors=True)
    return summary


def load_run(out: str | os.PathLike) -> tuple[RunConfig, pd.DataFrame, dict, ad.AnnData]:
    """Read the config, result table, summary and predictions of a finished run.

    Examples
    --------
    >>> import peka_lite as pk
    >>> small = {"slides": ["MINI3"], "split": "spot", "n_splits": 2, "n_genes": 10}
    >>> _ = pk.load_or_run(pk.RunConfig(features="depth", method="none", **small), "depth", maps=False)
    >>> config, table, summary, predictions = pk.load_run("depth")
    >>> table[["fold", "gene", "pcc", "n_train", "n_test"]].head(3).round(2)
       fold    gene   pcc  n_train  n_test
    0     0   ADH1B  0.04       78      78
    1     0  ELAVL1 -0.13       78      78
    2     0   MUC16 -0.01       78      78
    >>> predictions.n_obs, list(predictions.layers)
    (156, ['measured'])
    """
    out = Path(out)
    if not (out / "summary.json").is_file():
        raise FileNotFoundError(explain_missing(out, needs=("config.yml", "summary.json"), kind="run"))
    config, summary = read_run(out)
    config = RunConfig(**config.as_dict())
    predictions = read_anndata(file_inside(out, "predictions.h5ad"), layers=("measured",))
    return config, read_metrics(out / "metrics.csv"), summary, predictions


def run_name(config: RunConfig) -> str:
    """Return a readable folder name, different for any two configs.

    Examples
    --------
    >>> import peka_lite as pk
    >>> pk.experiments.run_name(pk.RunConfig(cohort="mini", method="none"))[:26]
    'mini_mini_none_patient_s0_'
    """
    settings = hashlib.sha256(json.dumps(config.as_dict(), sort_keys=True).encode()).hexdigest()[:8]
    parts = (Path(config.cohort).name, config.backbone, config.method, config.split, f"s{config.seed}", settings)
    return "_".join(parts)


def load_or_run(config: RunConfig, out: str | os.PathLike, *, maps: bool = True, progress: bool = False):
    """Return `load_run` of `out`, after running the experiment if `out` does not exist.

    Raises FileExistsError if `out` was run with other settings, or if its teacher or packaged weights have changed.

    Examples
    --------
    >>> import peka_lite as pk
    >>> small = {"slides": ["MINI3"], "split": "spot", "n_splits": 2, "n_genes": 10}
    >>> config = pk.RunConfig(features="depth", method="none", **small)
    >>> config, table, summary, predictions = pk.load_or_run(config, "depth", maps=False)
    >>> pk.load_or_run(config, "depth")[1].equals(table)  # read, not run again
    True
    >>> pk.load_or_run(pk.RunConfig(features="coordinates", method="none", **small), "depth")
    Traceback (most recent call last):
    FileExistsError: depth holds a run with other settings; name another folder or remove it
    """
    out = Path(out)
    if not (out / "summary.json").is_file():
        try:
            run(config, out, maps=maps, progress=progress)
        except FileExistsError:  # another process may have just finished it
            if not (out / "summary.json").is_file():
                raise
    loaded = load_run(out)
    if loaded[0] != config:
        raise FileExistsError(f"{out} holds a run with other settings; name another folder or remove it")
    fingerprint = loaded[2].get("teacher_fingerprint")
    if fingerprint is not None and config.load_teacher().fingerprint != fingerprint:
        raise FileExistsError(f"{out} holds a run with another teacher under the same name; remove it to run again")
    file = find_packaged(BACKBONES[config.backbone]) if config.weights == "hub" else None
    if file is not None and (used := loaded[2].get("weights")) not in (None, describe_file(file)):
        raise FileExistsError(
            f"{out} holds a run with weights {used!r}, now {describe_file(file)!r}; remove it to run again"
        )
    return loaded


def _make_table(config, protocol, splits, use, moments: pd.DataFrame) -> pd.DataFrame:
    """Return the result table for the protocol's normalization."""
    table = pool_pcc(moments[moments["normalization"] == protocol.normalization])
    sizes = {i: (int(use[train].sum()), len(test)) for i, (train, test) in enumerate(splits)}
    names = {"method": config.method, "backbone": config.backbone, "split": protocol.split}
    names |= {"protocol": protocol.name, "features": config.features, "normalization": protocol.normalization}
    table = table.drop(columns="normalization")
    for k, (name, value) in enumerate(names.items()):
        table.insert(k, name, value)
    return table.assign(
        n_train=table["fold"].map(lambda i: sizes[i][0]), n_test=table["fold"].map(lambda i: sizes[i][1])
    )


def _compute_ceiling(cohort: Cohort, result, splits) -> dict:
    """Return the mean over folds and genes of the PCC that counting noise permits on the test rows."""
    ceilings = {}
    for m in NORMALIZATIONS:
        means, basis = [], None
        for i, (_, test) in enumerate(splits):
            values, basis = expression_ceiling(cohort.adata[test], result.predicted[i][1], method=m)
            means.append(float(values.mean()))
        ceilings[m] = {"pcc": float(np.nanmean(means)), "basis": basis}
    return ceilings
