r"""Pretrain the small student `mini` on unlabeled tiles, on a CPU, within a time budget.

A first training uses synthetic tiles; a second one continues from its weights with real tiles added:

    python pretraining/student.py --corpus corpus --minutes 30 --out synthetic.safetensors --log synthetic.csv
    python pretraining/student.py --corpus corpus --minutes 5 --init synthetic.safetensors --lr 4e-4 \
        --sections HER2_C2 HER2_C3 HER2_C4 HER2_C5 --out mini.safetensors --log mini.csv

`make pretrain-student` has the commands for the shipped weights. `--minutes` is a budget of CPU time and sets the
learning rate schedule. With `--steps` instead, weights are reproducible from the seed on the same machine.
"""

from __future__ import annotations

import argparse
import csv
import math
import os
import time
import warnings
from pathlib import Path

import numpy as np
import torch
from objectives import TARGETS, make_objective
from safetensors.torch import save
from sklearn.linear_model import RidgeCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from peka_lite.backbones.load import extract_features, load_backbone, preprocess

COLUMNS = ("step", "tiles", "cpu_minutes", "loss", "tiles_per_second", "validation_r2")
WARMUP = 0.05  # of the budget
FILES = ("corpus", "init", "log", "out")  # local paths, not stored in the weights


def open_corpus(folder: Path, sections: list[str]) -> tuple[np.ndarray, list[np.ndarray]]:
    """Map the synthetic tiles and the tiles of each real section, uint8 (n, 112, 112, 3).

    Raises
    ------
    FileNotFoundError
        If the corpus or a section does not exist; the message names the known sections.
    """
    if not (folder / "synthetic.npy").is_file():
        raise FileNotFoundError(f"{folder} has no synthetic.npy; create it with pretraining/corpus.py --out {folder}")
    known = sorted(p.stem for p in folder.glob("*.npy") if not p.stem.startswith(("synthetic", "validation", ".")))
    if unknown := [name for name in sections if name not in known]:
        raise FileNotFoundError(f"{folder} has no section {unknown[0]!r}; known: {', '.join(known) or 'none'}")
    files = [folder / f"{name}.npy" for name in ("synthetic", *sections)]
    synthetic, *real = (np.load(file, mmap_mode="r") for file in files)
    return synthetic, real


def draw_batch(rng, synthetic, real: list, size: int, share: float) -> torch.Tensor:
    """Draw tiles uint8 (size, 112, 112, 3), with a share of real tiles if there are real sections."""
    n_real = round(size * share) if real else 0
    batch = np.concatenate([synthetic[np.sort(rng.integers(len(synthetic), size=size - n_real))]])
    if n_real:
        section = rng.integers(len(real), size=n_real)
        batch = np.concatenate([batch, [real[s][rng.integers(len(real[s]))] for s in section]])
    return torch.from_numpy(batch)


@torch.inference_mode()
def embed(model, tiles) -> np.ndarray:
    """Return the pooled features (N, 192) of uint8 tiles."""
    batches = (torch.from_numpy(np.array(tiles[i : i + 128])) for i in range(0, len(tiles), 128))
    return torch.cat([extract_features(model, preprocess(batch, model.spec)) for batch in batches]).numpy()


def ridge_r2(features: np.ndarray, mixture: np.ndarray, section: np.ndarray) -> float:
    """Return the R2 of a ridge that predicts the domain mixtures of other sections, mean over domains.

    Each half of the sections is predicted from the other half.
    """
    predicted = np.empty_like(mixture)
    for half in (0, 1):
        train, test = section % 2 != half, section % 2 == half
        ridge = make_pipeline(StandardScaler(), RidgeCV(np.logspace(-1, 5, 13)))
        predicted[test] = ridge.fit(features[train], mixture[train]).predict(features[test])
    return float(1 - (((mixture - predicted) ** 2).sum(0) / ((mixture - mixture.mean(0)) ** 2).sum(0)).mean())


def make_optimizer(objective, lr: float) -> torch.optim.AdamW:
    """Return AdamW, without weight decay for biases, norms and position embeddings."""
    named = [(name, p) for name, p in objective.named_parameters() if p.requires_grad]
    no_decay = [p for name, p in named if p.ndim < 2 or "pos" in name or "cls_token" in name]
    decay = [p for name, p in named if not (p.ndim < 2 or "pos" in name or "cls_token" in name)]
    groups = [{"params": decay, "weight_decay": 0.05}, {"params": no_decay, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95))


