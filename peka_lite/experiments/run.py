"""Run or train one experiment: cohort, folds, features, probe, scores, and the folder they are written to."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd

from peka_lite._core._processes import Processes
from peka_lite._core.cache import cached
from peka_lite._core.device import default_device
from peka_lite._core.io import write_file, write_h5ad
from peka_lite._core.progress import logger, stage, steps
from peka_lite.backbones._packaged import describe_file, find_packaged
from peka_lite.data.cohorts import open_cohort
from peka_lite.data.expression import expression_targets, top_hvg
from peka_lite.data.features import describe_features, read_features
from peka_lite.data.hest import Cohort
from peka_lite.evaluation.ceiling import expression_ceiling
from peka_lite.evaluation.evaluate import Evaluation, choose_alpha, evaluate, left_out_sets
from peka_lite.evaluation.folds import protocol_folds
from peka_lite.evaluation.leaks import LeakChecker, training_rows
from peka_lite.evaluation.protocols import Protocol
from peka_lite.evaluation.scores import bootstrap_interval, mean_scores
from peka_lite.experiments.config import RunConfig
from peka_lite.experiments.features import Features, select_training_spots
from peka_lite.experiments.folder import RunFolder, write_metrics, write_summary
from peka_lite.experiments.settings import split_features
from peka_lite.maps.draw import draw_maps
from peka_lite.probe.files import save_probes
from peka_lite.probe.moments import gather
from peka_lite.probe.pca_ridge import PCARidge


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
        protocol, features, normalization, fold, gene, pcc, r2, rmse, spearman, n_train, n_test; for the protocol's
        normalization, pooled over the fold's test spots), ``slides.parquet`` (`slide_moments` for both normalizations,
        from which all scores are computed), ``summary.json``, ``predictions.h5ad`` (held-out predictions, NaN where a
        gene was not among a fold's targets; layer ``measured``), ``maps/*.png``, ``backbone.yml`` for a custom
        backbone, and for an adapted student ``training.csv`` and ``adapter.safetensors`` (one set of tensors per fold,
        or one for all folds). With features ``"student"`` or ``"frozen+student"`` there is also ``probe.safetensors``
        (one probe per fold), and `load_trained` reads the folder. `RunFolder` reads every file of it. An incomplete run
        is in ``{out}.partial``. Students are cached, so an interrupted run resumes when it is started again.
    maps
        Draw the maps, the slowest part of a run with cached students.
    progress
        Show bars in a terminal or a notebook. The plan, and elsewhere a line every half minute, go to the logger
        ``peka_lite``.

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
    with _start(config, out, command="run", progress=progress) as this:
        left_out = left_out_sets(len(this.folds), inner=this.protocol.alpha == "inner")
        for rows in steps("training", this.plan(left_out)):
            cached(**this.features.entry(rows))  # train the student, unless another job has just done so
        if not this.processes.first:
            return {}
        this.features.end_training()

        result = evaluate(
            this.cohort, this.folds, this.X, protocol=this.protocol, n_genes=config.n_genes,
            train_mask=this.train_mask,
        )  # fmt: skip
        table = _make_table(this, result)
        predictions = join_predictions(this.cohort, result.predicted)
        write_file(this.work / "slides.parquet", result.moments.to_parquet(index=False))
        write_metrics(table, this.work / "metrics.csv")
        write_h5ad(predictions, this.work / "predictions.h5ad")
        record = this.features.save_students(this.outer_students(), this.work)
        if config.feature_kind == "file":
            record["weights"] = describe_features(split_features(config.features)[0])
        if config.features in ("student", "frozen+student"):
            _save_probes(this, {f"fold{i}": probe for i, probe in result.probes.items()}, record)
        if maps:
            draw_maps(this.cohort, predictions, table, this.work / "maps")
        return write_summary(this.describe(record) | _summarize_scores(this, result, table), this.work)


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
        As for `run`.

    Returns
    -------
    dict
        The summary; empty in all but the first process of an ``accelerate launch``.

    Raises
    ------
    FileExistsError
        As `run`.
    ValueError
        For features without a student, and a fold that does not exist.

    Examples
    --------
    >>> import peka_lite as pk
    >>> config = pk.RunConfig(method="none", slides=["MINI1", "MINI3", "MINI5"], n_splits=3, n_genes=10)
    >>> summary = pk.train(config, "student", fold=0)
    >>> summary["held_out"], summary["n_train"], summary["n_spots"]
    (['MINI5'], 346, 580)
    >>> pk.load_trained("student").name
    'fold0'
    """
    if config.features not in ("student", "frozen+student"):
        raise ValueError(f"features {config.features!r} have no student to train: use 'student' or 'frozen+student'")
    command = "train" if fold is None else f"train --fold {fold}"
    with _start(config, out, command=command, progress=progress) as this:
        if fold is not None and not 0 <= fold < len(this.folds):
            raise ValueError(f"fold {fold} does not exist; this cohort has folds 0 to {len(this.folds) - 1}")
        left_out, inner = () if fold is None else (fold,), this.protocol.alpha == "inner"
        pairs = [tuple(sorted((*left_out, j))) for j in range(len(this.folds)) if inner and j not in left_out]
        for rows in steps("training", this.plan([left_out, *pairs])):
            cached(**this.features.entry(rows))
        if not this.processes.first:
            return {}
        this.features.end_training()

        rows = this.rows(left_out)
        genes = top_hvg(
            this.cohort.adata, n=config.n_genes, rows=None if this.protocol.genes == "all" else rows,
            method=this.protocol.normalization,
        )  # fmt: skip
        Y = expression_targets(this.cohort.adata, genes, method=this.protocol.normalization)
        alpha = this.protocol.alpha
        if inner:
            alpha = choose_alpha(left_out, this.X, this.checker, Y=Y)
        in_training = np.isin(np.arange(len(this.cohort)), rows)
        moments = gather(this.X(rows).values, Y, np.where(in_training, 0, -1)).over([0])
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*training rows of.*components")  # reported in summary.json
            probe = PCARidge(256, alpha, standardize=this.protocol.standardize, fit_intercept=True).fit_sums(moments)
        name = "all" if fold is None else f"fold{fold}"
        record = this.features.save_students({name: rows}, this.work)
        _save_probes(this, {name: (probe, list(genes))}, record)
        seen = set(this.cohort.obs["slide"].to_numpy()[this.features.student_rows(rows)].astype(str))
        details = {
            "split": None if fold is None else this.protocol.split, "mean_pcc": None, "fold": fold, "alpha": alpha,
            "held_out": sorted({s.id for s in this.cohort.slides} - seen), "n_train": len(rows),
            "pca_components": int(probe.n_components_),
        }  # fmt: skip
        return write_summary(this.describe(record) | details, this.work)


