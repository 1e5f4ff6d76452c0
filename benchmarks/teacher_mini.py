"""Evaluate teachers on the embedded cohort: how well they predict its domains, genes and mixtures.

Teachers: scfoundation-mini (`load_teacher`) with both poolings; the same network with random weights; PCA of the same
width, and with its default of 50 components. PCA is fitted on all spots of the cohort, and for the held-out scores on
each fold's training spots only; the other teachers are not fitted on the cohort.

- clusters: adjusted Rand index of KNN-Leiden clusters against ``obs["domain"]``, at the default resolution, and at the
  resolution whose number of clusters is nearest to 6, 9 and 12, so that scores do not depend on their number;
- held out by patient: mean PCC of the probe from embedding to the 50 most variable genes of the training rows, with
  the measured counts (`pcc`) and with the true rates (`pcc_rates`; counting noise, which the teacher sees and a tile
  does not show, only helps `pcc`); R2 of the domain mixture and of the hidden niches (`r2_mixture`, `r2_niche`, mean
  over columns). Ridge with alpha 100 on standardized features.

The row "true mixture" clusters the domain mixture itself, as an upper bound.

Cohort 0 with default options is that of the book; other seeds show the variation between cohorts.

    python benchmarks/teacher_mini.py --seeds 0 101 102 103
"""

from __future__ import annotations

import argparse
import platform
import tempfile
import time
import warnings
from datetime import date
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from _machine import cpu_name
from sklearn.metrics import adjusted_rand_score, r2_score

import peka_lite as pk
from peka_lite.data.expression import expression_targets, top_hvg
from peka_lite.data.mini.cohort import write_mini_cohort
from peka_lite.probe.metrics import pearson
from peka_lite.probe.pca_ridge import PCARidge
from peka_lite.teachers.load import embed_cohort, load_teacher
from peka_lite.teachers.pseudolabels import PseudoLabeler
from peka_lite.teachers.scfoundation import ScFoundation

RESOLUTIONS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.7, 1.0)
MATCHED = (6, 9, 12)
ALPHA = 100.0
PACKAGES = ("peka-lite", "torch", "scanpy", "leidenalg", "scikit-learn", "umap-learn")


def score_clusters(E: np.ndarray, domain: np.ndarray) -> dict[str, float]:
    """Return adjusted Rand indices, and the number of clusters at the default resolution."""
    labelers = {r: PseudoLabeler(resolution=r).fit(E) for r in RESOLUTIONS}
    scores = {"n_clusters": labelers[1.0].n_labels_, "ari": adjusted_rand_score(domain, labelers[1.0].labels_)}
    for n in MATCHED:
        nearest = min(labelers.values(), key=lambda labeler: abs(labeler.n_labels_ - n))
        scores[f"ari_{n}"] = adjusted_rand_score(domain, nearest.labels_)
        scores[f"n_{n}"] = nearest.n_labels_
    return scores


def score_folds(cohort, folds, embeddings: list[np.ndarray]) -> pd.DataFrame:
    """Return PCC of genes and R2 of the truth per fold; `embeddings` has (N, D_t) of each fold's teacher."""
    mixture, niche = (read_truth(cohort, name) for name in ("mixture", "niche"))
    rates = np.concatenate([slide.adata.layers["rate"] for slide in cohort.slides])  # (N, n_genes)
    rates = pd.DataFrame(np.log1p(1e4 * rates / rates.sum(1, keepdims=True)), columns=cohort.slides[0].adata.var_names)
    rows = []
    for (train, test), E in zip(folds, embeddings, strict=True):
        genes = top_hvg(cohort.adata, n=50, rows=train)
        Y = expression_targets(cohort.adata, genes)  # (N, 50)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a narrow embedding allows fewer than 256 components
            probes = [PCARidge(256, ALPHA, fit_intercept=True).fit(E[train], A[train]) for A in (Y, mixture, niche)]
        of_genes, of_mixture, of_niche = (probe.predict(E[test]) for probe in probes)
        rows.append(
            {
                "pcc": np.nanmean(pearson(Y[test], of_genes)),
                "pcc_rates": np.nanmean(pearson(rates[genes].to_numpy()[test], of_genes)),
                "r2_mixture": r2_score(mixture[test], of_mixture),
                "r2_niche": r2_score(niche[test], of_niche),
            }
        )
    return pd.DataFrame(rows)