def write_weights(path: Path, model, record: dict) -> None:
    """Write the student atomically in half precision, in the format of `load_backbone`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{os.getpid()}.partial")
    state = {name: tensor.half().contiguous() for name, tensor in model.state_dict().items()}
    try:
        draft.write_bytes(save(state, {"format": "pt"} | {name: str(value) for name, value in record.items()}))
        os.replace(draft, path)
    finally:
        draft.unlink(missing_ok=True)


def train(options: argparse.Namespace) -> list[dict]:
    """Train, write the weights at every validation and at the end, and return the rows of the log."""
    synthetic, real = open_corpus(options.corpus, options.sections)
    validation = [np.load(options.corpus / f"validation{end}.npy") for end in ("", "_mixture", "_section")]
    rng = np.random.default_rng(options.seed)
    torch.manual_seed(options.seed)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*starts from random weights")
        model = load_backbone("mini", weights=options.init or "random", seed=options.seed)
    masking = {name: getattr(options, name) for name in ("target", "masked", "depth", "summary")}
    masking = masking if options.objective == "mae" else {}
    objective = make_objective(options.objective, model.train(), stain=options.stain, **masking)
    optimizer = make_optimizer(objective, options.lr)
    student = objective.average["backbone"].eval()

    rows, losses, share, step, seen = [], [], 0.0, 0, 0
    begun, logged = time.process_time(), time.perf_counter()
    validated = logged
    while share < options.stop:
        warmup, progress = min(1.0, (share + 1e-3) / WARMUP), max(0.0, share - WARMUP) / (1 - WARMUP)
        for group in optimizer.param_groups:
            group["lr"] = options.lr * warmup * (0.01 + 0.99 * (1 + math.cos(math.pi * progress)) / 2)
        loss = objective.loss(draw_batch(rng, synthetic, real, options.batch, options.real_share))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(objective.parameters(), 3.0)
        optimizer.step()
        momentum = objective.momentum(step, share)
        with torch.no_grad():
            pairs = zip(objective.average.parameters(), objective.learner.parameters(), strict=True)
            for average, current in pairs:
                average.lerp_(current, 1 - momentum)
        losses.append(loss.item())
        if not math.isfinite(losses[-1]):
            raise ValueError(f"the loss is {losses[-1]} at step {step}; use a smaller --lr")
        step, seen, now = step + 1, seen + options.batch, time.perf_counter()
        minutes = (time.process_time() - begun) / 60
        share = step / options.steps if options.steps else minutes / options.minutes

        validate = share >= options.stop or now - validated > 60 * options.validate
        if validate or now - logged > 30 or step == 1:
            row = {"step": step, "tiles": seen, "cpu_minutes": round(minutes, 2)}
            row["loss"], row["tiles_per_second"] = round(float(np.mean(losses)), 5), round(seen / minutes / 60, 1)
            tiles, mixture, section = validation
            row["validation_r2"] = round(ridge_r2(embed(student, tiles), mixture, section), 4) if validate else ""
            rows.append(row)
            _log_row(options.log, rows)
            losses, logged = [], time.perf_counter()
            if validate:
                settings = {name: value for name, value in vars(options).items() if name not in FILES}
                write_weights(options.out, student, settings | row | {"share": round(share, 3)})
                validated = logged
    return rows


def _log_row(log: Path | None, rows: list[dict]) -> None:
    """Print the last row and append it to the log; the first row overwrites the log."""
    print(", ".join(f"{name} {value}" for name, value in rows[-1].items() if value != ""), flush=True)
    if log is None:
        return
    log.parent.mkdir(parents=True, exist_ok=True)
    with open(log, "w" if len(rows) == 1 else "a", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        if len(rows) == 1:
            writer.writeheader()
        writer.writerow(rows[-1])


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--corpus", type=Path, required=True, help="folder from corpus.py")
    parser.add_argument("--out", type=Path, required=True, help="safetensors file of the weights, in half precision")
    parser.add_argument("--log", type=Path, help="CSV file for loss and validation")
    parser.add_argument("--objective", choices=("mae", "dino", "ibot"), default="mae")
    parser.add_argument("--target", choices=TARGETS, default="descriptors", help="prediction target of mae")
    parser.add_argument("--masked", type=float, default=0.5, help="share of masked patches in mae")
    parser.add_argument("--depth", type=int, default=1, help="decoder layers of mae")
    parser.add_argument("--summary", action="store_true", help="mae also predicts the descriptors of the whole tile")
    parser.add_argument("--minutes", type=float, default=30.0, help="budget of CPU time, with validation")
    parser.add_argument("--stop", type=float, default=1.0, help="share of the budget after which to stop")
    parser.add_argument("--steps", type=int, help="budget in steps, instead of --minutes")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--init", help="initial weights; default: random")
    parser.add_argument("--sections", nargs="+", default=[], help="real sections of the corpus to include")
    parser.add_argument("--real-share", type=float, default=0.25, help="of a batch, with --sections")
    parser.add_argument("--stain", type=float, default=0.1, help="SD of the stain jitter, log strength; 0: none")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--validate", type=float, default=4.0, help="minutes between validations")
    options = parser.parse_args(arguments)
    for name in ("real_share", "masked", "stop"):
        if not 0 <= getattr(options, name) <= 1:
            parser.error(f"--{name.replace('_', '-')} must be a share, 0 to 1, not {getattr(options, name)}")
    if options.summary and (options.objective, options.target) != ("mae", "descriptors"):
        parser.error("--summary needs --objective mae and --target descriptors")
    if min(options.minutes, options.batch, 1 if options.steps is None else options.steps) <= 0:
        parser.error("--minutes, --steps and --batch must be above 0")
    return options


def main(arguments: list[str] | None = None) -> None:
    """Train with the command line's options; print errors as one line."""
    try:
        train(parse(arguments))
    except (ValueError, OSError) as error:
        raise SystemExit(f"student.py: {error}") from None


if __name__ == "__main__":
    main()
