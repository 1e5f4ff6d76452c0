"""Compare spots per second of the scFoundation teacher with PyTorch's encoder layers run one spot at a time.

Both have the same random weights (12 layers of width 768, as the published model), threads and real spots, in one run;
only the transformer differs. Writes ``results/scfoundation_speed_{device}.json``.

    python benchmarks/scfoundation_speed.py --cohort FOLDER --slides HER2_C2,HER2_C3 --genes GENES.tsv --spots 12
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import time
from datetime import date
from pathlib import Path

import anndata as ad
import numpy as np
import torch
from _machine import cpu_name
from torch import nn

import peka_lite as pk
from peka_lite._core.device import PRECISION, default_device
from peka_lite.teachers._encoder import pool_tokens

BUDGETS = {"cpu": (4_096, 16_384), "cuda": (16_384, 65_536, 262_144)}


def draw_spots(cohort: str, slides: list[str] | None, n: int, seed: int = 0) -> ad.AnnData:
    """Draw spots of a real cohort after quality control."""
    data = pk.open_cohort(cohort, slides=slides).adata
    rows = np.random.default_rng(seed).choice(data.n_obs, size=min(n, data.n_obs), replace=False)
    return data[np.sort(rows)].copy()


class Peer:
    """Reference: `nn.TransformerEncoderLayer` in eval mode, one spot at a time, float32."""

    def __init__(self, teacher: pk.teachers.ScFoundation, device: str):
        c = teacher.encoder.config
        self.teacher, self.device = teacher, device
        self.front = teacher.encoder.to(device)
        self.layers = []
        for ours in teacher.encoder.encoder["transformer_encoder"]:
            layer = nn.TransformerEncoderLayer(c.hidden_dim, c.heads, 4 * c.hidden_dim, batch_first=True)
            layer.load_state_dict(ours.state_dict())
            self.layers.append(layer.eval().requires_grad_(False).to(device))

    @torch.no_grad()
    def embed(self, adata: ad.AnnData) -> np.ndarray:
        tokens, out = self.teacher.tokens(adata), []
        for row in range(adata.n_obs):
            values, positions, lengths = (torch.from_numpy(a).to(self.device) for a in tokens.padded(np.array([row])))
            x = self.front.token_emb(values) + self.front.pos_emb(positions)
            for layer in self.layers:
                x = layer(x)
            out.append(pool_tokens(self.front.encoder["norm"](x), lengths).cpu().numpy())
        return np.concatenate(out)


def count_operations(lengths: np.ndarray, size: dict) -> float:
    """Return the transformer's floating-point operations on spots of these lengths, in 1e9."""
    L, width = lengths.astype(float), size["hidden_dim"]
    return size["depth"] * (24 * width**2 * L.sum() + 4 * width * (L**2).sum()) / 1e9


@torch.inference_mode()
def measure_matrix_rate(device: str, width: int) -> float:
    """Return the speed of the first feed-forward matrix product, float32, in 1e9 operations per second."""
    x, layer = torch.randn(4096, width, device=device), nn.Linear(width, 4 * width, device=device)
    seconds = []
    for _ in range(8):
        begun = time.perf_counter()
        layer(x)
        if device != "cpu":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - begun)
    return 8 * 4096 * width**2 / min(seconds) / 1e9


def measure(embed, adata: ad.AnnData, device: str) -> tuple[np.ndarray, dict]:
    """Return embeddings, and spots per second with the peak of added memory."""
    embed(adata[:1])  # selects kernels
    before = reset_peak(device)
    begun = time.perf_counter()
    E = embed(adata)
    seconds = time.perf_counter() - begun
    peak = (read_peak(device) - before) / 2**30
    rate = round(adata.n_obs / seconds, 4)
    return E, {"spots_per_second": rate, "seconds": round(seconds, 2), "peak_gib": round(peak, 3)}


def reset_peak(device: str) -> int:
    if device != "cpu":
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    try:
        Path("/proc/self/clear_refs").write_text("5")  # Linux: reset the high-water mark
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return read_peak(device)


def read_peak(device: str) -> int:
    if device != "cpu":
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated()
    lines = Path("/proc/self/status").read_text().splitlines() if os.path.exists("/proc/self/status") else []
    mark = next((int(line.split()[1]) for line in lines if line.startswith("VmHWM")), None)
    return (mark or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss) * 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cohort", required=True, help="folder in HEST-1k's layout")
    parser.add_argument("--slides", type=lambda text: text.split(","), help="comma-separated ids; all by default")
    parser.add_argument("--genes", required=True, help="vocabulary, a TSV file or JSON list")
    parser.add_argument("--spots", type=int, default=12)
    parser.add_argument("--device", default=default_device())
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    device = options.device
    adata = draw_spots(options.cohort, options.slides, options.spots)
    size = {"hidden_dim": 768, "depth": 12, "heads": 12}
    exact = dict.fromkeys(PRECISION, torch.float32)
    teacher = pk.teachers.ScFoundation.random(options.genes, **size, precision=exact)
    lengths = teacher.tokens(adata).lengths

    bound = measure_matrix_rate(device, size["hidden_dim"])
    print(f"one matrix product alone: {bound:.0f} GFLOP/s", flush=True)
    reference, peer = measure(Peer(teacher, device).embed, adata, device)
    print("peer, one spot at a time", peer, flush=True)
    teacher.encoder.cpu()
    rows = []
    precisions = {"float32": exact} | ({"half": PRECISION} if device != "cpu" else {})
    for name, precision in precisions.items():
        ours = pk.teachers.ScFoundation.random(options.genes, **size, precision=precision)
        for budget in BUDGETS[torch.device(device).type]:
            E, row = measure(lambda a, b=budget, t=ours: t.embed(a, device=device, max_tokens=b), adata, device)
            row |= {"precision": name, "max_tokens": budget}
            row["ratio"] = round(row["spots_per_second"] / peer["spots_per_second"], 2)
            row["gflop_per_second"] = round(count_operations(lengths, size) / row["seconds"])
            row["max_abs_difference"] = float(f"{np.abs(E - reference).max():.2g}")
            rows.append(row)
            print(row, flush=True)
    result = {
        "date": date.today().isoformat(),
        "device": torch.cuda.get_device_name() if device != "cpu" else f"cpu, {options.threads} threads, {cpu_name()}",
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "peka_lite": pk.__version__},
        "model": size,
        "spots": int(adata.n_obs),
        "tokens_per_spot": {str(q): int(np.percentile(lengths, q)) for q in (0, 25, 50, 75, 100)},
        "matrix_product_alone_gflop_per_second": round(bound),
        "peer": peer
        | {"gflop_per_second": round(count_operations(lengths, size) / peer["seconds"])}
        | {"what": "nn.TransformerEncoderLayer, eval mode, no_grad, one spot at a time, float32"},
        "ours": rows,
    }
    out = Path(__file__).with_name("results") / f"scfoundation_speed_{torch.device(device).type}.json"
    out.parent.mkdir(exist_ok=True)
    out.write_text(json.dumps(result, indent=1) + "\n")
    print(f"written to {out}")


if __name__ == "__main__":
    main()