def read_truth(cohort, name: str) -> np.ndarray:
    """Return ``obsm["mixture"]`` or ``["niche"]`` of all spots."""
    return np.concatenate([slide.adata.obsm[name].to_numpy() for slide in cohort.slides])


def list_teachers(width: int, genes) -> dict:
    """Return name -> (function that builds the teacher, options of `embed`)."""
    mini = load_teacher("scfoundation-mini")
    c = mini.encoder.config
    size = {"hidden_dim": c.hidden_dim, "depth": c.depth, "heads": c.heads}
    return {
        "scfoundation-mini": (lambda: mini, {}),
        "scfoundation-mini, pool max": (lambda: mini, {"pool": "max"}),
        "random weights": (lambda: ScFoundation.random(genes, **size), {}),
        "random weights, pool max": (lambda: ScFoundation.random(genes, **size), {"pool": "max"}),
        f"pca {width}": (lambda: load_teacher("pca", n_components=width), {}),
        "pca 50": (lambda: load_teacher("pca"), {}),
    }


def measure(cohort, seed: int) -> list[dict]:
    """Score every teacher on one cohort."""
    mini = load_teacher("scfoundation-mini")
    all_rows, domain = np.arange(len(cohort)), cohort.adata.obs["domain"].astype(str).to_numpy()
    folds, rows = pk.folds(cohort), []
    for name, (build, options) in list_teachers(4 * mini.encoder.config.hidden_dim, mini.genes).items():
        with tempfile.TemporaryDirectory() as cache:
            teacher = build().fit(cohort.by_slide(all_rows))
            begun = time.perf_counter()
            E = embed_cohort(teacher, cohort, cache=cache, device="cpu", **options)
            seconds = time.perf_counter() - begun
        fitted = hasattr(teacher, "pca_")
        parts = [embed_cohort(build().fit(cohort.by_slide(train)), cohort) if fitted else E for train, _ in folds]
        fold_scores = score_folds(cohort, folds, parts)
        scores = score_clusters(E, domain)
        # As in a run: teacher and clusters are fitted on each fold's training spots.
        per_fold = [
            adjusted_rand_score(domain[train], PseudoLabeler().fit(part[train]).labels_)
            for (train, _), part in zip(folds, parts, strict=True)
        ]
        row = {"cohort": seed, "teacher": name, "width": E.shape[1], "seconds": seconds, "spots": len(cohort)}
        row |= scores | {"ari_training_rows": float(np.mean(per_fold))}
        for score in fold_scores:
            row |= {score: fold_scores[score].mean(), f"{score}_sd_over_folds": fold_scores[score].std()}
        rows.append(row)
        print({k: round(v, 3) if isinstance(v, float) else v for k, v in row.items()}, flush=True)
    known = read_truth(cohort, "mixture")
    rows.append({"cohort": seed, "teacher": "true mixture", "width": known.shape[1], **score_clusters(known, domain)})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="of the cohorts")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    warnings.filterwarnings("ignore", message=".*patients for.*folds")
    rows = []
    for seed in options.seeds:
        with tempfile.TemporaryDirectory() as folder:
            rows += measure(pk.read_cohort(write_mini_cohort(Path(folder) / "mini", seed=seed)), seed)
    table = pd.DataFrame(rows)
    packages = ", ".join(f"{name} {version(name)}" for name in PACKAGES)
    head = f"# {packages}, python {platform.python_version()}; {options.threads} threads, {cpu_name()}"
    weights = f"# scfoundation-mini: fingerprint {load_teacher('scfoundation-mini').fingerprint}"
    out = Path(__file__).with_name("results") / f"{date.today().isoformat()}_teacher_mini.csv"
    out.write_text(f"{head}\n{weights}\n" + table.round(4).to_csv(index=False))
    columns = ["n_clusters", "ari", "ari_training_rows", *(f"ari_{n}" for n in MATCHED)]
    columns += ["pcc", "pcc_rates", "r2_mixture", "r2_niche", "seconds"]
    print(table.groupby("teacher", sort=False)[columns].mean().round(3).to_string())
    print(f"written to {out}")


if __name__ == "__main__":
    main()
