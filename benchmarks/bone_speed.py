"""Tiles per second and memory of Bone training, beside the plain loop with peft, and with other adapters in our loop.

One run measures every case in turn, round after round, on the same random weights and tiles:

- ``plain-*``: the loop that one would write with timm, peft and PyTorch. Tiles go through torchvision's ToTensor and
  Normalize in a DataLoader (in this process on a CPU, in workers with pinned memory for a GPU); float32 weights under
  autocast, the same heads and `transfer_loss`, Adam, the loss fetched once an epoch.
- the others: `peka_lite.fit`, with Bone, or with peft's layer in its place: what differs is the layer alone.

``bat`` is peft's MiSS with ``init_weights="bat"``, which computes what Bone does. ``lora-large`` has as many weights
as Bone, the other LoRA its rank equal to Bone's block size. ``none`` trains the heads alone. Writes
``results/bone_speed_{cpu or GPU}_{backbone}.json``; ``--floor`` prints what the work costs at least, and stops.

    python benchmarks/bone_speed.py --backbone mini --threads 1 --steps 2 --epochs 2 --seconds 240
    python benchmarks/bone_speed.py --backbone uni --batch-size 4 --steps 1 --epochs 1 --seconds 130
    python benchmarks/bone_speed.py --backbone h-optimus-0 --batch-size 32
    python benchmarks/bone_speed.py --backbone h-optimus-0 --batch-size 8 --cap-gib 16 --precision fp16
"""

from __future__ import annotations

import argparse
import copy
import ctypes
import gc
import json
import os
import platform
import re
import subprocess
import sys
import time
import warnings
from dataclasses import dataclass, field, replace
from datetime import date
from pathlib import Path

import numpy as np
import peft
import timm
import torch
import torchvision
from _machine import cpu_name
from peft import MissConfig, inject_adapter_in_model
from torch import nn
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

import peka_lite as pk
from peka_lite._core.device import default_device
from peka_lite.adapters.adapt import Adapter, adapt, lora_rank_like_bone, merge, orthogonal_term
from peka_lite.backbones.load import (
    BACKBONES,
    Backbone,
    build_network,
    extract_features,
    load_backbone,
    precision_for,
    preprocess,
)
from peka_lite.transfer.costs import GIB, student_cost
from peka_lite.transfer.fit import fit, transfer_loss
from peka_lite.transfer.model import TransferModel

TEACHER_DIM, CLASSES = 512, 16
TYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
WORKERS = {"cpu": 0, "cuda": 8}
# Dense rates of the datasheets, operations a second in the 16-bit type that each card trains in.
CARDS = {"T4": 65e12, "V100": 125e12, "A100": 312e12, "H100 SXM": 989e12, "H200": 989e12}
JOB = {"one fit": 30_414 * 50, "five fits": 30_414 * 50 * 5}  # the paper's breast spots and epochs


class NotCompiled(RuntimeError):
    """`fit` went on without `torch.compile`."""


@dataclass(frozen=True)
class Case:
    """A loop, a layer, and options of `fit`."""

    layer: str
    r: int
    plain: bool = False
    options: dict = field(default_factory=dict)


@dataclass(frozen=True)
class Data:
    """Random tiles (N, S, S, 3), teacher embeddings and labels."""

    tiles: np.ndarray
    teacher: np.ndarray
    labels: np.ndarray

    @classmethod
    def random(cls, n: int, side: int) -> Data:
        rng = np.random.default_rng(0)
        tiles = rng.integers(0, 256, (n, side, side, 3), dtype=np.uint8)
        return cls(tiles, rng.standard_normal((n, TEACHER_DIM), dtype=np.float32), rng.integers(0, CLASSES, n))


