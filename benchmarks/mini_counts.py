"""Compare the counts of the default mini cohort with those of real sections, over the same genes.

    python benchmarks/mini_counts.py HER2ST [--out benchmarks/results/DATE_mini_counts.csv]

HER2ST has `st/` and `metadata/` of HER2_C2 to C5: four sections of one breast tumor, first-generation Spatial
Transcriptomics (100 um spots 200 um apart; the mini cohort has Visium's 55 um spots 100 um apart). Each statistic is
of one slide, over the genes of both data sets, normalized to their total; the table gives its median over slides and,
in brackets, the lowest and the highest. A gene's kind is that of the mini cohort. Neighbors are defined by number (100
and 200 um away) and by distance. No model is used.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from datetime import date
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
from scipy import sparse
from scipy.spatial import KDTree

import peka_lite as pk
from peka_lite.data.mini.cohort import write_mini_cohort

REAL = ("HER2_C2", "HER2_C3", "HER2_C4", "HER2_C5")
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
MIN_COUNTS = 100  # over the shared genes: real sections have a few (almost) empty spots
KINDS = ("visible", "invisible", "noise")


def compute_moran(values: np.ndarray, weights: sparse.csr_matrix) -> np.ndarray:
    """Return Moran's I of each column of (n_spots, n_genes); NaN if it is constant or no spot has neighbors."""
    z = values - values.mean(0)
    variance = (z**2).mean(0)
    with np.errstate(invalid="ignore", divide="ignore"):
        return (z * (weights @ z)).sum(0) / weights.sum() / np.where(variance > 1e-12, variance, np.nan)


def build_graphs(um: np.ndarray) -> dict[str, sparse.csr_matrix]:
    """Return the graphs of the six nearest spots, and of spots 150 to 250 um away."""
    tree = KDTree(um)
    nearest = tree.query(um, 7)[1][:, 1:]
    rows = np.repeat(np.arange(len(um)), 6)
    six = sparse.csr_matrix((np.ones(rows.size), (rows, nearest.ravel())), shape=(len(um),) * 2)
    distance = tree.sparse_distance_matrix(tree, 250).tocsr()
    distance.data = (distance.data >= 150).astype(float)
    return {"6 nearest": six, "150-250 um": distance}


def compute_statistics(slide: ad.AnnData, um: np.ndarray, kind: pd.Series) -> dict[str, float]:
    """Compute all statistics of a slide with the genes of `kind`."""
    deep = np.asarray(slide.X.sum(1)).ravel() >= MIN_COUNTS
    n_dropped = int((~deep).sum())
    slide, um = slide[deep].copy(), um[deep]
    X = slide.X.toarray().astype(float)  # (n_spots, n_genes)
    total, mean = X.sum(1), X.mean(0)
    graphs = build_graphs(um)
    logs = np.log1p(1e4 * X / total[:, None])
    low, high = np.quantile(total, (0.25, 0.75))
    result = {
        f"spots left out, below {MIN_COUNTS} counts": n_dropped,
        "spots": len(X),
        "genes": X.shape[1],
        "counts per spot, median": np.median(total),
        "counts per spot, quartile 1": low,
        "counts per spot, quartile 3": high,
        "counts per spot, coefficient of variation": total.std() / total.mean(),
        "genes seen per spot, median": np.median((X > 0).sum(1)),
    }
    moran = {n: compute_moran(np.log10(total)[:, None], weights)[0] for n, weights in graphs.items()}
    result |= {f"log10 counts per spot, Moran's I, {n}": value for n, value in moran.items()}

    groups = {"all": np.ones(len(kind), bool), **{name: (kind == name).to_numpy() for name in KINDS}}
    result |= {f"share of zeros, {name}": (X[:, of] == 0).mean() for name, of in groups.items()}
    result |= {f"share of counts, {name}": X[:, of].sum() / X.sum() for name, of in groups.items() if name != "all"}
    result["share of genes not seen"] = (mean == 0).mean()
    log_mean = np.log10(mean, where=mean > 0, out=np.full(len(mean), -np.inf))
    for name, of in groups.items():
        levels = QUANTILES if name == "all" else (0.5,)
        values = np.quantile(log_mean[of & (mean > 0)], levels)
        result |= {f"log10 mean of a gene, {name}, quantile {q}": v for q, v in zip(levels, values, strict=True)}

    # By moments, with expected counts from the spot totals: squared residual = expected + dispersion * expected**2.
    expected = np.outer(total / total.mean(), mean)
    with np.errstate(invalid="ignore"):
        dispersion = ((X - expected) ** 2 - expected).sum(0) / (expected**2).sum(0)
    for name, of in groups.items():
        levels = QUANTILES if name == "all" else (0.5,)
        values = np.quantile(dispersion[of & (mean > 0.5)], levels)
        result |= {f"dispersion, mean > 0.5, {name}, quantile {q}": v for q, v in zip(levels, values, strict=True)}

    top = np.isin(slide.var_names, pk.data.top_hvg(slide, n=50))
    for graph, weights in graphs.items():
        value = compute_moran(logs, weights)
        for name, of in {**groups, "top 50": top}.items():
            levels = QUANTILES if name in ("all", "top 50") else (0.5, 0.95)
            quantiles = np.nanquantile(value[of], levels)
            result |= {f"Moran's I, {graph}, {name}, quantile {q}": v for q, v in zip(levels, quantiles, strict=True)}
    spread = logs.std(0)
    with_top = {**groups, "top 50": top}
    result |= {f"spread of log1p-cp10k, {n}, median": np.median(spread[of]) for n, of in with_top.items()}
    result["log10 mean of a gene, top 50, quantile 0.5"] = np.median(log_mean[top])
    result |= {f"top 50, {name}": (kind[top] == name).sum() for name in KINDS}
    split = pk.evaluation.estimate_ceiling(slide)
    result |= {f"ceiling by count splitting, {n}, median": split[of].median() for n, of in with_top.items()}
    if "rate" in slide.layers:
        known = pk.evaluation.noise_ceiling(slide)
        for name, of in {"visible": groups["visible"], "top 50, visible": top & groups["visible"]}.items():
            values = known[of].quantile(QUANTILES)
            result |= {f"true noise ceiling, {name}, quantile {q}": v for q, v in values.items()}
    return result


