"""Compare tiles per second and memory of Bone training with a plain peft loop, and with other adapters in our loop.

Cases are measured in turn, round after round, on the same random weights and tiles:

- ``plain-*``: a plain loop with timm, peft and PyTorch. Tiles go through torchvision's ToTensor and Normalize in a
  DataLoader (in this process on a CPU, in workers with pinned memory for a GPU); float32 weights under autocast, the
  same heads and `transfer_loss`, Adam, the loss fetched once per epoch.
- the others: `peka_lite.fit` with Bone or a peft layer; only the layer differs.

``bat`` is peft's MiSS with ``init_weights="bat"``, which computes the same update as Bone. ``lora-large`` has as many
weights as Bone; the rank of ``lora`` is Bone's block size. ``none`` trains the heads only. Writes
``results/bone_speed_{cpu or GPU}_{backbone}.json``; ``--floor`` prints the lower bounds of the cost and exits.

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
from peka_lite.transfer import fit, transfer_loss
from peka_lite.transfer.costs import GIB, student_cost
from peka_lite.transfer.model import TransferModel

TEACHER_DIM, CLASSES = 512, 16
TYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
WORKERS = {"cpu": 0, "cuda": 8}
# Dense 16-bit rates from the datasheets, operations per second.
CARDS = {"T4": 65e12, "V100": 125e12, "A100": 312e12, "H100 SXM": 989e12, "H200": 989e12}
JOB = {"one fit": 30_414 * 50, "five fits": 30_414 * 50 * 5}  # the paper's breast spots and epochs


class NotCompiled(RuntimeError):
    """`fit` fell back to training without `torch.compile`."""


@dataclass(frozen=True)
class Case:
    """Loop, layer and options of `fit`."""

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
    """Tiles through torchvision's transforms, with their embeddings and labels."""

    def __init__(self, data: Data, spec: Backbone):
        self.data = data
        self.transform = transforms.Compose([transforms.ToTensor(), transforms.Normalize(spec.mean, spec.std)])

    def __len__(self) -> int:
        return len(self.data.tiles)

    def __getitem__(self, row: int):
        return self.transform(self.data.tiles[row]), self.data.teacher[row], self.data.labels[row]


def list_cases(spec: Backbone, batch: int) -> dict[str, Case]:
    """Return the cases by name, in the order of the report."""
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


def build_student(base: nn.Module, case: Case) -> TransferModel:
    """Copy the base model and add the adapters of a case and the heads."""
    model = copy.deepcopy(base, {id(base.spec): base.spec})
    if case.layer == "bat":
        n_base = sum(p.numel() for p in model.parameters())
        model.requires_grad_(False)
        pattern = r"blocks\.\d+\.attn\.qkv"
        layers = tuple(name for name, _ in model.named_modules() if re.fullmatch(pattern, name))
        inject_adapter_in_model(MissConfig(r=case.r, init_weights="bat", target_modules=pattern), model)
        model.adapter = Adapter("miss", layers, {"r": case.r}, n_base)
    else:
        adapt(model, case.layer, r=case.r, total_steps=10_000)  # many steps: AdaLoRA then prunes at each step
    return TransferModel(model, teacher_dim=TEACHER_DIM, n_classes=CLASSES)


def train_plain(model: TransferModel, data: Data, *, epochs: int, batch_size: int, device: str) -> list[dict]:
    """Train without peka_lite; return seconds, share of waiting and mean loss of each epoch."""
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
        begun, waiting, total, batches = time.perf_counter(), 0.0, torch.zeros((), device=device), iter(loader)
        for _ in range(len(loader)):
            start = time.perf_counter()
            batch = next(batches)
            waiting += time.perf_counter() - start
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
        rows.append({"seconds": seconds, "waiting": waiting / seconds, "loss": mean})
    return rows


def train(
    base: nn.Module, case: Case, data: Data, *, epochs: int, batch_size: int, device: str
) -> tuple[list[dict], float]:
    """Train a copy of the base; return a row per epoch and the total CPU seconds."""
    model, begun = build_student(base, case), time.process_time()
    if case.plain:
        rows = train_plain(model, data, epochs=epochs, batch_size=batch_size, device=device)
        return rows, time.process_time() - begun
    with warnings.catch_warnings(record=True) as messages:
        warnings.simplefilter("always")
        # An epoch ends by fetching its losses, so its seconds include all GPU work.
        history = fit(
            model, data.tiles, data.teacher, data.labels, epochs=epochs, batch_size=batch_size, device=device,
            **case.options,
        )  # fmt: skip
    failures = [str(w.message) for w in messages if "torch.compile failed" in str(w.message)]
    if failures:
        raise NotCompiled(failures[0])
    return history[["seconds", "waiting", "loss"]].to_dict("records"), time.process_time() - begun


