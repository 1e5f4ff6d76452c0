"""The protocol table: every method and every control under every protocol, on one cohort.

    python benchmarks/protocols.py mini
    python benchmarks/protocols.py real --cohort ../shared/real/her2st

writes dated run folders to ``benchmarks/results``, without predictions, maps and weights; `peka-lite report` reads
them.
A run that is there already is kept, and taught students come from the cache, so a stopped command goes on.
"""

from __future__ import annotations

import argparse
import datetime
import shutil
import time
import warnings
from pathlib import Path

from peka_lite.experiments.config import RunConfig
from peka_lite.experiments.run import run

RESULTS = Path(__file__).parent / "results"
KEPT = ("config.yml", "summary.json", "slides.parquet", "metrics.csv")
SETTINGS = {
    "mini": {"cohort": "mini"},
    # The first section's image is unfit for image models, and the four others are of one person.
    "real": {"slides": ("HER2_C2", "HER2_C3", "HER2_C4", "HER2_C5")},
}
# The package's weights have seen the real sections: they are not scored there.
WEIGHTS = {"mini": "hub", "real": "random"}
ROWS = {
    "color": {"features": "color", "method": "none"},
    "coordinates": {"features": "coordinates", "method": "none"},
    "depth": {"features": "depth", "method": "none"},
    "none": {"method": "none"},
    "bone": {"method": "bone"},
    "lora": {"method": "lora"},
    "adalora": {"method": "adalora"},
    "bone-shuffled": {"method": "bone", "shuffle_teacher": True},
    "frozen+bone": {"method": "bone", "features": "frozen+student"},
    "teacher": {"features": "teacher", "method": "none"},
}


def main() -> None:
    """Run what is missing, row by row."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", choices=SETTINGS)
    parser.add_argument("--cohort", help="folder in HEST-1k's layout, for 'real'")
    parser.add_argument("--weights", help="of the student; None: the package's on 'mini', random on 'real'")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--n-splits", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rows", nargs="+", default=list(ROWS), choices=ROWS)
    parser.add_argument("--protocols", nargs="+", default=["paper", "hest", "strict"])
    parser.add_argument("--out", type=Path, help="folder of run folders")
    options = parser.parse_args()
    warnings.filterwarnings("ignore", message=".*each (patient|slide) is one fold")
    out = options.out or RESULTS / f"{datetime.date.today()}_protocols_{options.data}"
    out.mkdir(parents=True, exist_ok=True)
    settings = SETTINGS[options.data] | ({"cohort": options.cohort} if options.cohort else {})
    for name in options.rows:
        for protocol in options.protocols:
            folder = out / f"{protocol}_{name}"
            if folder.exists():
                continue
            held_out = {"split": "slide"} if options.data == "real" and protocol != "paper" else {}
            config = RunConfig(
                **settings, **held_out, **ROWS[name], protocol=protocol,
                weights=options.weights or WEIGHTS[options.data], epochs=options.epochs,
                n_splits=options.n_splits, seed=options.seed,
            )  # fmt: skip
            start, whole = time.perf_counter(), out / f".{folder.name}"
            shutil.rmtree(whole, ignore_errors=True)
            summary = run(config, whole, maps=False)
            for path in whole.iterdir():
                if path.name not in KEPT:
                    shutil.rmtree(path) if path.is_dir() else path.unlink()
            whole.rename(folder)
            print(f"{folder.name:24}{summary['mean_pcc']:7.3f}{time.perf_counter() - start:8.1f} s", flush=True)


if __name__ == "__main__":
    main()
