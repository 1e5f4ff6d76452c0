"""Compare the time to score a probe over 5 folds with the procedures of HEST-bench and of the PEKA authors.

Features are synthetic, single precision with a decaying spectrum, in a memory-mapped file. Folds, genes and threads are
the same for all, in one run. Parts that would take hours are measured on a subset and extrapolated, as noted in the
result file. Growth with the number of spots is measured for ours. Writes ``results/probe_speed_cpu.json``.

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
# A separate process: matrix products block the interpreter, so a thread would miss their peak.
WATCHER = """
import select, sys
def read_memory():
    return int(open(f"/proc/{sys.argv[1]}/status").read().split("RssAnon:")[1].split()[0])
peak = read_memory()
print(peak, flush=True)
while not select.select([sys.stdin], [], [], 0.02)[0]:
    peak = max(peak, read_memory())
print(peak)
"""


def write_features(path: Path, n: int, d: int, genes: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Write (n, d) float32 features with variances falling as 1 / rank; return them mapped, and (n, genes) targets."""
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


def make_folds(n: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """Split rows into five contiguous blocks, as patients would be."""
    fold = np.arange(n) * FOLDS // n
    return [(np.flatnonzero(fold != k), np.flatnonzero(fold == k)) for k in range(FOLDS)]


def measure_time(function, times: int = 1) -> tuple[object, float]:
    """Return the result of a function and the median of its seconds."""
    seconds = []
    for _ in range(times):
        begun = time.perf_counter()
        result = function()
        seconds.append(time.perf_counter() - begun)
    return result, float(np.median(seconds))


def measure_products(d: int, rows: int = 4096) -> dict:
    """Return the speed of double-precision products of a chunk with itself, in 1e9 operations per second."""
    x, other = np.random.default_rng(0).standard_normal((2, rows, d))
    general, symmetric = (measure_time(f, 5)[1] for f in (lambda: x.T @ other, lambda: dsyrk(1.0, x.T)))
    return {"general": round(2 * rows * d**2 / general / 1e9, 1), "symmetric": round(rows * d**2 / symmetric / 1e9, 1)}


def measure_our_steps(X, Y, folds) -> dict:
    """Return the seconds of each step, and the speed of the pass in 1e9 operations per second."""
    cell = np.arange(len(X)) * FOLDS // len(X)
    sums, passing = measure_time(lambda: gather(X, Y, cell))
    trains, adding = measure_time(lambda: [sums.over(c for c in range(FOLDS) if c != k) for k in range(FOLDS)])
    reduced, reducing = measure_time(lambda: [components(m, WIDTH) for m in trains])
    models = [PCARidge(WIDTH).fit_sums(m) for m in trains[:1]]
    _, predicting = measure_time(lambda: [models[0].predict(X[test]) for _, test in folds])
    _, path = measure_time(lambda: [alpha_path(r, sums.over([k]), ALPHAS) for k, r in enumerate(reduced)])
    seconds = {"pass": passing, "add": adding, "eigenvectors": reducing, "predict": predicting}
    total = sum(seconds.values())
    return {
        "seconds": {k: round(v, 2) for k, v in seconds.items()} | {f"path of {len(ALPHAS)} alphas": round(path, 2)},
        "share": {k: round(v / total, 2) for k, v in seconds.items()},
        "pass_gflop_per_second": round(len(X) * X.shape[1] * (X.shape[1] + 2 * Y.shape[1]) / passing / 1e9, 1),
    }


def score_alphas(X, Y) -> np.ndarray:
    """Score every alpha on every fold: (folds, alphas, genes)."""
    sums = gather(X, Y, np.arange(len(X)) * FOLDS // len(X))
    trains = (sums.over(c for c in range(FOLDS) if c != k) for k in range(FOLDS))
    return np.stack([alpha_path(m, sums.over([k]), ALPHAS, n_components=WIDTH) for k, m in enumerate(trains)])


def measure_hest_bench(X, Y, folds, measured: list[float]) -> dict:
    """Time HEST-bench's procedure on the first fold for some alphas, in total and for its ridge only."""
    train, test = folds[0]
    x, y, x_test = X[train], Y[train], X[test]
    total, ridge_only = [], []
    for alpha in measured:
        model, seconds = measure_time(lambda a=alpha: PCARidge(WIDTH, a, "hest-bench").fit(x, y))
        total.append(seconds + measure_time(lambda m=model: m.predict(x_test))[1])
        Z = x
        for step in model.steps_:
            Z = step.transform(Z)
        Z = Z.astype(np.float32).astype(np.float64)
        ridge = Ridge(alpha=alpha, solver="lsqr", fit_intercept=False, random_state=0, max_iter=1000)
        ridge_only.append(measure_time(lambda r=ridge, z=Z: r.fit(z, y))[1])
    reduction = float(np.mean(total) - np.mean(ridge_only))
    return {
        "measured": f"fold 0, alphas {', '.join(f'{a:.3g}' for a in measured)}; the rest extrapolated",
        "seconds_of_a_fold": [round(s, 2) for s in total],
        "seconds_of_its_ridge_alone": [round(s, 2) for s in ridge_only],
        "seconds_pca_refitted": round(FOLDS * len(ALPHAS) * float(np.mean(total)), 1),
        "seconds_pca_reused": round(FOLDS * (reduction + len(ALPHAS) * float(np.mean(ridge_only))), 1),
    }


def measure_authors(X, Y, folds, pairs: int) -> dict:
    """Time the authors' procedure, a PCA of raw features and a ridge per gene and fold, on some pairs."""

    def fit_pair(gene: int, fold: int):
        train, test = folds[fold]
        pca = PCA(WIDTH).fit(X[train])
        return Ridge(alpha=1.0).fit(pca.transform(X[train]), Y[train, gene]).predict(pca.transform(X[test]))

    seconds = [measure_time(lambda k=k: fit_pair(k % Y.shape[1], k % FOLDS))[1] for k in range(pairs)]
    return {
        "measured": f"{pairs} of {Y.shape[1] * FOLDS} pairs of gene and fold; the rest extrapolated",
        "seconds_of_a_pair": [round(s, 2) for s in seconds],
        "seconds": round(float(np.mean(seconds)) * Y.shape[1] * FOLDS, 1),
    }


def measure_peak(function) -> tuple[float, float]:
    """Return the seconds of a function and its peak of added memory in GiB, without mapped file pages."""
    if not Path("/proc/self/status").exists():
        return measure_time(function)[1], float("nan")
    watcher = subprocess.Popen(
        [sys.executable, "-c", WATCHER, str(os.getpid())], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    before = int(watcher.stdout.readline())
    _, seconds = measure_time(function)
    peak = int(watcher.communicate("stop\n")[0].split()[-1])
    return seconds, (peak - before) / 2**20


def measure_growth(X, Y, sizes: list[int]) -> list[dict]:
    """Time the scoring of the first rows of the file, for increasing sizes; the file is in the page cache."""
    rows = []
    for n in sizes:
        seconds, peak = measure_peak(lambda n=n: cross_validate(X[:n], Y[:n], make_folds(n), n_components=WIDTH))
        rows.append({"spots": n, "seconds": round(seconds, 2), "peak_gib": round(peak, 3)})
        rows[-1]["milliseconds_a_spot"] = round(1e3 * seconds / n, 4)
        print(rows[-1], flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--spots", type=int, default=30_000)
    parser.add_argument("--features", type=int, default=1536)
    parser.add_argument("--genes", type=int, default=50)
    sizes = [30_000, 60_000, 120_000, 206_123]
    parser.add_argument("--growth", type=lambda text: [int(n) for n in text.split(",")], default=sizes)
    parser.add_argument("--pairs", type=int, default=3, help="pairs of gene and fold to time the authors' procedure")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    options = parser.parse_args()
    warnings.simplefilter("ignore")  # lsqr stops at step 1000, with a warning for every gene
    with threadpool_limits(options.threads), tempfile.TemporaryDirectory() as folder:
        n = options.spots
        X, Y = write_features(Path(folder) / "features.npy", max([n, *options.growth]), options.features, options.genes)
        alone = measure_products(options.features)
        print(f"products alone, GFLOP/s: {alone}", flush=True)
        x, y, folds = X[:n], Y[:n], make_folds(n)
        cross_validate(x[:2000], y[:2000], make_folds(2000), n_components=WIDTH)  # starts the threads
        table, ours = measure_time(lambda: cross_validate(x, y, folds, n_components=WIDTH), 3)
        path, ours_path = measure_time(lambda: score_alphas(x, y), 3)
        print(f"ours {ours:.2f} s, with {len(ALPHAS)} alphas {ours_path:.2f} s", flush=True)
        steps = measure_our_steps(x, y, folds)
        print(steps, flush=True)
        hest_table, hest = measure_time(lambda: cross_validate(x, y, folds, n_components=WIDTH, solver="hest-bench"))
        print(f"HEST-bench's procedure {hest:.2f} s", flush=True)
        hest_path = measure_hest_bench(x, y, folds, [ALPHAS[0], ALPHAS[len(ALPHAS) // 2], ALPHAS[-1]])
        print(hest_path, flush=True)
        peka = measure_authors(x, y, folds, options.pairs)
        print(peka, flush=True)
        growth = measure_growth(X, Y, options.growth)
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
        "one_alpha": {
            "what": "seconds to fit and score every fold; ours the median of 3 runs, the others once",
            "ours": round(ours, 2),
            "hest_bench": round(hest, 2),
            "ratio_hest_bench": round(hest / ours, 1),
            "authors": peka,
            "ratio_authors": round(peka["seconds"] / ours, 1),
            "mean_pcc": {k: round(float(t["pcc"].mean()), 5) for k, t in (("ours", table), ("hest_bench", hest_table))},
        },
        "path": {
            "what": f"{len(ALPHAS)} alphas from {ALPHAS[0]:g} to {ALPHAS[-1]:g}, each scored on every fold",
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