def measure(base: nn.Module, case: Case, data: Data, *, epochs: int, batch_size: int, device: str) -> dict:
    """Train and drop the first epoch; report a case that runs out of memory or does not compile as failed."""
    gc.collect()
    if device != "cpu":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    try:
        rows, cpu_seconds = train(base, case, data, epochs=1 + epochs, batch_size=batch_size, device=device)
    except (MemoryError, torch.OutOfMemoryError, NotCompiled) as error:
        return {"failed": f"{type(error).__name__}: {str(error)[:500]}"}
    result = {key: [row[key] for row in rows[1:]] for key in ("seconds", "waiting", "loss")}
    if device == "cpu":
        result["processor_seconds"] = cpu_seconds
    else:
        result["peak_gib"] = torch.cuda.max_memory_allocated() / GIB
    return result


def synchronize(device: str) -> None:
    if device != "cpu":
        torch.cuda.synchronize()


@torch.inference_mode()
def measure_matrix_rate(device: str, dtype: torch.dtype) -> float:
    """Return the speed of one large square matrix product, in operations per second."""
    n, times = (2048, 3) if device == "cpu" else (4096, 50)
    a, b = torch.randn(2, n, n, device=device).to(dtype)
    a @ b
    synchronize(device)
    begun = time.perf_counter()
    for _ in range(times):
        a @ b
    synchronize(device)
    return 2 * n**3 * times / (time.perf_counter() - begun)


def read_memory_kib(key: str) -> int:
    return int(Path("/proc/self/status").read_text().split(f"{key}:")[1].split()[0])


def measure_peak(base: nn.Module, case: Case, data: Data, *, batch_size: int) -> float:
    """Return the peak memory of two training steps on a CPU in GiB, without the weights (Linux).

    The baseline is taken after loading weights and running kernels once. Needs a separate process.
    """
    one = Data(data.tiles[:1], data.teacher[:1], data.labels[:1])
    train(base, case, one, epochs=1, batch_size=1, device="cpu")
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # reset the high-water mark
    before = read_memory_kib("VmRSS")
    # `train` copies the base; the copied weights are subtracted.
    train(base, case, data, epochs=1, batch_size=batch_size, device="cpu")
    copied = sum(t.numel() * t.element_size() for t in base.state_dict().values())
    return (read_memory_kib("VmHWM") - before) / 2**20 - copied / GIB


def measure_saved_tensors(base: nn.Module, case: Case, data: Data, batch_size: int) -> float | None:
    """Return the memory that autograd saves for one batch in GiB, without weights; exact, on a CPU."""
    if case.options:
        return None  # hooks do not see recomputed blocks, and micro-batches save in turn
    model, storages = build_student(base, case).train(), {}
    weights = {p.untyped_storage()._cdata for p in model.parameters()}

    def record(tensor):
        storage = tensor.untyped_storage()
        storages[storage._cdata] = storage  # a reference, so that its address is not reused
        return tensor

    x = preprocess(torch.from_numpy(data.tiles[:batch_size]), base.spec)
    with torch.autograd.graph.saved_tensors_hooks(record, lambda tensor: tensor):
        output = model(x)
    del output
    return sum(storage.nbytes() for at, storage in storages.items() if at not in weights) / GIB


def measure_in_process(name: str, options: argparse.Namespace) -> dict:
    """Measure the memory of a case in a new process that returns freed tensors to the system at once."""
    if not Path("/proc/self/clear_refs").exists() or name == "bone-compile":  # would include the compiler's memory
        return {}
    command = [sys.executable, __file__, "--memory-of", name, "--backbone", options.backbone, "--device", "cpu",
             "--batch-size", str(options.batch_size), "--threads", str(options.threads)]  # fmt: skip
    command += ["--precision", options.precision] if options.precision else []
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    return json.loads(subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True).stdout)