@dataclasses.dataclass
class _Experiment:
    """What `run` and `train` share: an opened cohort with its folds and features, and a locked work folder."""

    config: RunConfig
    work: Path
    cohort: Cohort
    folds: list[tuple[np.ndarray, np.ndarray]]
    protocol: Protocol
    train_mask: np.ndarray
    checker: LeakChecker | None
    features: Features
    X: object  # input of `evaluate`: the method `Features.for_fold`, or an array read from a file
    processes: Processes
    coverage: float | None
    start: float

    def rows(self, left_out: tuple[int, ...]) -> np.ndarray:
        return training_rows(self.folds, left_out, self.train_mask)

    def outer_students(self) -> dict[str, np.ndarray]:
        """Return the name of each student that `load_trained` may load, and its training rows."""
        if self.protocol.student == "all":
            return {"all": self.rows(())}
        return {f"fold{i}": self.rows((i,)) for i in range(len(self.folds))}

    def plan(self, left_out: list[tuple[int, ...]]) -> list[np.ndarray | None]:
        """Log the amount of work, and return the rows of each student to train (None: the frozen one)."""
        sets = [self.rows(folds) for folds in left_out]
        missing = self.features.missing(sets)
        logger.info(f"plan: {self.features.describe_work(sets, missing)}")
        return missing

    def describe(self, record: dict) -> dict:
        """Return the part of the summary that does not depend on scores."""
        config, cohort, teacher = self.config, self.cohort, self.features.teacher
        return {
            "protocol": self.protocol.name, "method": config.method, "features": config.feature_kind,
            "shuffled": config.shuffle_teacher, "backbone": config.spec.name, "cohort": config.cohort,
            "normalization": self.protocol.normalization, "epochs": config.epochs if config.method != "none" else None,
            "teacher": None if teacher is None else repr(teacher),
            "teacher_fingerprint": getattr(teacher, "fingerprint", None), "teacher_coverage": self.coverage, **record,
            "n_spots": len(cohort), "slides": [s.id for s in cohort.slides],
            "synthetic": any(bool(s.metadata.get("synthetic")) for s in cohort.slides),
            "data_fingerprint": self.features.data, "seconds": round(time.perf_counter() - self.start, 1),
            **record_environment(self.features.device),
        }  # fmt: skip


