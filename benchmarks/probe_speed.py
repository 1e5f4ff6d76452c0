"""Seconds to score a probe over 5 folds, beside HEST-bench's procedure and the PEKA authors', and how they grow.

Features are synthetic, single precision with a decaying spectrum, in a memory-mapped file; folds, genes and threads are
the same for all, in one run. What would take hours is measured in part and multiplied; the result file says where.
Writes ``results/probe_speed_cpu.json``.

    python benchmarks/probe_speed.py --spots 30000 --growth 30000,60000,120000,206123
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
import warnings
from datetime import date
from pathlib import Path

import numpy as np
import scipy
import sklearn
from _machine import cpu_name
from scipy.linalg.blas import dsyrk
from sklearn.decomposition import PCA
from sklearn.linear_model import Ridge
from threadpoolctl import threadpool_info, threadpool_limits

import peka_lite as pk
from peka_lite.evaluation.protocols import ALPHAS
from peka_lite.probe.moments import alpha_path, components, gather
from peka_lite.probe.pca_ridge import PCARidge, cross_validate

WIDTH, FOLDS = 256, 5
# Watched from outside: products hold the interpreter, so that a thread would not see their peak.
WATCH = """
import select, sys
def own():
    return int(open(f"/proc/{sys.argv[1]}/status").read().split("RssAnon:")[1].split()[0])
peak = own()
print(peak, flush=True)
while not select.select([sys.stdin], [], [], 0.02)[0]:
    peak = max(peak, own())
print(peak)
"""


def write_features(path: Path, n: int, d: int, genes: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Write (n, d) float32 features whose variances fall as 1 / rank; return them mapped, with (n, genes) targets."""
    rng = np.random.default_rng(seed)
    rank = min(d, 512)
    mix = rng.standard_normal((rank, d), dtype=np.float32) / np.sqrt(np.arange(1, rank + 1, dtype=np.float32))[:, None]
    effect = rng.standard_normal((rank, genes)) * 0.3 / np.sqrt(np.arange(1, rank + 1))[:, None]
    X = np.lib.format.open_memmap(path, mode="w+", dtype=np.float32, shape=(n, d))
    Y = np.empty((n, genes))
    for start in range(0, n, 4096):
        latent = rng.standard_normal((min(4096, n - start), rank), dtype=np.float32)
        X[start : start + 4096] = latent @ mix + 0.05 * rng.standard_normal((len(latent), d), dtype=np.float32)
        Y[start : start + 4096] = np.log1p(rng.poisson(np.exp(latent @ effect + 0.5)))
    X.flush()
    return np.load(path, mmap_mode="r"), Y


