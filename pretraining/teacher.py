"""Pretrain ``scfoundation-mini``, a small scFoundation, on counts of the embedded cohort's generator.

The objective is scFoundation's own (Hao et al. 2024, doi:10.1038/s41592-024-02305-7): 30 % of a spot's genes are
masked, expressed ones and zeros alike; the encoder sees the expressed genes that are left, and the depths T and S; the
masked values are told, and judged by their squared error. Half of the spots are thinned first, so that S is below T and
the model learns what depth means. Other than in the paper are the decoder (`MaskedModel`), what is told of a gene
(`draw_corpus`), and that a step looks at a random part of the genes only, which is faster.

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

HERE = Path(__file__).parent
OUT = HERE.parent / "peka_lite" / "teachers" / "weights" / "scfoundation_mini.ckpt"
# Cohorts draw from children 0, 1 and 2 of their seed; no cohort with a seed below 2**128 draws from this child.
KEY = 0x7EAC
MASKED = 0.3  # share of the genes
RANK = 64  # of the decoder
THINNED = 0.5  # share of the spots
COLUMNS = ("step", "spots", "loss", "held_out_loss", "minutes", "seed")


def draw_cohort(stream: np.random.SeedSequence, *, n_slides: int = 4, n_spots: int = 120) -> tuple[np.ndarray, ...]:
    """Draw a cohort's counts without its images: each slide is another patient's.

    Returns
    -------
    counts : numpy.ndarray
        (n_slides * n_spots, n_genes) uint16, genes sorted by symbol.
    mixture : numpy.ndarray
        (n_slides * n_spots, n_domains) float64, the truth.
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
        # Patients differ more in depth than those of one cohort, so that the model knows many depths.
        depth = np.exp(rng.normal(0, 0.3)) * mini_genes.draw_depth(rng, labels.shape, cell)
        of_kind = {"visible": mixture, "invisible": niche, "noise": np.ones((n_spots, 1))}
        drawn, _ = mini_genes.draw_counts(rng, var, mini_genes.draw_patient_profiles(rng, profiles), of_kind, depth)
        counts.append(np.minimum(drawn, np.iinfo(np.uint16).max).astype(np.uint16))
        mixtures.append(mixture)
    return np.concatenate(counts), np.concatenate(mixtures)


class MaskedModel(nn.Module):
    """The encoder that is kept, and the decoder that only training needs.

    The decoder is lighter than scFoundation's: a gene's value is the inner product of what the pooled encoding says
    with what the gene's own vector says. So the pooled encoding, which a teacher gives away, must carry all of it.
    """

    def __init__(self, config: EncoderConfig):
        super().__init__()
        width = config.hidden_dim
        self.encoder = Encoder(config)
        self.of_spot = nn.Sequential(nn.LayerNorm(4 * width), nn.Linear(4 * width, RANK))
        self.of_gene, self.level = nn.Linear(width, RANK), nn.Linear(width, 1)
        bins = self.encoder.token_emb
        # Adam's steps are small beside PyTorch's 1. Bins begin smaller yet: S and T are to tell of genes, not of depth.
        nn.init.normal_(self.encoder.pos_emb.weight, std=0.3)
        nn.init.normal_(bins.emb.weight, std=0.1)
        with torch.no_grad():
            self.encoder.pos_emb.weight[config.n_genes :] = 0
            # Each bin begins to answer at another value, else all values look alike at first.
            bins.mlp.weight.copy_(torch.randn_like(bins.mlp.weight) * 2)
            bins.mlp.bias.copy_(-bins.mlp.weight[:, 0] * torch.linspace(0, 6, config.bin_num))

    def forward(self, values, masked, depths, genes):
        """Tell every gene's value, (B, n), from values (B, n) where not masked (B, n), and T and S, depths (B, 2)."""
        seen = (values > 0) & ~masked
        lengths = seen.sum(1) + 2
        order = torch.argsort(~seen, dim=1, stable=True)[:, : int(lengths.max())]  # seen genes first
        at = torch.arange(2) + lengths[:, None] - 2  # (B, 2): T and S come last
        v = F.pad(values.gather(1, order), (0, 2)).scatter(1, at, depths)
        places = F.pad(genes[order], (0, 2)).scatter(1, at, torch.arange(2).expand_as(at) + self.encoder.config.n_genes)
        longest = int(lengths.max())
        x = self.encoder(v[:, :longest], places[:, :longest], lengths)  # (B, longest, d)
        spot, gene = pool_tokens(x, lengths), self.encoder.pos_emb(genes)  # (B, 4d), (n, d)
        return self.level(gene).T + self.of_spot(spot) @ self.of_gene(gene).T / RANK**0.5


def log_normal(counts: np.ndarray) -> np.ndarray:
    """Return log1p of counts per 10,000, (N, G) float32."""
    return np.log1p(1e4 * counts / counts.sum(1, keepdims=True)).astype(np.float32)


