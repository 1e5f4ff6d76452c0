"""Write folders of finished runs with random predictions, without running anything."""

import json

import numpy as np
import pandas as pd
import yaml

from peka_lite.evaluation.scores import bootstrap_interval, slide_moments

GENES = ("G1", "G2", "G3")
SLIDES = ("S1", "S2", "S3")
PROTOCOL_SETTINGS = {
    "paper": {"split": "spot", "normalization": "log1p-cp10k", "alpha": 1.0},
    "hest": {"split": "patient", "normalization": "log1p", "alpha": "hest"},
    "strict": {"split": "patient", "normalization": "log1p-cp10k", "alpha": "inner"},
    "custom": {"split": "slide", "normalization": "log1p-cp10k", "alpha": 7.0},
}


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
    summary = {k: config[k] for k in ("method", "features", "backbone", "cohort", "split", "normalization")}
    summary |= {"protocol": protocol, "shuffled": config["shuffle_teacher"], "scores": scores, "slides": SLIDES}
    summary |= {"unit": "slide" if one_patient else "patient", "one_patient": one_patient, "synthetic": True}
    summary |= {"ceiling": {m: {"pcc": ceiling, "basis": "known"} for m in scores}, "data_fingerprint": data}
    folder.mkdir(parents=True)
    (folder / "config.yml").write_text(yaml.safe_dump(config))
    (folder / "summary.json").write_text(json.dumps(summary))
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
