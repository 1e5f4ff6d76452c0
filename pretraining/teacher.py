"""Pretrain ``scfoundation-mini``, a small scFoundation, on counts of the embedded cohort's generator.

The objective is that of scFoundation (Hao et al. 2024, doi:10.1038/s41592-024-02305-7): 30 % of a spot's genes are
masked, expressed or not; the encoder sees the remaining expressed genes and the depths T and S; the masked values are
predicted with a squared error. Half of the spots are downsampled first, so that S is below T and the model learns the
meaning of depth. Differences to the paper: the decoder (`MaskedModel`), the target of a gene (`draw_corpus`), and that
each step uses a random subset of the genes, which is faster.

    python pretraining/teacher.py --steps 900 --seed 0

It writes ``peka_lite/teachers/weights/scfoundation_mini.ckpt``, in the format of the published checkpoint, and
``pretraining/teacher_log.csv``.
"""

from __future__ import annotations

import argparse
import csv
import math
import os
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from peka_lite.data.mini import counts as mini_genes
from peka_lite.data.mini.tissue import STEP, TILE, draw_domains, draw_outline, mix_domains
from peka_lite.teachers._encoder import Encoder, EncoderConfig, pool_tokens

FOLDER = Path(__file__).parent
OUT = FOLDER.parent / "peka_lite" / "teachers" / "weights" / "scfoundation_mini.ckpt"
# Cohorts use children 0, 1 and 2 of their seed; no cohort with a seed below 2**128 uses this child.
KEY = 0x7EAC
MASKED = 0.3  # share of the genes
RANK = 64  # of the decoder
DOWNSAMPLED = 0.5  # share of the spots
COLUMNS = ("step", "spots", "loss", "held_out_loss", "minutes", "seed")