def measure_evaluation(base: nn.Module, tiles: np.ndarray, *, batch_size: int, device: str, times: int) -> dict:
    """Time `embed_tiles` on a merged student and a plain loop on a timm model with the same weights."""
    spec, dtype = base.spec, precision_for(base.spec, device)
    ours = build_student(base, Case("bone", spec.bone_r)).backbone
    for p in ours.parameters():
        if p.requires_grad:
            nn.init.normal_(p, std=0.01)
    merge(ours)
    reference = build_network(spec)
    reference.load_state_dict(ours.state_dict())
    reference.spec = spec
    reference.eval().to(device)

    @torch.inference_mode()
    def embed_plain() -> np.ndarray:
        out = []
        for start in range(0, len(tiles), batch_size):
            x = preprocess(torch.from_numpy(tiles[start : start + batch_size]).to(device), spec)
            with torch.autocast(device, dtype, enabled=dtype != torch.float32):
                features = extract_features(reference, x)
            out.append(features.float().cpu().numpy())
        return np.concatenate(out)

    runs = [lambda: pk.embed_tiles(ours, tiles, batch_size=batch_size, device=device), embed_plain]
    difference = float(np.abs(runs[0]() - runs[1]()).max())  # also warms up, and checks that both do the same work
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
        "ratio": summarize(ratio, 3),
        "tiles_per_second": {"ours": summarize(len(tiles) / np.array(seconds[0])),
                             "plain": summarize(len(tiles) / np.array(seconds[1]))},
        "max_abs_difference": float(f"{difference:.2g}"),
        "raw_seconds": {"ours": round_all(seconds[0]), "plain": round_all(seconds[1])},
    }  # fmt: skip


def summarize(values, digits: int = 2) -> dict:
    """Return median and quartiles."""
    low, middle, high = (round(float(q), digits) for q in np.percentile(np.asarray(values), [25, 50, 75]))
    return {"median": middle, "quartiles": [low, high]}


def round_all(values, digits: int = 4) -> list[float]:
    return [round(float(v), digits) for v in values]


def compute_ratio(runs: dict, slow: str, fast: str) -> dict | None:
    """Return the ratio of tiles per second, `fast` over `slow`, round by round.

    On a CPU also from CPU seconds, which depend less on other processes than wall-clock seconds.
    """
    pairs = zip(runs.get(slow, ()), runs.get(fast, ()), strict=False)
    both = [(a, b) for a, b in pairs if "failed" not in a and "failed" not in b]
    if not both:
        return None
    ratios = [np.median(a["seconds"]) / np.median(b["seconds"]) for a, b in both]
    result = summarize(ratios, 3) | {"raw": round_all(ratios, 3)}
    if "processor_seconds" in both[0][0] and fast != "bone-compile":  # would include the compiler
        cpu_ratios = [a["processor_seconds"] / b["processor_seconds"] for a, b in both]
        result["by_processor_seconds"] = summarize(cpu_ratios, 3)
    return result


def summarize_case(case: Case, runs: list[dict], options: argparse.Namespace, rate: float, half: bool) -> dict:
    """Summarize the rounds of a case."""
    row = {"loop": "plain" if case.plain else "ours", "layer": case.layer, "r": case.r, **case.options}
    done = [run for run in runs if "failed" not in run]
    if not done:
        return row | {"failed": runs[-1]["failed"]}
    n, seconds = options.steps * options.batch_size, np.concatenate([run["seconds"] for run in done])
    # MiSS "bat" has Bone's cost; the second forward pass of recompute is not counted.
    cost = student_cost(options.backbone, {"bat": "bone"}.get(case.layer, case.layer), r=case.r, half=half)
    rate_of_epochs = cost.operations(options.batch_size) * options.steps / seconds
    return row | {
        "tiles_per_second": summarize(n / seconds),
        "peak_gib": done[-1].get("peak_gib"),
        "share_of_matrix_rate": summarize(rate_of_epochs / rate, 3),
        "share_waiting": summarize(np.concatenate([run["waiting"] for run in done]), 4),
        "last_loss": round(done[-1]["loss"][-1], 6),
        "raw_seconds": [round_all(run["seconds"]) for run in done],
        "raw_processor_seconds": round_all(run["processor_seconds"] for run in done if "processor_seconds" in run),
    }