def folds_of(n: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """Five blocks of rows that follow each other, as patients do."""
    fold = np.arange(n) * FOLDS // n
    return [(np.flatnonzero(fold != k), np.flatnonzero(fold == k)) for k in range(FOLDS)]


def clock(run, times: int = 1) -> tuple[object, float]:
    """Return what `run` gives, and the median of its seconds."""
    seconds = []
    for _ in range(times):
        begun = time.perf_counter()
        done = run()
        seconds.append(time.perf_counter() - begun)
    return done, float(np.median(seconds))


def products_alone(d: int, rows: int = 4096) -> dict:
    """Return the speed of double-precision products of a chunk with itself, in 1e9 operations a second."""
    x, other = np.random.default_rng(0).standard_normal((2, rows, d))
    general, symmetric = (clock(f, 5)[1] for f in (lambda: x.T @ other, lambda: dsyrk(1.0, x.T)))
    return {"general": round(2 * rows * d**2 / general / 1e9, 1), "symmetric": round(rows * d**2 / symmetric / 1e9, 1)}


def steps_of_ours(X, Y, folds) -> dict:
    """Return the seconds of each step, and the speed of the pass in 1e9 operations a second."""
    cell = np.arange(len(X)) * FOLDS // len(X)
    sums, passing = clock(lambda: gather(X, Y, cell))
    trains, adding = clock(lambda: [sums.over(c for c in range(FOLDS) if c != k) for k in range(FOLDS)])
    reduced, reducing = clock(lambda: [components(m, WIDTH) for m in trains])
    models = [PCARidge(WIDTH).fit_sums(m) for m in trains[:1]]
    _, predicting = clock(lambda: [models[0].predict(X[test]) for _, test in folds])
    _, path = clock(lambda: [alpha_path(r, sums.over([k]), ALPHAS) for k, r in enumerate(reduced)])
    seconds = {"pass": passing, "add": adding, "eigenvectors": reducing, "predict": predicting}
    total = sum(seconds.values())
    return {
        "seconds": {k: round(v, 2) for k, v in seconds.items()} | {f"path of {len(ALPHAS)} penalties": round(path, 2)},
        "share": {k: round(v / total, 2) for k, v in seconds.items()},
        "pass_gflop_per_second": round(len(X) * X.shape[1] * (X.shape[1] + 2 * Y.shape[1]) / passing / 1e9, 1),
    }


def path_of_ours(X, Y) -> np.ndarray:
    """Score every penalty on every fold: (folds, penalties, genes)."""
    sums = gather(X, Y, np.arange(len(X)) * FOLDS // len(X))
    trains = (sums.over(c for c in range(FOLDS) if c != k) for k in range(FOLDS))
    return np.stack([alpha_path(m, sums.over([k]), ALPHAS, n_components=WIDTH) for k, m in enumerate(trains)])


def path_of_hest_bench(X, Y, folds, measured: list[float]) -> dict:
    """Time HEST-bench's procedure for some penalties on the first fold: all of it, and its ridge alone."""
    train, test = folds[0]
    x, y, new = X[train], Y[train], X[test]
    whole, ridge_alone = [], []
    for alpha in measured:
        model, seconds = clock(lambda a=alpha: PCARidge(WIDTH, a, "hest-bench").fit(x, y))
        whole.append(seconds + clock(lambda m=model: m.predict(new))[1])
        Z = x
        for step in model.steps_:
            Z = step.transform(Z)
        Z = Z.astype(np.float32).astype(np.float64)
        ridge = Ridge(alpha=alpha, solver="lsqr", fit_intercept=False, random_state=0, max_iter=1000)
        ridge_alone.append(clock(lambda r=ridge, z=Z: r.fit(z, y))[1])
    reduction = float(np.mean(whole) - np.mean(ridge_alone))
    return {
        "measured": f"fold 0, penalties {', '.join(f'{a:.3g}' for a in measured)}; the rest multiplied",
        "seconds_of_a_fold": [round(s, 2) for s in whole],
        "seconds_of_its_ridge_alone": [round(s, 2) for s in ridge_alone],
        "seconds_pca_refitted": round(FOLDS * len(ALPHAS) * float(np.mean(whole)), 1),
        "seconds_pca_reused": round(FOLDS * (reduction + len(ALPHAS) * float(np.mean(ridge_alone))), 1),
    }


def authors(X, Y, folds, pairs: int) -> dict:
    """Time one PCA of the raw features and one ridge for each gene and fold, on a few such pairs."""

    def one(gene: int, fold: int):
        train, test = folds[fold]
        pca = PCA(WIDTH).fit(X[train])
        return Ridge(alpha=1.0).fit(pca.transform(X[train]), Y[train, gene]).predict(pca.transform(X[test]))

    seconds = [clock(lambda k=k: one(k % Y.shape[1], k % FOLDS))[1] for k in range(pairs)]
    return {
        "measured": f"{pairs} of {Y.shape[1] * FOLDS} pairs of gene and fold; the rest multiplied",
        "seconds_of_a_pair": [round(s, 2) for s in seconds],
        "seconds": round(float(np.mean(seconds)) * Y.shape[1] * FOLDS, 1),
    }


def with_peak(run) -> tuple[float, float]:
    """Return the seconds of `run`, and its peak of own memory above the start in GiB (mapped file pages left out)."""
    if not Path("/proc/self/status").exists():
        return clock(run)[1], float("nan")
    watch = subprocess.Popen(
        [sys.executable, "-c", WATCH, str(os.getpid())], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    before = int(watch.stdout.readline())
    _, seconds = clock(run)
    peak = int(watch.communicate("stop\n")[0].split()[-1])
    return seconds, (peak - before) / 2**20


def grow(X, Y, sizes: list[int]) -> list[dict]:
    """Time the first rows of the file, more and more of them; each file is in the page cache from being written."""
    rows = []
    for n in sizes:
        seconds, peak = with_peak(lambda n=n: cross_validate(X[:n], Y[:n], folds_of(n), n_components=WIDTH))
        rows.append({"spots": n, "seconds": round(seconds, 2), "peak_gib": round(peak, 3)})
        rows[-1]["milliseconds_a_spot"] = round(1e3 * seconds / n, 4)
        print(rows[-1], flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--spots", type=int, default=30_000)
    parser.add_argument("--features", type=int, default=1536)
    parser.add_argument("--genes", type=int, default=50)
    parser.add_argument(
        "--growth", type=lambda t: [int(n) for n in t.split(",")], default=[30_000, 60_000, 120_000, 206_123]
    )
    parser.add_argument(
        "--pairs", type=int, default=3, help="pairs of gene and fold to measure of the authors' procedure"
    )
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    options = parser.parse_args()
    warnings.simplefilter("ignore")  # lsqr stops at its 1000th step, and says so for every gene
    with threadpool_limits(options.threads), tempfile.TemporaryDirectory() as folder:
        n = options.spots
        X, Y = write_features(Path(folder) / "features.npy", max([n, *options.growth]), options.features, options.genes)
        alone = products_alone(options.features)
        print(f"products alone, GFLOP/s: {alone}", flush=True)
        x, y, folds = X[:n], Y[:n], folds_of(n)
        cross_validate(x[:2000], y[:2000], folds_of(2000), n_components=WIDTH)  # threads start on first use
        table, ours = clock(lambda: cross_validate(x, y, folds, n_components=WIDTH), 3)
        path, ours_path = clock(lambda: path_of_ours(x, y), 3)
        print(f"ours {ours:.2f} s, with {len(ALPHAS)} penalties {ours_path:.2f} s", flush=True)
        steps = steps_of_ours(x, y, folds)
        print(steps, flush=True)
        theirs, hest = clock(lambda: cross_validate(x, y, folds, n_components=WIDTH, solver="hest-bench"))
        print(f"HEST-bench's procedure {hest:.2f} s", flush=True)
        hest_path = path_of_hest_bench(x, y, folds, [ALPHAS[0], ALPHAS[len(ALPHAS) // 2], ALPHAS[-1]])
        print(hest_path, flush=True)
        peka = authors(x, y, folds, options.pairs)
        print(peka, flush=True)
        growth = grow(X, Y, options.growth)
    result = {
        "date": date.today().isoformat(),
        "device": f"cpu, {options.threads} threads, {cpu_name()}",
        "versions": {
            "python": platform.python_version(),
            "numpy": np.__version__,
            "scipy": scipy.__version__,
            "scikit-learn": sklearn.__version__,
            "blas": sorted(
                {
                    f"{i['internal_api']} {i['version']} {i.get('architecture', '')}".strip()
                    for i in threadpool_info()
                    if i["user_api"] == "blas"
                }
            ),
            "peka_lite": pk.__version__,
        },
        "spots": n,
        "features": options.features,
        "genes": options.genes,
        "folds": FOLDS,
        "n_components": WIDTH,
        "products_alone_gflop_per_second": alone,
        "one_penalty": {
            "what": "seconds to fit and score every fold; ours the median of 3 runs, the others once",
            "ours": round(ours, 2),
            "hest_bench": round(hest, 2),
            "ratio_hest_bench": round(hest / ours, 1),
            "authors": peka,
            "ratio_authors": round(peka["seconds"] / ours, 1),
            "mean_pcc": {
                "ours": round(float(table["pcc"].mean()), 5),
                "hest_bench": round(float(theirs["pcc"].mean()), 5),
            },
        },
        "path": {
            "what": f"{len(ALPHAS)} penalties from {ALPHAS[0]:g} to {ALPHAS[-1]:g}, every one scored on every fold",
            "ours": round(ours_path, 2),
            "hest_bench": hest_path,
            "ratio_pca_refitted": round(hest_path["seconds_pca_refitted"] / ours_path, 1),
            "ratio_pca_reused": round(hest_path["seconds_pca_reused"] / ours_path, 1),
            "best_mean_pcc": round(float(np.nanmean(path, axis=(0, 2)).max()), 5),
        },
        "steps_of_ours": steps,
        "growth": growth,
    }
    out = Path(__file__).with_name("results") / "probe_speed_cpu.json"
    out.parent.mkdir(exist_ok=True)
    out.write_text(json.dumps(result, indent=1) + "\n")
    print(f"written to {out}")


if __name__ == "__main__":
    main()