def read_slides(root: Path, names) -> list[tuple[ad.AnnData, np.ndarray]]:
    """Return the slides with the positions of their spots in um."""
    slides = []
    for name in names:
        slide = ad.read_h5ad(root / "st" / f"{name}.h5ad")
        pixel = json.loads((root / "metadata" / f"{name}.json").read_text("utf-8"))["pixel_size_um_estimated"]
        slides.append((slide, np.asarray(slide.obsm["spatial"], float) * pixel))
    return slides


def tabulate(slides, kind: pd.Series) -> pd.DataFrame:
    """Return the statistics of all slides, (n_statistics, n_slides)."""
    return pd.DataFrame([compute_statistics(slide[:, kind.index].copy(), um, kind) for slide, um in slides]).T


def compute_ceiling(slides) -> dict[str, float]:
    """Return the kinds of the genes that `top_hvg` selects in the mini cohort, and their true ceilings."""
    whole = ad.concat([slide for slide, _ in slides], merge="same", index_unique="-")
    top, ceiling = list(pk.data.top_hvg(whole)), pk.evaluation.noise_ceiling(whole)
    kind = whole.var["kind"].astype(str)
    result = {f"all slides together: top 50, {name}": (kind[top] == name).sum() for name in KINDS}
    groups = {f"top 50, {name}": [g for g in top if kind[g] == name] for name in KINDS[:2]}
    for name, genes in {**groups, "visible": kind.index[kind == "visible"]}.items():
        values = ceiling[genes].quantile(QUANTILES)
        result |= {f"all slides together: true noise ceiling, {name}, quantile {q}": v for q, v in values.items()}
    return result


def format_range(row: pd.Series) -> str:
    """Return median, lowest and highest value over slides as text."""
    row = row.dropna()
    if row.empty:
        return ""
    return f"{row.median():.4g}" if len(row) == 1 else f"{row.median():.4g} ({row.min():.4g} to {row.max():.4g})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("her2st", type=Path, help="folder with st/ and metadata/ of HER2_C2 to C5")
    parser.add_argument("--mini", type=Path, help="an existing mini cohort; by default, one is simulated")
    parser.add_argument("--out", type=Path, default=Path(f"benchmarks/results/{date.today()}_mini_counts.csv"))
    args = parser.parse_args()
    files = [args.her2st / f / f"{n}{e}" for n in REAL for f, e in (("st", ".h5ad"), ("metadata", ".json"))]
    if absent := next((file for file in files if not file.is_file()), None):
        sys.exit(f"{absent} does not exist: give the folder with st/ and metadata/ of {', '.join(REAL)}")
    with tempfile.TemporaryDirectory() as folder:
        root = args.mini or write_mini_cohort(Path(folder) / "mini")
        mini = read_slides(root, sorted(file.stem for file in (root / "st").glob("*.h5ad")))
    real = read_slides(args.her2st, REAL)
    var = mini[0][0].var
    shared = [gene for gene in var.index if all(gene in slide.var_names for slide, _ in real)]
    kind = var.loc[shared, "kind"].astype(str)
    ours, reference = tabulate(mini, kind), tabulate(real, kind)
    tables = {"mini": ours, "real": reference.reindex(ours.index)}
    table = pd.DataFrame({name: part.apply(format_range, axis=1) for name, part in tables.items()})
    table = pd.concat([table, pd.DataFrame({"mini": {k: f"{v:.4g}" for k, v in compute_ceiling(mini).items()}})])
    table = table.fillna("").rename_axis("statistic")
    print(table.to_string())
    args.out.parent.mkdir(parents=True, exist_ok=True)
    draft = args.out.with_name(f".{args.out.name}")
    table.to_csv(draft)
    draft.replace(args.out)


if __name__ == "__main__":
    main()