def print_floor() -> None:
    """Print lower bounds of the cost of Bone training, for both students of the paper."""
    names = ("uni", "h-optimus-0")
    costs = [student_cost(name) for name in names]
    print("| | " + " | ".join(names) + " |\n| --- | --- | --- |")
    sizes = [count_by_formula(name) for name in names]
    table = {
        "tokens per tile": [str(tokens) for tokens, _ in sizes],
        "forward, GFLOP per tile": [f"{c.forward / 1e9:.1f}" for c in costs],
        "forward by formula": [f"{flop / 1e9:.1f}" for _, flop in sizes],
        "backward, GFLOP per tile": [f"{c.backward / 1e9:.1f}" for c in costs],
        "W' and its block gradients, GFLOP per step": [
            f"{c.step_forward / 1e9:.1f} + {c.step_backward / 1e9:.1f}" for c in costs
        ],
        "weights, MiB": [f"{c.weights / 2**20:.0f}" for c in costs],
        "adapters with gradients and Adam, MiB": [f"{c.adapters / 2**20:.0f}" for c in costs],
        "W' stored, MiB per step": [f"{c.step_stored / 2**20:.0f}" for c in costs],
        "stored for backward, MiB per tile": [f"{c.stored / 2**20:.1f}" for c in costs],
        "stored with recompute": [f"{c.stored_recomputed / 2**20:.1f}" for c in costs],
        "32 tiles at once, GiB (with recompute)": [
            f"{c.memory(32) / GIB:.1f} ({c.memory(32, recompute=True) / GIB:.1f})" for c in costs
        ],
    }
    for quantity, cells in table.items():
        print(f"| {quantity} | " + " | ".join(cells) + " |")
    print("\n| card, TFLOP/s | " + " | ".join(f"{name}, {job}" for name in names for job in JOB) + " |")
    print("| --- |" + " --- |" * len(names) * len(JOB))
    for card, rate in CARDS.items():
        cells = []
        for c in costs:
            for tiles in JOB.values():
                hours = c.operations(32) * tiles / 32 / rate / 3600
                cells.append(f"{hours:.2f} / {hours / 0.45:.2f}")
        print(f"| {card}, {rate / 1e12:.0f} | " + " | ".join(cells) + " |")


