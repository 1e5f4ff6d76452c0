"""Run every method and control under every protocol, on one cohort.

    python benchmarks/protocols.py mini
    python benchmarks/protocols.py real --cohort ../shared/real/her2st

Writes dated run folders to ``benchmarks/results``, without predictions, maps and weights, for `peka-lite report`.
Existing runs are skipped, and trained students come from the cache, so an interrupted command can be repeated.
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
STORED_FILES = ("config.yml", "summary.json", "slides.parquet", "metrics.csv")
SETTINGS = {
    "mini": {"cohort": "mini"},
    # The image of the first section (HER2_A1) is not usable; the other four are of one person.
    "real": {"slides": ("HER2_C2", "HER2_C3", "HER2_C4", "HER2_C5")},
}
# The weights of the package were pretrained on the real sections, so they are not scored there.
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
    """Run the missing combinations of row and protocol."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", choices=SETTINGS)
    parser.add_argument("--cohort", help="folder in HEST-1k's layout, for 'real'")
    parser.add_argument("--weights", help="of the student; default: of the package on 'mini', random on 'real'")
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
            split = {"split": "slide"} if options.data == "real" and protocol != "paper" else {}
            config = RunConfig(
                **settings, **split, **ROWS[name], protocol=protocol,
                weights=options.weights or WEIGHTS[options.data], epochs=options.epochs,
                n_splits=options.n_splits, seed=options.seed,
            )  # fmt: skip
            start, draft = time.perf_counter(), out / f".{folder.name}"
            shutil.rmtree(draft, ignore_errors=True)
            summary = run(config, draft, maps=False)
            for path in draft.iterdir():
                if path.name not in STORED_FILES:
                    shutil.rmtree(path) if path.is_dir() else path.unlink()
            draft.rename(folder)
            print(f"{folder.name:24}{summary['mean_pcc']:7.3f}{time.perf_counter() - start:8.1f} s", flush=True)


if __name__ == "__main__":
    main()
