"""One experiment, from a cohort to a table of Pearson correlations, a summary, adapters and maps."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shutil
import time
import warnings
from importlib.metadata import version
from pathlib import Path

import anndata as ad
import pandas as pd
import yaml

from peka_lite import __version__
from peka_lite.adapters import adapt, adapted_share, adapter_state, merge
from peka_lite.backbones import embed_tiles, load_backbone
from peka_lite.cohorts import open_cohort
from peka_lite.config import RunConfig
from peka_lite.devices import default_device
from peka_lite.expression import targets, top_hvg
from peka_lite.hest import Cohort
from peka_lite.probe import PCARidge, fold_table, summarize
from peka_lite.results import draw_maps, fingerprint, held_out_predictions
from peka_lite.splits import folds
from peka_lite.teachers import embed_cohort
from peka_lite.transfer import TransferModel, fit


def run(config: RunConfig, out: str | os.PathLike, *, progress: bool = False) -> dict:
    """Run one experiment and write its folder.

    Inside each fold everything that learns (highly variable genes, teacher, clusters, student, probe) sees training
    rows only.

    Parameters
    ----------
    config
        What to run.
    out
        Folder to make. It appears when the run is complete: ``config.yml``, ``metrics.csv`` (tidy: method, backbone,
        split, fold, gene, pcc, n_train, n_test), ``summary.json``, ``predictions.h5ad`` (held-out predictions, NaN
        where a gene was not among a fold's targets; layer ``measured``), ``training.csv`` and
        ``adapter.safetensors`` (one set of tensors a fold) unless the method is ``"none"``, ``maps/*.png``. Until
        then the work is in ``{out}.partial``; running the same again after an interruption goes on from there.

    Returns
    -------
    dict
        The summary.

    Raises
    ------
    FileExistsError
        If `out` is there already, or ``{out}.partial`` holds a run with other settings.
    """
    begun, out = time.perf_counter(), Path(out)
    work = out.with_name(out.name + ".partial")
    scratch = work / "scratch"  # tiles and checkpoints; not part of the result
    _claim(config, out, work)
    cohort = open_cohort(
        config.cohort,
        slides=config.slides,
        patients=config.patients,
        min_genes=config.min_genes,
        max_mito=config.max_mito,
    )
    splits = folds(cohort, config.split, config.n_splits, config.seed)
    device = config.device or default_device()
    # Before any work: a teacher that does not fit the data is refused at once.
    teacher = config.load_teacher() if config.method != "none" else None
    coverage = _coverage(teacher, cohort)
    work.mkdir(parents=True, exist_ok=True)
    (work / "config.yml").write_text(yaml.safe_dump(config.as_dict(), sort_keys=False))

    tiles = cohort.tiles.to_memmap(scratch / "tiles.npy")
    origin, frozen = None, None
    if config.method == "none":
        student = _student(config)
        origin, frozen = student.weights_origin, embed_tiles(student, tiles, device=device, progress=progress)
    tables, histories, adapters, predicted, share, n_labels = [], [], {}, {}, 0.0, []
    for fold, (train, test) in enumerate(splits):
        genes = top_hvg(cohort.adata, n=config.n_genes, rows=train, method=config.normalization)
        Y = targets(cohort.adata, genes, method=config.normalization)
        features = frozen
        if frozen is None:
            student, history = _teach(config, teacher, cohort, tiles, train, fold, scratch, device, progress)
            histories.append(history.assign(fold=fold))
            adapters |= {f"fold{fold}.{k}": v for k, v in adapter_state(student).items()}
            origin, share = student.weights_origin, adapted_share(student)
            n_labels.append(int(history.attrs["n_labels"]))
            features = embed_tiles(merge(student), tiles, device=device, progress=progress)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*training rows of.*components")  # told in summary.json
            probe = PCARidge(alpha=config.alpha, fit_intercept=True).fit(features[train], Y[train])
        P = probe.predict(features[test])
        tables.append(fold_table(fold, genes, Y[test], P, n_train=len(train)))
        predicted[fold] = (test, genes, Y[test], P)

    table = pd.concat(tables, ignore_index=True)
    table.insert(0, "method", config.method)
    table.insert(1, "backbone", config.backbone)
    table.insert(2, "split", config.split)
    table.to_csv(work / "metrics.csv", index=False)
    if histories:
        from safetensors.torch import save_file

        pd.concat(histories, ignore_index=True).to_csv(work / "training.csv", index=False)
        meta = {"method": config.method, "backbone": config.backbone, "weights": origin, "r": str(config.block_size)}
        save_file(adapters, work / "adapter.safetensors", metadata=meta)
    predictions = held_out_predictions(cohort, predicted)
    predictions.write_h5ad(work / "predictions.h5ad")
    draw_maps(cohort, predictions, table, work / "maps")
    summary = summarize(table) | {
        "method": config.method,
        "backbone": config.backbone,
        "weights": origin,
        "teacher": None if teacher is None else repr(teacher),
        "teacher_fingerprint": getattr(teacher, "fingerprint", None),
        "teacher_coverage": coverage,
        "split": config.split,
        "n_folds": len(splits),
        "n_spots": len(cohort),
        "slides": [s.id for s in cohort.slides],
        "synthetic": any(bool(s.metadata.get("synthetic")) for s in cohort.slides),
        "adapted_share": share,
        "n_labels_per_fold": n_labels,
        "pca_components": int(probe.n_components_),
        "data_fingerprint": fingerprint(cohort),
        "device": _device_name(device),
        "seconds": round(time.perf_counter() - begun, 1),
        "versions": {"peka_lite": __version__, "python": platform.python_version()}
        | {p: version(p) for p in ("torch", "timm", "peft", "scanpy", "anndata", "scikit-learn", "numpy")},
    }
    (work / "summary.json").write_text(json.dumps(summary, indent=1))
    shutil.rmtree(scratch)
    os.replace(work, out)
    return summary


def load_run(out: str | os.PathLike) -> tuple[RunConfig, pd.DataFrame, dict, ad.AnnData]:
    """Read a finished run's config, result table, summary and predictions."""
    out = Path(out)
    if not (out / "summary.json").is_file():
        raise FileNotFoundError(f"{out}: no finished run here (summary.json is missing)")
    config = RunConfig(**yaml.safe_load((out / "config.yml").read_text()))
    summary = json.loads((out / "summary.json").read_text())
    return config, pd.read_csv(out / "metrics.csv"), summary, ad.read_h5ad(out / "predictions.h5ad")


def run_name(config: RunConfig) -> str:
    """Return a folder name that is readable and differs whenever any setting does.

    Examples
    --------
    >>> run_name(RunConfig(cohort="mini", weights="random", method="none"))[:26]
    'mini_mini_none_patient_s0_'
    """
    settings = hashlib.sha256(json.dumps(config.as_dict(), sort_keys=True).encode()).hexdigest()[:8]
    parts = (Path(config.cohort).name, config.backbone, config.method, config.split, f"s{config.seed}", settings)
    return "_".join(parts)


def load_or_run(config: RunConfig, out: str | os.PathLike, *, progress: bool = False):
    """Return `load_run` of `out`, running the experiment first where it is not there; other settings are an error."""
    out = Path(out)
    if not (out / "summary.json").is_file():
        run(config, out, progress=progress)
    loaded = load_run(out)
    if loaded[0] != config:
        raise FileExistsError(f"{out} holds a run with other settings; name another folder or remove it")
    made_by = loaded[2].get("teacher_fingerprint")
    if made_by is not None and config.load_teacher().fingerprint != made_by:
        raise FileExistsError(f"{out} holds a run with another teacher under the same name; remove it to run anew")
    return loaded


def _claim(config: RunConfig, out: Path, work: Path) -> None:
    if out.exists():
        raise FileExistsError(f"{out} is there already; name another folder or remove it")
    left = work / "config.yml"
    if left.is_file() and yaml.safe_load(left.read_text()) != config.as_dict():
        raise FileExistsError(f"{work} holds an unfinished run with other settings; remove it, or finish that one")


def _student(config: RunConfig):
    return load_backbone(config.backbone, weights=config.weights, seed=config.seed)


def _teach(config, teacher, cohort, tiles, train, fold, scratch, device, progress):
    """One fold's student: teacher, clusters and transfer, all on the training rows."""
    teacher.fit(cohort.by_slide(train))
    E = embed_cohort(teacher, cohort, device=device, progress=progress)[train]  # (n_train, D_t)
    labeler = config.labeler().fit(E)
    steps = config.epochs * -(-len(train) // config.batch_size)
    student = adapt(_student(config), config.method, r=config.block_size, total_steps=steps, seed=config.seed)
    model = TransferModel(
        student, teacher_dim=E.shape[1], n_classes=labeler.n_labels_, kd_space=config.kd_space, seed=config.seed
    )
    wanted = {k: getattr(config, k) for k in ("epochs", "batch_size", "lr", "tau", "kd_weight", "ce_weight", "seed")}
    history = fit(
        model,
        tiles.select(train),
        E,
        labeler.labels_,
        **wanted,
        device=device,
        checkpoint=scratch / f"fold{fold}.pt",
        resume=True,
        progress=progress,
    )
    history.attrs["n_labels"] = labeler.n_labels_
    return student, history


def _coverage(teacher, cohort: Cohort) -> float | None:
    """Share of expressed genes that a pretrained teacher knows, on the slide where it knows the fewest."""
    return min(teacher.coverage(s.adata) for s in cohort.slides) if hasattr(teacher, "coverage") else None


def _device_name(device: str) -> str:
    import torch

    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device} ({platform.machine()}, {torch.get_num_threads()} threads)"