@contextlib.contextmanager
def _start(config: RunConfig, out: str | os.PathLike, *, command: str, progress: bool) -> Iterator[_Experiment]:
    """Check the settings, lock the folder, and open the cohort; the folder gets its name at the end."""
    config.check()
    device, start = config.device or default_device(), time.perf_counter()
    processes = Processes(device)
    with RunFolder.create(Path(out), config, command=command, processes=processes) as work:
        with stage("reading the cohort"):
            cohort = open_cohort(
                config.cohort, slides=config.slides, patients=config.patients, min_genes=config.min_genes,
                max_mito=config.max_mito,
            )  # fmt: skip
        X = None
        if config.feature_kind == "file":
            path, key = split_features(config.features)
            cohort, X = read_features(path, cohort, key=key)  # without spots outside all tiles
        protocol, splits, checker = config.resolve_protocol(), [], None
        train_mask = select_training_spots(cohort, config.train_share, config.seed)
        if command != "train" or protocol.alpha == "inner":
            splits = protocol_folds(cohort, protocol, config.n_splits, config.seed)
            with stage("checking the folds"):  # before any work
                checker = LeakChecker(cohort, splits, protocol, train_mask=train_mask)
        features = Features(
            config, cohort, train_mask=train_mask, scratch=work / "scratch", device=device, processes=processes,
            progress=progress,
        )  # fmt: skip
        coverage = features.coverage()  # raises for a teacher that does not match the data
        yield _Experiment(
            config, work, cohort, splits, protocol, train_mask, checker, features,
            features.for_fold if X is None else X, processes, coverage, start,
        )  # fmt: skip


def load_run(out: str | os.PathLike) -> tuple[RunConfig, pd.DataFrame, dict, ad.AnnData]:
    """Read the config, result table, summary and predictions of a finished run, made on any machine.

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
    folder = RunFolder.open(out, kind="run")
    return folder.config, folder.metrics(), folder.summary, folder.predictions()


def run_name(config: RunConfig) -> str:
    """Return a readable folder name, different for any two configs.

    Examples
    --------
    >>> import peka_lite as pk
    >>> pk.experiments.run_name(pk.RunConfig(cohort="mini", method="none"))[:26]
    'mini_mini_none_patient_s0_'
    """
    settings = hashlib.sha256(json.dumps(config.as_dict(), sort_keys=True).encode()).hexdigest()[:8]
    backbone = Path(config.backbone).stem
    parts = (Path(config.cohort).name, backbone, config.method, config.split, f"s{config.seed}", settings)
    return "_".join(parts)


def load_or_run(config: RunConfig, out: str | os.PathLike, *, maps: bool = True, progress: bool = False):
    """Return `load_run` of `out`, after running the experiment if `out` does not exist.

    Raises FileExistsError if `out` was run with other settings, or if its teacher, packaged weights or file of features
    have changed.

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
    if not RunFolder.is_finished(Path(out)):
        try:
            run(config, out, maps=maps, progress=progress)
        except FileExistsError:  # another process may have just finished it
            if not RunFolder.is_finished(Path(out)):
                raise
    loaded = load_run(out)
    if loaded[0] != config.with_backbone_name():
        raise FileExistsError(f"{out} holds a run with other settings; name another folder or remove it")
    file = config.feature_kind == "file"
    if file and (current := describe_features(split_features(config.features)[0])) != loaded[2]["weights"]:
        raise FileExistsError(f"{out} holds a run of {loaded[2]['weights']}, now {current}; remove it to run again")
    fingerprint = loaded[2]["teacher_fingerprint"]
    if fingerprint is not None and config.load_teacher().fingerprint != fingerprint:
        raise FileExistsError(f"{out} holds a run with another teacher under the same name; remove it to run again")
    packaged = find_packaged(config.spec) if config.weights == "hub" and not file else None
    if packaged is not None and (used := loaded[2]["weights"]) not in (None, describe_file(packaged)):
        raise FileExistsError(
            f"{out} holds a run with weights {used!r}, now {describe_file(packaged)!r}; remove it to run again"
        )
    return loaded


def record_environment(device: str) -> dict:
    """Return the device and the package versions for a summary."""
    import platform
    from importlib.metadata import version

    import torch

    from peka_lite import __version__

    name = f"{device} ({platform.machine()}, {torch.get_num_threads()} threads)"
    if torch.device(device).type == "cuda":
        name = torch.cuda.get_device_name(device)
    packages = ("torch", "timm", "peft", "scanpy", "anndata", "scikit-learn", "numpy")
    versions = {"peka_lite": __version__, "python": platform.python_version()} | {p: version(p) for p in packages}
    return {"device": name, "versions": versions}


