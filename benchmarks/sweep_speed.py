"""Compare the time of a sweep with two workers and with one, on the same machine with an empty cache.

    python benchmarks/sweep_speed.py

One worker uses all cores; two share them. Points are runs on the embedded cohort that differ only in their seed, each
trained from scratch. Rounds alternate. Writes ``results/sweep_speed_cpu.json``.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import statistics
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

import yaml
from _machine import cpu_name

from peka_lite.data.mini.cohort import write_mini_cohort
from peka_lite.experiments.sweeps.read import read_sweep
from peka_lite.experiments.sweeps.run import run_sweep

FIXED = {"cohort": "mini", "protocol": "hest", "method": "bone", "n_splits": 2}


def main() -> None:
    """Time both, print and write the ratio."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--points", type=int, default=4)
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "sweep_speed_cpu.json")
    options = parser.parse_args()
    sweep = {"fixed": FIXED | {"epochs": options.epochs}, "grid": {"seed": list(range(options.points))}, "memory": 2}
    seconds: dict[int, list[float]] = {1: [], 2: []}
    points: dict[int, list[float]] = {1: [], 2: []}
    for k in range(options.rounds):
        for workers in (1, 2) if k % 2 == 0 else (2, 1):
            with tempfile.TemporaryDirectory() as folder:
                os.environ["PEKA_LITE_CACHE"] = folder
                write_mini_cohort(Path(folder) / "mini")
                path = Path(folder) / "speed.yml"
                path.write_text(yaml.safe_dump(sweep))
                begun = time.perf_counter()
                states = run_sweep(read_sweep(path), Path(folder) / "out", workers=workers)
                seconds[workers].append(round(time.perf_counter() - begun, 1))
                assert (states["state"] == "done").all()
                points[workers] += states["seconds"].tolist()
    result = {
        "date": str(datetime.date.today()),
        "device": f"{cpu_name()}, {os.cpu_count()} cores",
        "versions": {name: version(name) for name in ("peka_lite", "dask", "distributed", "torch", "papermill")},
        "points": options.points,
        "settings": sweep["fixed"],
        "seconds": {str(n): s for n, s in seconds.items()},
        "seconds_a_point": {str(n): round(statistics.mean(s), 1) for n, s in points.items()},
        "speedup_of_2_workers": round(statistics.median(seconds[1]) / statistics.median(seconds[2]), 2),
    }
    options.out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