class PlainTiles(Dataset):
    """What one would write: a tile through torchvision's transforms, with its embedding and label."""

    def __init__(self, data: Data, spec: Backbone):
        self.data = data
        self.transform = transforms.Compose([transforms.ToTensor(), transforms.Normalize(spec.mean, spec.std)])

    def __len__(self) -> int:
        return len(self.data.tiles)

    def __getitem__(self, row: int):
        return self.transform(self.data.tiles[row]), self.data.teacher[row], self.data.labels[row]


def cases_of(spec: Backbone, batch: int) -> dict[str, Case]:
    """Name every case; the order is that of the report."""
    with torch.device("meta"):
        qkv = build_network(spec).blocks[0].attn.qkv
    r, large = spec.bone_r, lora_rank_like_bone(qkv.in_features, qkv.out_features, spec.bone_r)
    return {
        "bone": Case("bone", r),
        "plain-bat": Case("bat", r, plain=True),
        "plain-lora": Case("lora", r, plain=True),
        "plain-adalora": Case("adalora", r, plain=True),
        "bat": Case("bat", r),
        "lora": Case("lora", r),
        "lora-large": Case("lora", large),
        "adalora": Case("adalora", r),
        "none": Case("none", r),
        "bone-recompute": Case("bone", r, options={"recompute": True}),
        "bone-micro-batch": Case("bone", r, options={"micro_batch": max(1, batch // 2)}),
        "bone-compile": Case("bone", r, options={"compile": True}),
    }


def student(base: nn.Module, case: Case) -> TransferModel:
    """Copy the base, put a case's adapters on it, and heads on top."""
    model = copy.deepcopy(base, {id(base.spec): base.spec})
    if case.layer == "bat":
        n_base = sum(p.numel() for p in model.parameters())
        model.requires_grad_(False)
        pattern = r"blocks\.\d+\.attn\.qkv"
        layers = tuple(name for name, _ in model.named_modules() if re.fullmatch(pattern, name))
        inject_adapter_in_model(MissConfig(r=case.r, init_weights="bat", target_modules=pattern), model)
        model.adapter = Adapter("miss", layers, {"r": case.r}, n_base)
    else:
        adapt(model, case.layer, r=case.r, total_steps=10_000)  # AdaLoRA prunes at every step, as far from its end
    return TransferModel(model, teacher_dim=TEACHER_DIM, n_classes=CLASSES)


def plain_loop(model: TransferModel, data: Data, *, epochs: int, batch_size: int, device: str) -> list[dict]:
    """Train as one would without peka_lite; returns seconds, share of waiting and mean loss of every epoch."""
    spec, adapter, cuda = model.backbone.spec, model.backbone.adapter, device != "cpu"
    dtype = precision_for(spec, device)
    model.to(device).train()
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    scaler = torch.amp.GradScaler(device, enabled=dtype == torch.float16)
    workers = min(WORKERS[device], os.cpu_count() or 1)
    loader = DataLoader(
        PlainTiles(data, spec), batch_size, shuffle=True, num_workers=workers, pin_memory=cuda,
        persistent_workers=workers > 0,
    )  # fmt: skip
    rows, step = [], 0
    for _ in range(epochs):
        synchronize(device)
        begun, waited, total, batches = time.perf_counter(), 0.0, torch.zeros((), device=device), iter(loader)
        for _ in range(len(loader)):
            asked = time.perf_counter()
            batch = next(batches)
            waited += time.perf_counter() - asked
            x, teacher, y = (t.to(device, non_blocking=True) for t in batch)
            optimizer.zero_grad(set_to_none=True)
            with torch.autocast(device, dtype, enabled=dtype != torch.float32):
                z, logits = model(x)
            loss = transfer_loss(z, teacher, logits, y)[0]
            if adapter.method == "adalora":
                weight = adapter.tuner.peft_config["default"].orth_reg_weight
                loss = loss + weight * orthogonal_term(model.backbone)
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            step += 1
            if adapter.method == "adalora":
                adapter.tuner.update_and_allocate(step)
            total += loss.detach() * len(x)
        mean = total.item() / len(data.tiles)
        synchronize(device)
        seconds = time.perf_counter() - begun
        rows.append({"seconds": seconds, "waiting": waited / seconds, "loss": mean})
    return rows


def train(
    base: nn.Module, case: Case, data: Data, *, epochs: int, batch_size: int, device: str
) -> tuple[list[dict], float]:
    """Train a fresh copy of the base; returns a row for every epoch, and the processor's seconds for all of them."""
    model, begun = student(base, case), time.process_time()
    if case.plain:
        rows = plain_loop(model, data, epochs=epochs, batch_size=batch_size, device=device)
        return rows, time.process_time() - begun
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        # An epoch ends with its losses on the CPU, so that its seconds hold all of the GPU's work.
        history = fit(
            model, data.tiles, data.teacher, data.labels, epochs=epochs, batch_size=batch_size, device=device,
            **case.options,
        )  # fmt: skip
    refused = [str(w.message) for w in said if "torch.compile failed" in str(w.message)]
    if refused:
        raise NotCompiled(refused[0])
    return history[["seconds", "waiting", "loss"]].to_dict("records"), time.process_time() - begun


def attempt(base: nn.Module, case: Case, data: Data, *, epochs: int, batch_size: int, device: str) -> dict:
    """Train and leave the first epoch out; a case that does not fit or does not compile says so."""
    gc.collect()
    if device != "cpu":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    try:
        rows, worked = train(base, case, data, epochs=1 + epochs, batch_size=batch_size, device=device)
    except (MemoryError, torch.OutOfMemoryError, NotCompiled) as error:
        return {"failed": f"{type(error).__name__}: {str(error)[:500]}"}
    done = {key: [row[key] for row in rows[1:]] for key in ("seconds", "waiting", "loss")}
    if device == "cpu":
        done["processor_seconds"] = worked
    else:
        done["peak_gib"] = torch.cuda.max_memory_allocated() / GIB
    return done


def synchronize(device: str) -> None:
    if device != "cpu":
        torch.cuda.synchronize()


@torch.inference_mode()
def matrix_rate(device: str, dtype: torch.dtype) -> float:
    """Return the speed of one large square matrix product alone, in operations a second."""
    n, times = (2048, 3) if device == "cpu" else (4096, 50)
    a, b = torch.randn(2, n, n, device=device).to(dtype)
    a @ b
    synchronize(device)
    begun = time.perf_counter()
    for _ in range(times):
        a @ b
    synchronize(device)
    return 2 * n**3 * times / (time.perf_counter() - begun)


def resident_kib(key: str) -> int:
    return int(Path("/proc/self/status").read_text().split(f"{key}:")[1].split()[0])


def peak_alone(base: nn.Module, case: Case, data: Data, *, batch_size: int) -> float:
    """Return the peak of a training's own memory on a CPU in GiB: two steps in a process of their own (Linux).

    Counted from where weights are loaded and kernels have run once: adapters, Adam, activations and what else is live.
    """
    one = Data(data.tiles[:1], data.teacher[:1], data.labels[:1])
    train(base, case, one, epochs=1, batch_size=1, device="cpu")
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # start the high-water mark anew
    before = resident_kib("VmRSS")
    # The student is a copy of the base, made within: its weights are the same for every case, and taken off.
    train(base, case, data, epochs=1, batch_size=batch_size, device="cpu")
    copied = sum(t.numel() * t.element_size() for t in base.state_dict().values())
    return (resident_kib("VmHWM") - before) / 2**20 - copied / GIB


def kept_by_autograd(base: nn.Module, case: Case, data: Data, batch_size: int) -> float | None:
    """Return the bytes of one batch that wait for the backward pass, weights left out, in GiB; exact, on a CPU."""
    if case.options:
        return None  # recomputed blocks hide what they keep, and pieces keep in turn
    model, held = student(base, case).train(), {}
    own = {p.untyped_storage()._cdata for p in model.parameters()}

    def keep(tensor):
        storage = tensor.untyped_storage()
        held[storage._cdata] = storage  # held, so that no other takes its address
        return tensor

    x = preprocess(torch.from_numpy(data.tiles[:batch_size]), base.spec)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        kept = model(x)
    del kept
    return sum(storage.nbytes() for at, storage in held.items() if at not in own) / GIB


def memory_in_a_process(name: str, options: argparse.Namespace) -> dict:
    """Measure one case in a fresh process whose freed tensors go back to the system at once."""
    if not Path("/proc/self/clear_refs").exists() or name == "bone-compile":  # the compiler's memory is not training's
        return {}
    words = [sys.executable, __file__, "--memory-of", name, "--backbone", options.backbone, "--device", "cpu",
             "--batch-size", str(options.batch_size), "--threads", str(options.threads)]  # fmt: skip
    words += ["--precision", options.precision] if options.precision else []
    own = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    return json.loads(subprocess.run(words, env=own, stdout=subprocess.PIPE, text=True, check=True).stdout)


def evaluation(base: nn.Module, tiles: np.ndarray, *, batch_size: int, device: str, times: int) -> dict:
    """Time `embed_tiles` on a merged student beside a plain loop over a plain timm model with the same weights."""
    spec, dtype = base.spec, precision_for(base.spec, device)
    ours = student(base, Case("bone", spec.bone_r)).backbone
    for p in ours.parameters():
        if p.requires_grad:
            nn.init.normal_(p, std=0.01)
    merge(ours)
    theirs = build_network(spec)
    theirs.load_state_dict(ours.state_dict())
    theirs.spec = spec
    theirs.eval().to(device)

    @torch.inference_mode()
    def plain() -> np.ndarray:
        out = []
        for start in range(0, len(tiles), batch_size):
            x = preprocess(torch.from_numpy(tiles[start : start + batch_size]).to(device), spec)
            with torch.autocast(device, dtype, enabled=dtype != torch.float32):
                features = extract_features(theirs, x)
            out.append(features.float().cpu().numpy())
        return np.concatenate(out)

    runs = [lambda: pk.embed_tiles(ours, tiles, batch_size=batch_size, device=device), plain]
    difference = float(np.abs(runs[0]() - runs[1]()).max())  # first use, and proof that both do the same work
    seconds = [[], []]
    for k in range(times):
        for which in (0, 1) if k % 2 else (1, 0):
            begun = time.perf_counter()
            runs[which]()
            seconds[which].append(time.perf_counter() - begun)
    ratio = np.array(seconds[1]) / np.array(seconds[0])
    return {
        "tiles": len(tiles),
        "what": "tiles per second of embed_tiles on the merged student, over those of a plain loop on plain timm",
        "ratio": spread(ratio, 3),
        "tiles_per_second": {"ours": spread(len(tiles) / np.array(seconds[0])),
                             "plain": spread(len(tiles) / np.array(seconds[1]))},
        "max_abs_difference": float(f"{difference:.2g}"),
        "raw_seconds": {"ours": rounded(seconds[0]), "plain": rounded(seconds[1])},
    }  # fmt: skip


def spread(values, digits: int = 2) -> dict:
    """Return median and quartiles."""
    low, middle, high = np.percentile(np.asarray(values), [25, 50, 75])
    return {
        "median": round(float(middle), digits),
        "quartiles": [round(float(low), digits), round(float(high), digits)],
    }


def rounded(values, digits: int = 4) -> list[float]:
    return [round(float(v), digits) for v in values]


def ratio(runs: dict, slow: str, fast: str) -> dict | None:
    """Return how many times more tiles a second `fast` takes than `slow`, compared round by round.

    On a CPU also by the processor's seconds, which others' work on the machine disturbs less than the clock's.
    """
    both = [
        (a, b)
        for a, b in zip(runs.get(slow, ()), runs.get(fast, ()), strict=False)
        if "failed" not in a and "failed" not in b
    ]
    if not both:
        return None
    pairs = [np.median(a["seconds"]) / np.median(b["seconds"]) for a, b in both]
    done = spread(pairs, 3) | {"raw": rounded(pairs, 3)}
    if "processor_seconds" in both[0][0] and fast != "bone-compile":  # the compiler's seconds would be among them
        done["by_processor_seconds"] = spread([a["processor_seconds"] / b["processor_seconds"] for a, b in both], 3)
    return done


def report(case: Case, runs: list[dict], options: argparse.Namespace, rate: float, half: bool) -> dict:
    """Sum up the rounds of one case."""
    row = {"loop": "plain" if case.plain else "ours", "layer": case.layer, "r": case.r, **case.options}
    good = [run for run in runs if "failed" not in run]
    if not good:
        return row | {"failed": runs[-1]["failed"]}
    n, seconds = options.steps * options.batch_size, np.concatenate([run["seconds"] for run in good])
    # MiSS "bat" does Bone's work; a second forward pass of recompute is no work of the task, and not counted.
    cost = student_cost(options.backbone, {"bat": "bone"}.get(case.layer, case.layer), r=case.r, half=half)
    a_second = cost.operations(options.batch_size) * options.steps / seconds
    return row | {
        "tiles_per_second": spread(n / seconds),
        "peak_gib": good[-1].get("peak_gib"),
        "share_of_matrix_rate": spread(a_second / rate, 3),
        "share_waiting": spread(np.concatenate([run["waiting"] for run in good]), 4),
        "last_loss": round(good[-1]["loss"][-1], 6),
        "raw_seconds": [rounded(run["seconds"]) for run in good],
        "raw_processor_seconds": rounded(run["processor_seconds"] for run in good if "processor_seconds" in run),
    }


def floor() -> None:
    """Print what training Bone costs at least, for both of the paper's students."""
    names = ("uni", "h-optimus-0")
    costs = [student_cost(name) for name in names]
    print("| | " + " | ".join(names) + " |\n| --- | --- | --- |")
    sizes = [formula(name) for name in names]
    table = {
        "tokens a tile": [str(tokens) for tokens, _ in sizes],
        "forward, GFLOP a tile": [f"{c.forward / 1e9:.1f}" for c in costs],
        "the same by formula": [f"{flop / 1e9:.1f}" for _, flop in sizes],
        "backward, GFLOP a tile": [f"{c.backward / 1e9:.1f}" for c in costs],
        "W' and its block gradients, GFLOP a step": [
            f"{c.step_forward / 1e9:.1f} + {c.step_backward / 1e9:.1f}" for c in costs
        ],
        "weights, MiB": [f"{c.weights / 2**20:.0f}" for c in costs],
        "adapters with gradients and Adam, MiB": [f"{c.adapters / 2**20:.0f}" for c in costs],
        "W' kept, MiB a step": [f"{c.step_kept / 2**20:.0f}" for c in costs],
        "kept for backward, MiB a tile": [f"{c.kept / 2**20:.1f}" for c in costs],
        "the same with recompute": [f"{c.kept_recomputed / 2**20:.1f}" for c in costs],
        "32 tiles at once, GiB (with recompute)": [
            f"{c.memory(32) / GIB:.1f} ({c.memory(32, recompute=True) / GIB:.1f})" for c in costs
        ],
    }
    for what, cells in table.items():
        print(f"| {what} | " + " | ".join(cells) + " |")
    print("\n| card, TFLOP/s | " + " | ".join(f"{name}, {job}" for name in names for job in JOB) + " |")
    print("| --- |" + " --- |" * len(names) * len(JOB))
    for card, rate in CARDS.items():
        cells = []
        for c in costs:
            for tiles in JOB.values():
                hours = c.operations(32) * tiles / 32 / rate / 3600
                cells.append(f"{hours:.2f} / {hours / 0.45:.2f}")
        print(f"| {card}, {rate / 1e12:.0f} | " + " | ".join(cells) + " |")


def formula(name: str) -> tuple[int, int]:
    """Return a tile's tokens, and its forward operations counted by hand from the widths of the layers."""
    with torch.device("meta"):
        model = build_network(BACKBONES[name])
    D, block, patches = model.embed_dim, model.blocks[0], model.patch_embed.num_patches
    L = patches + model.num_prefix_tokens
    weights = 3 * D * D + D * D + D * block.mlp.fc1.out_features + block.mlp.fc2.in_features * D
    attention = 4 * L * L * D  # queries with keys, then weights with values
    side = model.patch_embed.patch_size[0]
    return L, len(model.blocks) * (2 * L * weights + attention) + 2 * patches * 3 * side * side * D


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--floor", action="store_true", help="print what the work costs at least, and stop")
    parser.add_argument("--device", default=default_device(), choices=("cpu", "cuda"))
    able = [name for name, row in BACKBONES.items() if row.bone_r]
    parser.add_argument("--backbone", choices=able, help="mini on a CPU, h-optimus-0 on a GPU unless told")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--steps", type=int, help="steps an epoch: 4 on a CPU, 20 on a GPU unless told")
    parser.add_argument("--epochs", type=int, default=3, help="timed epochs of a case in a round, after one untimed")
    parser.add_argument("--seconds", type=float, default=300, help="begin no round after this many")
    parser.add_argument("--evaluations", type=int, default=20, help="times that the evaluation is repeated")
    parser.add_argument("--evaluation-tiles", type=int, default=512)
    parser.add_argument("--cases", type=lambda text: text.split(","), help="some of the cases; all by default")
    parser.add_argument("--precision", choices=TYPES, help="compute type; the registry row's unless told")
    parser.add_argument("--cap-gib", type=float, help="let this process have no more of the GPU's memory")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path, help="result file")
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.floor:
        return floor()
    torch.set_num_threads(options.threads)
    device = options.device
    options.backbone = options.backbone or ("mini" if device == "cpu" else "h-optimus-0")
    options.steps = options.steps or (4 if device == "cpu" else 20)
    spec = BACKBONES[options.backbone]
    if options.precision:
        spec = replace(spec, precision=dict.fromkeys(spec.precision, TYPES[options.precision]))
    if options.cap_gib and device == "cpu":
        parser.error("--cap-gib bounds a GPU's memory; there is none here")
    if options.cap_gib:
        whole = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, options.cap_gib * GIB / whole))
    cases = cases_of(spec, options.batch_size)
    if unknown := set(options.cases or ()) - set(cases):
        parser.error(f"unknown cases {', '.join(sorted(unknown))}; known: {', '.join(cases)}")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # weights are random, and it says so
        base = load_backbone(spec, weights="random")
    if options.memory_of:
        data = Data.random(2 * options.batch_size, spec.input_size)
        case, batch = cases[options.memory_of], options.batch_size
        peak = peak_alone(base, case, data, batch_size=batch)
        kept = kept_by_autograd(base, case, data, batch)
        print(json.dumps({"peak_gib": round(peak, 4), "kept_by_autograd_gib": kept and round(kept, 4)}))
        return None

    chosen = {name: case for name, case in cases.items() if name in (options.cases or cases)}
    data = Data.random(options.steps * options.batch_size, spec.input_size)
    dtype = precision_for(spec, device)
    rates, runs, begun, rounds = [], {name: [] for name in chosen}, time.perf_counter(), 0
    while not rounds or time.perf_counter() - begun < options.seconds:
        # There and back again, so that no case is always the first, or the last.
        for name in list(chosen)[:: -1 if rounds % 2 else 1]:
            if name == "bone-compile" and rounds > 1:
                continue  # two rounds will do: it compiles anew in each
            rates.append(matrix_rate(device, dtype))
            run = attempt(base, chosen[name], data, epochs=options.epochs, batch_size=options.batch_size, device=device)
            runs[name].append(run)
            print(name, run.get("failed") or rounded(run["seconds"], 3), flush=True)
        rounds += 1
    rate = float(np.median(rates))
    rows = {name: report(case, runs[name], options, rate, dtype != torch.float32) for name, case in chosen.items()}
    if device == "cpu":
        for name, row in rows.items():
            row |= memory_in_a_process(name, options)
            print(name, {key: row.get(key) for key in ("peak_gib", "kept_by_autograd_gib")}, flush=True)
    result = {
        "date": date.today().isoformat(),
        "device": torch.cuda.get_device_name() if device != "cpu" else f"cpu, {options.threads} threads, {cpu_name()}",
        "versions": {"python": platform.python_version()}
        | {m.__name__: m.__version__ for m in (torch, timm, peft, torchvision, pk)},
        "backbone": options.backbone,
        "input_size": spec.input_size,
        "compute_type": str(dtype).removeprefix("torch."),
        "batch_size": options.batch_size,
        "steps_an_epoch": options.steps,
        "rounds": rounds,
        "cap_gib": options.cap_gib,
        "loader_workers_of_the_plain_loop": min(WORKERS[device], os.cpu_count() or 1),
        "matrix_product_alone_tflop_per_second": spread(np.array(rates) / 1e12, 3),
        "what": "seconds of whole epochs; ratios of tiles per second, each round compared in itself",
        "what_peak_gib_is": "largest allocation, weights within it" if device != "cpu" else
        "highest resident memory above that before training, weights left out, each case in a process of its own",
        "ratios": {
            "our loop with bone / plain loop with peft's bat": ratio(runs, "plain-bat", "bone"),
            "our loop with bone / plain loop with peft's lora": ratio(runs, "plain-lora", "bone"),
            "our loop with bone / plain loop with peft's adalora": ratio(runs, "plain-adalora", "bone"),
            "our loop / plain loop, both with peft's bat": ratio(runs, "plain-bat", "bat"),
            "our loop / plain loop, both with peft's lora": ratio(runs, "plain-lora", "lora"),
            "our loop / plain loop, both with peft's adalora": ratio(runs, "plain-adalora", "adalora"),
            "in our loop, bone / peft's bat": ratio(runs, "bat", "bone"),
            "in our loop, bone / lora of equal r": ratio(runs, "lora", "bone"),
            "in our loop, bone / lora of equal size": ratio(runs, "lora-large", "bone"),
            "in our loop, bone / adalora": ratio(runs, "adalora", "bone"),
            "in our loop, bone / heads alone": ratio(runs, "none", "bone"),
            "bone with recompute / without": ratio(runs, "bone", "bone-recompute"),
            "bone in two pieces a batch / whole": ratio(runs, "bone", "bone-micro-batch"),
            "bone compiled / not": ratio(runs, "bone", "bone-compile"),
        },
        "cases": rows,
        "evaluation": None if options.cap_gib else evaluation(  # two students at once, and a cap is about training
            base, Data.random(options.evaluation_tiles, spec.input_size).tiles, batch_size=64, device=device,
            times=options.evaluations,
        ),
    }  # fmt: skip
    where = "cpu" if device == "cpu" else re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name().lower())
    marks = [options.precision, options.cap_gib and f"{options.cap_gib:g}gib"]
    stem = "_".join(["bone_speed", where, options.backbone, *filter(None, marks)])
    out = options.out or Path(__file__).with_name("results") / f"{stem}.json"
    out.parent.mkdir(exist_ok=True)
    out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps({name: done and done["median"] for name, done in result["ratios"].items()}, indent=1))
    print(f"written to {out}")
    return None


if __name__ == "__main__":
    main()