def count_by_formula(name: str) -> tuple[int, int]:
    """Return the tokens of a tile, and its forward operations computed from the layer widths."""
    with torch.device("meta"):
        model = build_network(BACKBONES[name])
    D, block, patches = model.embed_dim, model.blocks[0], model.patch_embed.num_patches
    L = patches + model.num_prefix_tokens
    weights = 3 * D * D + D * D + D * block.mlp.fc1.out_features + block.mlp.fc2.in_features * D
    attention = 4 * L * L * D  # queries times keys, then weights times values
    side = model.patch_embed.patch_size[0]
    return L, len(model.blocks) * (2 * L * weights + attention) + 2 * patches * 3 * side * side * D


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--floor", action="store_true", help="print lower bounds of the cost and exit")
    parser.add_argument("--device", default=default_device(), choices=("cpu", "cuda"))
    adaptable = [name for name, row in BACKBONES.items() if row.bone_r]
    parser.add_argument("--backbone", choices=adaptable, help="default: mini on a CPU, h-optimus-0 on a GPU")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--steps", type=int, help="steps per epoch; default: 4 on a CPU, 20 on a GPU")
    parser.add_argument("--epochs", type=int, default=3, help="timed epochs per case and round, after one untimed")
    parser.add_argument("--seconds", type=float, default=300, help="start no new round after this time")
    parser.add_argument("--evaluations", type=int, default=20, help="repetitions of the evaluation")
    parser.add_argument("--evaluation-tiles", type=int, default=512)
    parser.add_argument("--cases", type=lambda text: text.split(","), help="comma-separated cases; all by default")
    parser.add_argument("--precision", choices=TYPES, help="compute type; default: that of the registry")
    parser.add_argument("--cap-gib", type=float, help="limit of GPU memory for this process")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path, help="result file")
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.floor:
        return print_floor()
    torch.set_num_threads(options.threads)
    device = options.device
    options.backbone = options.backbone or ("mini" if device == "cpu" else "h-optimus-0")
    options.steps = options.steps or (4 if device == "cpu" else 20)
    spec = BACKBONES[options.backbone]
    if options.precision:
        spec = replace(spec, precision=dict.fromkeys(spec.precision, TYPES[options.precision]))
    if options.cap_gib and device == "cpu":
        parser.error("--cap-gib limits GPU memory; it needs --device cuda")
    if options.cap_gib:
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, options.cap_gib * GIB / total))
    cases = list_cases(spec, options.batch_size)
    if unknown := set(options.cases or ()) - set(cases):
        parser.error(f"unknown cases {', '.join(sorted(unknown))}; known: {', '.join(cases)}")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a warning about random weights
        base = load_backbone(spec, weights="random")
    if options.memory_of:
        data = Data.random(2 * options.batch_size, spec.input_size)
        case, batch = cases[options.memory_of], options.batch_size
        peak = measure_peak(base, case, data, batch_size=batch)
        saved = measure_saved_tensors(base, case, data, batch)
        print(json.dumps({"peak_gib": round(peak, 4), "kept_by_autograd_gib": saved and round(saved, 4)}))
        return None

    selected = {name: case for name, case in cases.items() if name in (options.cases or cases)}
    data = Data.random(options.steps * options.batch_size, spec.input_size)
    dtype = precision_for(spec, device)
    rates, runs, begun, rounds = [], {name: [] for name in selected}, time.perf_counter(), 0
    while not rounds or time.perf_counter() - begun < options.seconds:
        # Alternate the order, so that no case is always first or last.
        for name in list(selected)[:: -1 if rounds % 2 else 1]:
            if name == "bone-compile" and rounds > 1:
                continue  # two rounds are enough: each compiles again
            rates.append(measure_matrix_rate(device, dtype))
            sizes = {"epochs": options.epochs, "batch_size": options.batch_size}
            run = measure(base, selected[name], data, **sizes, device=device)
            runs[name].append(run)
            print(name, run.get("failed") or round_all(run["seconds"], 3), flush=True)
        rounds += 1
    rate = float(np.median(rates))
    half = dtype != torch.float32
    rows = {name: summarize_case(case, runs[name], options, rate, half) for name, case in selected.items()}
    if device == "cpu":
        for name, row in rows.items():
            row |= measure_in_process(name, options)
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
        "matrix_product_alone_tflop_per_second": summarize(np.array(rates) / 1e12, 3),
        "what": "seconds of whole epochs; ratios of tiles per second, each round compared in itself",
        "what_peak_gib_is": "largest allocation, weights within it" if device != "cpu" else
        "highest resident memory above that before training, weights left out, each case in a process of its own",
        "ratios": {
            "our loop with bone / plain loop with peft's bat": compute_ratio(runs, "plain-bat", "bone"),
            "our loop with bone / plain loop with peft's lora": compute_ratio(runs, "plain-lora", "bone"),
            "our loop with bone / plain loop with peft's adalora": compute_ratio(runs, "plain-adalora", "bone"),
            "our loop / plain loop, both with peft's bat": compute_ratio(runs, "plain-bat", "bat"),
            "our loop / plain loop, both with peft's lora": compute_ratio(runs, "plain-lora", "lora"),
            "our loop / plain loop, both with peft's adalora": compute_ratio(runs, "plain-adalora", "adalora"),
            "in our loop, bone / peft's bat": compute_ratio(runs, "bat", "bone"),
            "in our loop, bone / lora of equal r": compute_ratio(runs, "lora", "bone"),
            "in our loop, bone / lora of equal size": compute_ratio(runs, "lora-large", "bone"),
            "in our loop, bone / adalora": compute_ratio(runs, "adalora", "bone"),
            "in our loop, bone / heads alone": compute_ratio(runs, "none", "bone"),
            "bone with recompute / without": compute_ratio(runs, "bone", "bone-recompute"),
            "bone in two pieces a batch / whole": compute_ratio(runs, "bone", "bone-micro-batch"),
            "bone compiled / not": compute_ratio(runs, "bone", "bone-compile"),
        },
        "cases": rows,
        "evaluation": None if options.cap_gib else measure_evaluation(  # of two students; the cap is for training
            base, Data.random(options.evaluation_tiles, spec.input_size).tiles, batch_size=64, device=device,
            times=options.evaluations,
        ),
    }  # fmt: skip
    device_name = "cpu" if device == "cpu" else re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name().lower())
    suffixes = [options.precision, options.cap_gib and f"{options.cap_gib:g}gib"]
    stem = "_".join(["bone_speed", device_name, options.backbone, *filter(None, suffixes)])
    out = options.out or Path(__file__).with_name("results") / f"{stem}.json"
    out.parent.mkdir(exist_ok=True)
    out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps({name: ratio and ratio["median"] for name, ratio in result["ratios"].items()}, indent=1))
    print(f"written to {out}")
    return None


if __name__ == "__main__":
    main()
