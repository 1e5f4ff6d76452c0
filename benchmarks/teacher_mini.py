"""What teachers tell of the embedded cohort: its domains, its genes and the mixture behind them.

Teachers: scfoundation-mini as `load_teacher` makes it, both ways of pooling; the same network with random weights; PCA
of the same width, and of 50 components, its default. PCA is fitted on all spots of the cohort, and for the held-out
scores once more on each fold's training spots alone; the others came trained, or not, before they saw the cohort.

- clusters: adjusted Rand index of KNN-Leiden clusters against ``obs["domain"]``, at the default resolution, and at the
  resolution whose number of clusters is nearest to 6, 9 and 12 (a teacher is not judged by how many it finds);
- held out by patient: mean PCC of the probe from embedding to the 50 most variable genes, which are the training rows'
  own choice, with the measured counts (`pcc`) and with the true rates behind them (`pcc_rates`): what is told of the
  counting noise, which a teacher sees and no tile shows, helps only the first; and R2 of the domain mixture and of the
  hidden niches (`r2_mixture`, `r2_niche`, mean over columns). Ridge penalty 100 on standardized features.

The row "true mixture" clusters the domain mixture itself: what even perfect knowledge scores.

Cohort 0 with default options is the one that the book shows; other seeds show how far numbers move between cohorts.

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


def cluster_scores(E: np.ndarray, domain: np.ndarray) -> dict[str, float]:
    """Adjusted Rand indices, and how many clusters the default resolution gives."""
    found = {r: PseudoLabeler(resolution=r).fit(E) for r in RESOLUTIONS}
    scores = {"n_clusters": found[1.0].n_labels_, "ari": adjusted_rand_score(domain, found[1.0].labels_)}
    for wanted in MATCHED:
        nearest = min(found.values(), key=lambda labeler: abs(labeler.n_labels_ - wanted))
        scores[f"ari_{wanted}"] = adjusted_rand_score(domain, nearest.labels_)
        scores[f"n_{wanted}"] = nearest.n_labels_
    return scores


def held_out_scores(cohort, folds, embeddings: list[np.ndarray]) -> pd.DataFrame:
    """PCC of genes and R2 of the truth of every fold; `embeddings` holds (N, D_t) of each fold's teacher."""
    mixture, niche = (truth(cohort, name) for name in ("mixture", "niche"))
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


def truth(cohort, name: str) -> np.ndarray:
    """``obsm["mixture"]`` or ``["niche"]`` of all spots."""
    return np.concatenate([slide.adata.obsm[name].to_numpy() for slide in cohort.slides])


def teachers_of(width: int, genes) -> dict:
    """Name -> (what makes the teacher, options of `embed`)."""
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
    everything, domain = np.arange(len(cohort)), cohort.adata.obs["domain"].astype(str).to_numpy()
    folds, rows = pk.folds(cohort), []
    for name, (make, options) in teachers_of(4 * mini.encoder.config.hidden_dim, mini.genes).items():
        with tempfile.TemporaryDirectory() as cache:
            teacher = make().fit(cohort.by_slide(everything))
            begun = time.perf_counter()
            E = embed_cohort(teacher, cohort, cache=cache, device="cpu", **options)
            seconds = time.perf_counter() - begun
        fitted = hasattr(teacher, "pca_")
        parts = [embed_cohort(make().fit(cohort.by_slide(train)), cohort) if fitted else E for train, _ in folds]
        held_out = held_out_scores(cohort, folds, parts)
        scores = cluster_scores(E, domain)
        # The same, as a run's student is taught: teacher and clusters see each fold's training spots alone.
        apart = [
            adjusted_rand_score(domain[train], PseudoLabeler().fit(part[train]).labels_)
            for (train, _), part in zip(folds, parts, strict=True)
        ]
        row = {"cohort": seed, "teacher": name, "width": E.shape[1], "seconds": seconds, "spots": len(cohort)}
        row |= scores | {"ari_training_rows": float(np.mean(apart))}
        for score in held_out:
            row |= {score: held_out[score].mean(), f"{score}_sd_over_folds": held_out[score].std()}
        rows.append(row)
        print({k: round(v, 3) if isinstance(v, float) else v for k, v in row.items()}, flush=True)
    known = truth(cohort, "mixture")
    return [
        *rows,
        {"cohort": seed, "teacher": "true mixture", "width": known.shape[1], **cluster_scores(known, domain)},
    ]


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
    columns = [
        "n_clusters",
        "ari",
        "ari_training_rows",
        *(f"ari_{n}" for n in MATCHED),
        "pcc",
        "pcc_rates",
        "r2_mixture",
        "r2_niche",
        "seconds",
    ]
    print(table.groupby("teacher", sort=False)[columns].mean().round(3).to_string())
    print(f"written to {out}")


if __name__ == "__main__":
    main()
