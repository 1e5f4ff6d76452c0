"""Write folders of finished runs with random predictions, without running anything."""

import json

import numpy as np
import pandas as pd
import yaml

from peka_lite.evaluation.scores import bootstrap_interval, pool_scores, slide_moments

GENES = ("G1", "G2", "G3")
SLIDES = ("S1", "S2", "S3")
PROTOCOL_SETTINGS = {
    "paper": {"split": "spot", "normalization": "log1p-cp10k", "alpha": 1.0},
    "hest": {"split": "patient", "normalization": "log1p", "alpha": "hest"},
    "strict": {"split": "patient", "normalization": "log1p-cp10k", "alpha": "inner"},
    "custom": {"split": "slide", "normalization": "log1p-cp10k", "alpha": 7.0},
}


def complete_summary(**fields):
    """Return all fields of a run's ``summary.json``, made up, with the given ones in their place."""
    score = {"pcc": 0.25, "ci_low": 0.1, "ci_high": 0.4, "per_fold": [0.2, 0.3], "unit": "patient", "n_units": 2}
    targets = ("log1p-cp10k", "log1p")
    return {
        "protocol": "custom", "method": "bone", "features": "student", "shuffled": False, "backbone": "mini",
        "cohort": "mini", "split": "patient", "normalization": "log1p-cp10k", "mean_pcc": 0.25, "ci_low": 0.1,
        "ci_high": 0.4, "mean_pcc_per_fold": [0.2, 0.3], "n_nan": 0, "nan_genes": [],
        "scores": {m: {"pooled": score, "slides": score} for m in targets},
        "other_scores": {m: {"r2": 0.1, "rmse": 0.9, "spearman": 0.2} for m in targets},
        "ceiling": {m: {"pcc": 0.8, "basis": "known"} for m in targets}, "unit": "patient", "one_patient": False,
        "alphas": ["hest", "hest"], "n_folds": 2, "learned_from": "recorded by each fit", "epochs": 5,
        "teacher": "PCATeacher()", "teacher_fingerprint": None, "teacher_coverage": None, "weights": "random, seed 0",
        "backbone_fingerprint": "f" * 16, "adapted_share": 0.05, "n_labels_per_fold": [3, 3], "n_spots": 183,
        "slides": ["S1", "S2"], "synthetic": True, "pca_components": 8, "data_fingerprint": "d" * 16, "seconds": 1.5,
        "device": "cpu", "versions": {"torch": "2.6.0"},
    } | fields  # fmt: skip


def training_summary(**fields):
    """Return all fields of a training's ``summary.json``, which has no scores."""
    scored = {"ci_low", "ci_high", "mean_pcc_per_fold", "n_nan", "nan_genes", "scores", "other_scores", "ceiling"}
    scored |= {"unit", "one_patient", "alphas", "n_folds", "learned_from"}
    summary = {name: value for name, value in complete_summary().items() if name not in scored}
    trained = {"split": None, "mean_pcc": None, "fold": None, "held_out": [], "alpha": "hest", "n_train": 183}
    return summary | trained | fields


def draw_fold(target, fold, *, noise, seed=0, n=12):
    """Draw measured and predicted values of a fold, (n, genes); measured ones depend on fold, target and seed only."""
    measured = np.random.default_rng([fold, target == "log1p", seed]).normal(size=(n, len(GENES)))
    return measured, measured + noise * np.random.default_rng([fold, int(100 * noise)]).normal(size=measured.shape)


def write_run_folder(
    folder,
    *,
    protocol="strict",
    method="none",
    features="student",
    noise=1.0,
    data="d0",
    one_patient=False,
    ceiling=0.8,
    **settings,
):
    """Write one finished run folder of three slides, each held out in one fold."""
    config = {"cohort": "mini", "slides": None, "protocol": None if protocol == "custom" else protocol}
    config |= {"features": features, "method": method, "backbone": "mini", "weights": "random", "teacher": "pca"}
    config |= {"epochs": 5, "lr": 1e-4, "seed": 0, "n_splits": 3, "n_genes": 3, "train_share": 1.0, "device": None}
    config |= {"shuffle_teacher": False} | PROTOCOL_SETTINGS[protocol] | settings
    frames = []
    for target in ("log1p-cp10k", "log1p"):
        for fold, slide in enumerate(SLIDES):
            names = [slide] * 12 if config["split"] != "spot" else (list(SLIDES) * 12)[:12]
            patients = ["P"] * 12 if one_patient else [f"patient of {s}" for s in names]
            Y, P = draw_fold(target, fold, noise=noise, seed=config["seed"])
            moments = slide_moments(Y, P, slides=names, patients=patients, genes=GENES)
            frames.append(moments.assign(normalization=target, fold=fold % config["n_splits"]))
    moments = pd.concat(frames, ignore_index=True)
    scores = {
        m: {how: bootstrap_interval(part, how=how, n_boot=50) for how in ("pooled", "slides")}
        for m, part in moments.groupby("normalization")
    }
    summary = complete_summary(n_folds=config["n_splits"])
    summary |= {k: config[k] for k in ("method", "features", "backbone", "cohort", "split", "normalization")}
    summary |= {"protocol": protocol, "shuffled": config["shuffle_teacher"], "scores": scores, "slides": SLIDES}
    summary |= {"unit": "slide" if one_patient else "patient", "one_patient": one_patient, "synthetic": True}
    summary |= {"ceiling": {m: {"pcc": ceiling, "basis": "known"} for m in scores}, "data_fingerprint": data}
    folder.mkdir(parents=True)
    (folder / "config.yml").write_text(yaml.safe_dump(config))
    (folder / "summary.json").write_text(json.dumps(summary))
    table = pool_scores(moments[moments["normalization"] == config["normalization"]])
    labels = ("method", "backbone", "split", "protocol", "features")
    table = table.assign(**{name: summary[name] for name in labels}, spearman=0.5, n_train=24, n_test=12)
    table.to_csv(folder / "metrics.csv", index=False)
    moments.to_parquet(folder / "slides.parquet", index=False)
    return folder


def write_sweep_file(folder, points, *, title="A sweep", notebook=None, log=None):
    """Write ``sweep.yml`` of a sweep folder, and its log: `log` is point -> record."""
    (folder / "log").mkdir(parents=True, exist_ok=True)
    varied = list(dict.fromkeys(name for settings in points.values() for name in settings))
    record = {"title": title, "notebook": notebook, "varied": varied, "points": points}
    (folder / "sweep.yml").write_text(yaml.safe_dump(record, sort_keys=False))
    for point, attempt in (log or {}).items():
        (folder / "log" / f"{point}.json").write_text(json.dumps(attempt))
    return folder
