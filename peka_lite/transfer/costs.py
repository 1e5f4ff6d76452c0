"""Estimate operations and memory of training a student, without running it."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from functools import cache

import torch
from torch import nn

from peka_lite.adapters.adapt import adapt
from peka_lite.backbones.load import build_network, extract_features, precision_for
from peka_lite.backbones.registry import BACKBONES
from peka_lite.transfer.memory import frozen_dtype

GIB = 2**30


@dataclass(frozen=True)
class Cost:
    """Operations and memory of training one student with one adapter.

    Attributes
    ----------
    forward, backward
        Floating-point operations per tile (a multiply and an add are two). Backward counts the gradients of activations
        and adapters; frozen weights have none.
    step_forward, step_backward
        The same per step, independent of the batch: merged weights, and the sums of the blocks' gradients.
    weights, adapters
        Bytes: the student's weights in the compute type; float32 adapters, their gradients and Adam's two moments.
    stored, stored_recomputed
        Bytes per tile stored for the backward pass: of all blocks, or with `recompute` the inputs of all blocks and
        the activations of one.
    step_stored
        Bytes per step stored besides: merged weights.

    Examples
    --------
    >>> import peka_lite as pk
    >>> cost = pk.transfer.student_cost("mini", half=False)
    >>> cost.adapters == 4 * 4 * 110592  # weights, their gradients and two moments of Adam, 4 bytes each
    True
    >>> cost.memory(256, recompute=True) < cost.memory(256) / 2, cost.operations(1, recompute=True) > cost.operations(1)
    (True, True)
    """

    forward: int
    backward: int
    step_forward: int
    step_backward: int
    weights: int
    adapters: int
    stored: int
    stored_recomputed: int
    step_stored: int

    def memory(self, tiles: int, *, recompute: bool = False) -> int:
        """Return the estimated bytes for training with `tiles` at once, without the allocator's overhead."""
        each = self.stored_recomputed if recompute else self.stored
        return self.weights + self.adapters + (0 if recompute else self.step_stored) + tiles * each

    def operations(self, tiles: int, *, recompute: bool = False) -> int:
        """Return floating-point operations of one training step over `tiles`."""
        forward = tiles * self.forward + self.step_forward
        return forward * (2 if recompute else 1) + tiles * self.backward + self.step_backward


@cache
def student_cost(name: str, method: str = "bone", *, r: int | None = None, half: bool = True) -> Cost:
    """Count operations and memory of training a student, in seconds and without its weights.

    Operations are counted by `torch.utils.flop_counter` (matrix products, convolutions, attention) on fake tensors.
    Memory is the tensors that autograd would save.

    Parameters
    ----------
    name
        A key of `BACKBONES`.
    method, r
        As in `adapt`; None takes the student's default block size.
    half
        Compute in 16 bits, else in 32.

    Examples
    --------
    >>> import peka_lite as pk
    >>> cost = pk.transfer.student_cost("mini", half=False)
    >>> round(cost.forward / 1e9, 2), round(cost.backward / cost.forward, 2)  # frozen weights have no gradient
    (0.29, 1.2)
    """
    from torch._subclasses.fake_tensor import FakeTensorMode

    spec, dtype = BACKBONES[name], torch.bfloat16 if half else torch.float32
    with warnings.catch_warnings(), torch.device("meta"):
        warnings.simplefilter("ignore")
        model = build_network(spec).eval()
        model.spec = spec
        adapt(model, method, r=r or spec.bone_r or 1, total_steps=1)
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    with FakeTensorMode(allow_non_fake_inputs=True):  # shapes and types, no memory
        model.to_empty(device="cpu")
        with frozen_dtype(model, dtype), torch.autocast("cpu", dtype, enabled=half):
            one, two = _count(model, 1), _count(model, 2)
    forward, backward, stored, recomputed = (b - a for a, b in zip(one, two, strict=True))  # per tile
    return Cost(
        forward, backward, one[0] - forward, one[1] - backward, weights=model.adapter.n_base * dtype.itemsize,
        adapters=16 * trainable, stored=stored, stored_recomputed=recomputed, step_stored=one[2] - stored,
    )  # fmt: skip


def _count(model: nn.Module, tiles: int) -> tuple[int, int, int, int]:
    """Return operations forward and backward, and bytes stored without and with recomputed blocks."""
    from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

    # PyTorch counts attention of GPU kernels only; count the CPU's kernels too.
    attention = {
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: lambda *shapes, **_: sdpa_flop_count(*shapes[:3]),
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: lambda *shapes, **_: (
            sdpa_backward_flop_count(*shapes[:4])
        ),
    }
    weights, saved = {p.untyped_storage()._cdata for p in model.parameters()}, {}

    def save(tensor):
        storage = tensor.untyped_storage()
        saved[storage._cdata] = storage  # the reference keeps its address from being reused
        return tensor

    x = torch.empty(tiles, 3, model.spec.input_size, model.spec.input_size)
    with (
        FlopCounterMode(display=False, custom_mapping=attention) as forward,
        torch.autograd.graph.saved_tensors_hooks(save, lambda tensor: tensor),
    ):
        y = extract_features(model, x)
    with FlopCounterMode(display=False, custom_mapping=attention) as backward:
        if y.requires_grad:
            y.float().sum().backward()
    stored = sum(storage.nbytes() for address, storage in saved.items() if address not in weights)
    # With recompute: the float32 inputs of all blocks, and the activations of one block at a time.
    depth = len(getattr(model, "blocks", "1"))
    recomputed = depth * model.forward_features(x).numel() * 4 + stored // depth if stored else 0
    return forward.get_total_flops(), backward.get_total_flops(), stored, recomputed


def explain_out_of_memory(model: nn.Module, device: torch.device, *, tiles: int, recompute: bool) -> MemoryError:
    """Return a MemoryError that names the options that lower memory, with estimates."""
    try:
        half = precision_for(model.spec, device) != torch.float32
        cost = student_cost(model.spec.name, model.adapter.method, r=model.adapter.options.get("r"), half=half)
    except Exception:  # a custom backbone, or a network that cannot be counted: give the advice without numbers
        cost = None

    def about(n: int, again: bool) -> str:
        return "" if cost is None else f" (about {cost.memory(n, recompute=again) / GIB:.1f} GiB)"

    where = str(device)
    if device.type == "cuda":
        card = torch.cuda.get_device_properties(device)
        where = f"{card.name} ({card.total_memory / GIB:.1f} GiB)"
    parts = []
    if tiles > 1:
        parts.append(f"--micro-batch {tiles // 2}{about(tiles // 2, recompute)} gives the same results")
    if not recompute and hasattr(model, "blocks"):
        parts.append(f"--recompute{about(tiles, True)} does too, in a third more time")
    advice = "; ".join(parts) or "use a GPU with more memory, or a smaller backbone"
    return MemoryError(f"{where} ran out of memory at {tiles} tiles at once{about(tiles, recompute)}; {advice}")