def draw_corpus(streams) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Draw cohorts: counts (N, G), the level of every gene in each spot's cohort (N, G), and each gene's chance (G,).

    Every cohort draws the genes' levels anew, as no real tissue would: no context can tell them. So what is to be told
    of a masked gene is how far it lies from its level, the mean of its values in the cohort. A gene is looked at the
    more often, the more its rate varies within cohorts (squared coefficient of variation, without counting noise).
    """
    counts = [draw_cohort(stream)[0] for stream in streams]
    levels = [np.tile(log_normal(part).mean(0).astype(np.float16), (len(part), 1)) for part in counts]
    shares = [part / part.sum(1, keepdims=True) * part.sum(1).mean() for part in counts]
    excess = sum(part.var(0) - part.mean(0) for part in shares) / sum(part.mean(0) ** 2 for part in shares)  # (G,)
    chance = np.sqrt(np.maximum(excess, 0.01))
    return np.concatenate(counts), np.concatenate(levels), chance / chance.sum()


def make_batch(rng: np.random.Generator, corpus: tuple, spots: np.ndarray, n_genes: int) -> tuple[torch.Tensor, ...]:
    """Thin, normalize and mask some spots (B,): values, masked, depths, genes and targets of `n_genes` genes.

    A thinned spot keeps a fifth of its counts at least: with hardly any there would be no gene to see.
    """
    counts, levels = (part[spots] for part in corpus[:2])
    share = np.where(rng.random(len(counts)) < THINNED, 0.2 + 0.8 * rng.beta(2, 2, len(counts)), 1)
    source = np.where(share[:, None] < 1, rng.binomial(counts, share[:, None]), counts)  # (B, G)
    target = counts.astype(np.float64)
    totals = np.maximum(np.stack([target.sum(1), source.sum(1)], 1), 2)  # (B, 2): T and S before their log10
    genes = np.sort(rng.choice(counts.shape[1], n_genes, replace=False, p=corpus[2]))
    values = np.log1p(1e4 * source[:, genes] / totals[:, 1:])  # (B, n_genes)
    targets = np.log1p(1e4 * target[:, genes] / totals[:, :1]) - levels[:, genes]
    masked = rng.random(values.shape) < MASKED
    arrays = (values, masked, np.log10(totals), genes, targets)
    return tuple(torch.from_numpy(a.astype(np.float32) if a.dtype == np.float64 else a) for a in arrays)


def loss_of(model: MaskedModel, batch: tuple[torch.Tensor, ...]) -> torch.Tensor:
    """Return the mean squared error over masked genes."""
    *given, targets = batch
    masked = given[1]
    return F.mse_loss(model(*given)[masked], targets[masked])


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
    """Train for a number of steps, or instead some minutes.

    The last fifth takes few spots a step, with most or all of their genes, as `embed` does.

    Returns
    -------
    model : MaskedModel
        In eval mode.
    log : list of dict
        A row every `every` steps and one at the end, with `COLUMNS`.
    """
    torch.manual_seed(seed)
    rng = np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(KEY, 0)))
    taught, held_out = np.random.SeedSequence(seed, spawn_key=(KEY, 1)).spawn(2)
    corpus, unseen = draw_corpus(taught.spawn(n_cohorts)), draw_corpus(held_out.spawn(min(4, n_cohorts)))
    n_spots, n_genes = corpus[0].shape
    exam_rng = np.random.default_rng(0)
    drawn = exam_rng.permutation(len(unseen[0]))[:128]
    exam = [make_batch(exam_rng, unseen, part, 2 * genes) for part in np.array_split(drawn, 4)]

    config = EncoderConfig(hidden_dim, depth, heads, n_genes + 2, bins, 1.0, 102, 103)
    model = MaskedModel(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.01)
    begun, log, losses, step, seen, done = time.monotonic(), [], [], 0, 0, 0.0
    while done < 1:
        done = (time.monotonic() - begun) / (60 * minutes) if minutes else (step + 1) / steps
        n, width = (spots, genes) if done < 0.8 else (max(1, spots // 4), min(3 * genes, n_genes))
        fall = 0.51 + 0.49 * math.cos(math.pi * min(done, 1))
        optimizer.param_groups[0]["lr"] = lr * min((step + 1) / 100, fall)
        loss = loss_of(model, make_batch(rng, corpus, rng.choice(n_spots, n), width))
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        step, seen = step + 1, seen + n
        losses.append(loss.item())
        if step % every == 0 or done >= 1:
            with torch.inference_mode():
                judged = float(np.mean([loss_of(model, batch).item() for batch in exam]))
            spent = (time.monotonic() - begun) / 60
            row = (step, seen, round(float(np.mean(losses)), 5), round(judged, 5), round(spent, 2), seed)
            log.append(dict(zip(COLUMNS, row, strict=True)))
            print(log[-1], flush=True)
            losses = []
    return model.eval(), log


def write_checkpoint(model: MaskedModel, path: Path) -> None:
    """Write the model as the published file is laid out: entry ``cell``, a config and tensors, here in float16."""
    c = model.encoder.config
    own = {"encoder": {"module_type": "transformer", "hidden_dim": c.hidden_dim, "depth": c.depth, "heads": c.heads}}
    rnaseq = {name: getattr(c, name) for name in ("seq_len", "bin_num", "bin_alpha", "mask_token_id", "pad_token_id")}
    config = {"model": "mae_autobin", "model_config": {"mae_autobin": own}, "dataset_config": {"rnaseq": rnaseq}}
    state = {f"model.{name}": t.half() for name, t in model.encoder.state_dict().items()}
    draft = path.with_suffix(".partial")
    torch.save({"cell": {"config": config, "state_dict": state}}, draft)
    os.replace(draft, path)


def main(arguments: list[str] | None = None) -> None:
    """Train and write checkpoint and log."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=900, help="the same weights again, on the same machine")
    parser.add_argument("--minutes", type=float, help="of training, instead of steps; drawing the counts comes on top")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cohorts", type=int, default=120, help="how many are drawn to learn from")
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--log", type=Path, default=HERE / "teacher_log.csv")
    o = parser.parse_args(arguments)
    model, log = train(steps=o.steps, minutes=o.minutes, seed=o.seed, n_cohorts=o.cohorts)
    write_checkpoint(model, o.out)
    with o.log.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(log)


if __name__ == "__main__":
    main()
