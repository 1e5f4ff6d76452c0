"""Folders of finished runs without the runs: made-up predictions, scored as a run scores its own."""

import json

import numpy as np
import pandas as pd
import yaml

from peka_lite.evaluation.scores import bootstrap_interval, slide_moments

GENES = ("G1", "G2", "G3")
SLIDES = ("S1", "S2", "S3")
SETS = {
    "paper": {"split": "spot", "normalization": "log1p-cp10k", "alpha": 1.0},
    "hest": {"split": "patient", "normalization": "log1p", "alpha": "hest"},
    "strict": {"split": "patient", "normalization": "log1p-cp10k", "alpha": "inner"},
    "custom": {"split": "slide", "normalization": "log1p-cp10k", "alpha": 7.0},
}


def held_out(target, fold, *, noise, seed=0, n=12):
    """Measured and predicted values of one fold, (n, genes): the measured ones are the same for every run of a seed."""
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
    config |= {"shuffle_teacher": False} | SETS[protocol] | settings
    frames = []
    for target in ("log1p-cp10k", "log1p"):
        for fold, slide in enumerate(SLIDES):
            names = [slide] * 12 if config["split"] != "spot" else (list(SLIDES) * 12)[:12]
            patients = ["P"] * 12 if one_patient else [f"patient of {s}" for s in names]
            Y, P = held_out(target, fold, noise=noise, seed=config["seed"])
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
    """Write ``sweep.yml`` of a sweep's folder, and records of attempts: `log` is point -> record."""
    (folder / "log").mkdir(parents=True, exist_ok=True)
    varied = list(dict.fromkeys(name for given in points.values() for name in given))
    told = {"title": title, "notebook": notebook, "varied": varied, "points": points}
    (folder / "sweep.yml").write_text(yaml.safe_dump(told, sort_keys=False))
    for point, record in (log or {}).items():
        (folder / "log" / f"{point}.json").write_text(json.dumps(record))
    return folder