def join_predictions(cohort: Cohort, predicted: dict) -> ad.AnnData:
    """Join the folds' test predictions into one AnnData in the cohort's row order.

    `predicted` maps fold -> (test rows, genes, measured, predicted). ``X`` is the prediction (N, genes of any fold),
    float32, and ``layers["measured"]`` the measured values. Both are NaN where a gene was not among a fold's targets.
    """
    genes = sorted({g for _, names, _, _ in predicted.values() for g in names})
    column = {g: j for j, g in enumerate(genes)}
    P = np.full((len(cohort), len(genes)), np.nan, dtype=np.float32)
    Y, fold_of = P.copy(), np.full(len(cohort), -1)
    for fold, (test, names, measured, values) in predicted.items():
        index = np.ix_(test, [column[g] for g in names])
        P[index], Y[index], fold_of[test] = values, measured, fold
    obs = cohort.obs.astype({"slide": str, "barcode": str}).assign(fold=fold_of)
    obs["patient"] = obs["patient"].fillna("unknown").astype(str)
    obs.index = cohort.adata.obs_names
    spatial = np.concatenate([np.asarray(s.adata.obsm["spatial"], dtype=float)[:, :2] for s in cohort.slides])
    return ad.AnnData(P, obs=obs, var=pd.DataFrame(index=genes), layers={"measured": Y}, obsm={"spatial": spatial})


def _save_probes(this: _Experiment, probes: dict, record: dict) -> None:
    save_probes(
        this.work / "probe.safetensors", probes, normalization=this.protocol.normalization,
        fingerprint=record["backbone_fingerprint"],
    )  # fmt: skip


def _make_table(this: _Experiment, result: Evaluation) -> pd.DataFrame:
    """Return the result table for the protocol's normalization."""
    protocol, config = this.protocol, this.config
    scores = result.scores[result.scores["normalization"] == protocol.normalization].drop(columns="normalization")
    names = {
        "method": config.method, "backbone": config.spec.name, "split": protocol.split, "protocol": protocol.name,
        "features": config.feature_kind, "normalization": protocol.normalization,
    }  # fmt: skip
    for k, (name, value) in enumerate(names.items()):
        scores.insert(k, name, value)
    n_train = [len(this.rows((i,))) for i in range(len(this.folds))]
    n_test = [len(test) for _, test in this.folds]
    folds = scores["fold"].to_numpy()
    return scores.assign(n_train=np.take(n_train, folds), n_test=np.take(n_test, folds)).reset_index(drop=True)


def _summarize_scores(this: _Experiment, result: Evaluation, table: pd.DataFrame) -> dict:
    """Return the part of a run's summary that describes its scores, with 95% confidence intervals."""
    protocol, undefined = this.protocol, table[table["pcc"].isna()]
    patients = result.moments.loc[result.moments["normalization"] == protocol.normalization, "patient"]
    scores = {
        m: {how: bootstrap_interval(moments, how=how, seed=this.config.seed) for how in ("pooled", "slides")}
        for m, moments in result.moments.groupby("normalization", sort=False)
    }
    score = scores[protocol.normalization]["pooled"]
    return {
        "mean_pcc": score["pcc"], "ci_low": score["ci_low"], "ci_high": score["ci_high"],
        "mean_pcc_per_fold": score["per_fold"], "n_nan": len(undefined),
        "nan_genes": sorted(set(undefined["gene"].astype(str))), "split": protocol.split, "scores": scores,
        "other_scores": mean_scores(result.scores), "unit": score["unit"],
        "one_patient": patients.nunique() == 1 and patients.iloc[0] != "unknown",
        "ceiling": _compute_ceiling(this.cohort, result, this.folds),
        "alphas": result.alphas[protocol.normalization], "n_folds": len(this.folds),
        "learned_from": result.learned_from, "pca_components": result.n_components,
    }  # fmt: skip


def _compute_ceiling(cohort: Cohort, result: Evaluation, folds) -> dict:
    """Return the mean over folds and genes of the PCC that counting noise permits on the test rows."""
    ceilings = {}
    for m in result.alphas:
        means, basis = [], None
        for i, (_, test) in enumerate(folds):
            values, basis = expression_ceiling(cohort.adata[test], result.predicted[i][1], method=m)
            means.append(float(values.mean()))
        ceilings[m] = {"pcc": float(np.nanmean(means)), "basis": basis}
    return ceilings