def draw_cohort(stream: np.random.SeedSequence, *, n_slides: int = 4, n_spots: int = 120) -> tuple[np.ndarray, ...]:
    """Draw the counts of a cohort without images; each slide is of another patient.

    Returns
    -------
    counts : numpy.ndarray
        (n_slides * n_spots, n_genes) uint16, genes sorted by symbol.
    mixture : numpy.ndarray
        (n_slides * n_spots, n_domains) float64, true domain mixture.
    """
    rng = np.random.default_rng(stream)
    var, profiles = mini_genes.draw_genes(rng)
    counts, mixtures = [], []
    for _ in range(n_slides):
        obs, tissue = draw_outline(rng, n_spots)
        labels = draw_domains(rng, tissue)
        yx = obs[["pxl_row_in_fullres", "pxl_col_in_fullres"]].to_numpy()  # (n_spots, 2)
        cell = tuple((yx // STEP).astype(int).T)
        mixture = mix_domains(labels, yx[:, ::-1].astype(np.int64) - TILE // 2)
        niche = mini_genes.draw_niches(rng, labels.shape, cell)
        # Depth varies more between patients than in a cohort, so that the model generalizes over depths.
        depth = np.exp(rng.normal(0, 0.3)) * mini_genes.draw_depth(rng, labels.shape, cell)
        of_kind = {"visible": mixture, "invisible": niche, "noise": np.ones((n_spots, 1))}
        drawn, _ = mini_genes.draw_counts(rng, var, mini_genes.draw_patient_profiles(rng, profiles), of_kind, depth)
        counts.append(np.minimum(drawn, np.iinfo(np.uint16).max).astype(np.uint16))
        mixtures.append(mixture)
    return np.concatenate(counts), np.concatenate(mixtures)


class MaskedModel(nn.Module):
    """The encoder, and a decoder that is used in training only.

    The decoder is smaller than scFoundation's: a gene's value is the inner product of projections of the pooled
    encoding and of the gene's embedding. So the pooled encoding, the teacher's output, must contain all information.
    """

    def __init__(self, config: EncoderConfig):
        super().__init__()
        width = config.hidden_dim
        self.encoder = Encoder(config)
        self.of_spot = nn.Sequential(nn.LayerNorm(4 * width), nn.Linear(4 * width, RANK))
        self.of_gene, self.level = nn.Linear(width, RANK), nn.Linear(width, 1)
        bins = self.encoder.token_emb
        # Smaller than PyTorch's 1, to suit Adam's steps. Bins are even smaller: S and T should encode genes.
        nn.init.normal_(self.encoder.pos_emb.weight, std=0.3)
        nn.init.normal_(bins.emb.weight, std=0.1)
        with torch.no_grad():
            self.encoder.pos_emb.weight[config.n_genes :] = 0
            # Spread the bins over the values; otherwise all values look alike at first.
            bins.mlp.weight.copy_(torch.randn_like(bins.mlp.weight) * 2)
            bins.mlp.bias.copy_(-bins.mlp.weight[:, 0] * torch.linspace(0, 6, config.bin_num))

    def forward(self, values, masked, depths, genes):
        """Predict all genes, (B, n), from values (B, n) that are not masked (B, n), and the depths T and S (B, 2)."""
        seen = (values > 0) & ~masked
        lengths = seen.sum(1) + 2
        order = torch.argsort(~seen, dim=1, stable=True)[:, : int(lengths.max())]  # visible genes first
        at = torch.arange(2) + lengths[:, None] - 2  # (B, 2): T and S come last
        v = F.pad(values.gather(1, order), (0, 2)).scatter(1, at, depths)
        places = F.pad(genes[order], (0, 2)).scatter(1, at, torch.arange(2).expand_as(at) + self.encoder.config.n_genes)
        longest = int(lengths.max())
        x = self.encoder(v[:, :longest], places[:, :longest], lengths)  # (B, longest, d)
        spot, gene = pool_tokens(x, lengths), self.encoder.pos_emb(genes)  # (B, 4d), (n, d)
        return self.level(gene).T + self.of_spot(spot) @ self.of_gene(gene).T / RANK**0.5


def normalize_log(counts: np.ndarray) -> np.ndarray:
    """Return log1p of counts per 10,000, (N, G) float32."""
    return np.log1p(1e4 * counts / counts.sum(1, keepdims=True)).astype(np.float32)


def draw_corpus(streams) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Draw cohorts: counts (N, G), mean level of each gene in the spot's cohort (N, G), sampling weights of genes (G,).

    Each cohort draws new gene levels, unlike real tissue, so they cannot be predicted from context. The target of a
    masked gene is therefore its difference to the level, its mean in the cohort. Genes are sampled more often if their
    rate varies more within cohorts (squared coefficient of variation, without counting noise).
    """
    counts = [draw_cohort(stream)[0] for stream in streams]
    levels = [np.tile(normalize_log(part).mean(0).astype(np.float16), (len(part), 1)) for part in counts]
    shares = [part / part.sum(1, keepdims=True) * part.sum(1).mean() for part in counts]
    excess = sum(part.var(0) - part.mean(0) for part in shares) / sum(part.mean(0) ** 2 for part in shares)  # (G,)
    weight = np.sqrt(np.maximum(excess, 0.01))
    return np.concatenate(counts), np.concatenate(levels), weight / weight.sum()


def make_batch(rng: np.random.Generator, corpus: tuple, spots: np.ndarray, n_genes: int) -> tuple[torch.Tensor, ...]:
    """Downsample, normalize and mask spots (B,): values, masked, depths, genes and targets of `n_genes` genes.

    A downsampled spot retains at least a fifth of its counts, so that genes remain visible.
    """
    counts, levels = (part[spots] for part in corpus[:2])
    share = np.where(rng.random(len(counts)) < DOWNSAMPLED, 0.2 + 0.8 * rng.beta(2, 2, len(counts)), 1)
    source = np.where(share[:, None] < 1, rng.binomial(counts, share[:, None]), counts)  # (B, G)
    target = counts.astype(np.float64)
    totals = np.maximum(np.stack([target.sum(1), source.sum(1)], 1), 2)  # (B, 2): T and S before their log10
    genes = np.sort(rng.choice(counts.shape[1], n_genes, replace=False, p=corpus[2]))
    values = np.log1p(1e4 * source[:, genes] / totals[:, 1:])  # (B, n_genes)
    targets = np.log1p(1e4 * target[:, genes] / totals[:, :1]) - levels[:, genes]
    masked = rng.random(values.shape) < MASKED
    arrays = (values, masked, np.log10(totals), genes, targets)
    return tuple(torch.from_numpy(a.astype(np.float32) if a.dtype == np.float64 else a) for a in arrays)


def compute_loss(model: MaskedModel, batch: tuple[torch.Tensor, ...]) -> torch.Tensor:
    """Return the mean squared error over masked genes."""
    *inputs, targets = batch
    masked = inputs[1]
    return F.mse_loss(model(*inputs)[masked], targets[masked])


def train(
    *,
    steps: int,
    seed: int,
    minutes: float | None = None,
    n_cohorts: int = 120,
    hidden_dim: int = 64,
    depth: int = 2,
    heads: int = 2,
    bins: int = 20,
    lr: float = 3e-3,
    spots: int = 32,
    genes: int = 500,
    every: int = 100,
) -> tuple[MaskedModel, list[dict]]:
    """Train for a number of steps or minutes.

    The last fifth uses fewer spots per step, with most or all of their genes, as `embed` does.

    Returns
    -------
    model : MaskedModel
        In eval mode.
    log : list of dict
        Rows with `COLUMNS`, one every `every` steps and one at the end.
    """
    torch.manual_seed(seed)
    rng = np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(KEY, 0)))
    training, validation = np.random.SeedSequence(seed, spawn_key=(KEY, 1)).spawn(2)
    corpus, other = draw_corpus(training.spawn(n_cohorts)), draw_corpus(validation.spawn(min(4, n_cohorts)))
    n_spots, n_genes = corpus[0].shape
    validation_rng = np.random.default_rng(0)
    drawn = validation_rng.permutation(len(other[0]))[:128]
    batches = [make_batch(validation_rng, other, part, 2 * genes) for part in np.array_split(drawn, 4)]

    config = EncoderConfig(hidden_dim, depth, heads, n_genes + 2, bins, 1.0, 102, 103)
    model = MaskedModel(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.01)
    begun, log, losses, step, seen, done = time.monotonic(), [], [], 0, 0, 0.0
    while done < 1:
        done = (time.monotonic() - begun) / (60 * minutes) if minutes else (step + 1) / steps
        n, width = (spots, genes) if done < 0.8 else (max(1, spots // 4), min(3 * genes, n_genes))
        decay = 0.51 + 0.49 * math.cos(math.pi * min(done, 1))
        optimizer.param_groups[0]["lr"] = lr * min((step + 1) / 100, decay)
        loss = compute_loss(model, make_batch(rng, corpus, rng.choice(n_spots, n), width))
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        step, seen = step + 1, seen + n
        losses.append(loss.item())
        if step % every == 0 or done >= 1:
            with torch.inference_mode():
                validation_loss = float(np.mean([compute_loss(model, batch).item() for batch in batches]))
            elapsed = (time.monotonic() - begun) / 60
            row = (step, seen, round(float(np.mean(losses)), 5), round(validation_loss, 5), round(elapsed, 2), seed)
            log.append(dict(zip(COLUMNS, row, strict=True)))
            print(log[-1], flush=True)
            losses = []
    return model.eval(), log


def write_checkpoint(model: MaskedModel, path: Path) -> None:
    """Write the model in the format of the published file, entry ``cell`` with config and tensors, in float16."""
    c = model.encoder.config
    encoder = {"module_type": "transformer", "hidden_dim": c.hidden_dim, "depth": c.depth, "heads": c.heads}
    rnaseq = {name: getattr(c, name) for name in ("seq_len", "bin_num", "bin_alpha", "mask_token_id", "pad_token_id")}
    options = {"mae_autobin": {"encoder": encoder}}
    config = {"model": "mae_autobin", "model_config": options, "dataset_config": {"rnaseq": rnaseq}}
    state = {f"model.{name}": t.half() for name, t in model.encoder.state_dict().items()}
    draft = path.with_suffix(".partial")
    torch.save({"cell": {"config": config, "state_dict": state}}, draft)
    os.replace(draft, path)


def main(arguments: list[str] | None = None) -> None:
    """Train, and write checkpoint and log."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=900, help="training steps; reproducible on the same machine")
    parser.add_argument("--minutes", type=float, help="of training, instead of --steps; drawing counts takes extra")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cohorts", type=int, default=120, help="number of training cohorts")
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--log", type=Path, default=FOLDER / "teacher_log.csv")
    o = parser.parse_args(arguments)
    model, log = train(steps=o.steps, minutes=o.minutes, seed=o.seed, n_cohorts=o.cohorts)
    write_checkpoint(model, o.out)
    with o.log.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(log)


if __name__ == "__main__":
    main()
