"""Bone: block-affine adapters on attention, with LoRA, AdaLoRA and MiSS (peft) beside it."""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch
from torch import nn

from peka_lite.adapters._choices import METHODS
from peka_lite.adapters.bone import BoneLinear


@dataclass
class Adapter:
    """What `adapt` did to a model: kept at ``model.adapter`` for training, saving and merging."""

    method: str
    layers: tuple[str, ...]
    options: dict
    n_base: int
    tuner: object = None  # peft's AdaLoraModel, which owns the rank schedule
    fitted_on: object = None  # row_ids of the tiles that `fit` taught it with


def adapt(
    model: nn.Module,
    method: str,
    *,
    r: int = 256,
    alpha: int = 32,
    dropout: float = 0.1,
    targets: str = "qkv",
    total_steps: int | None = None,
    seed: int = 0,
) -> nn.Module:
    """Freeze a student and put trainable adapters on every ``attn.{targets}`` layer, in place.

    Parameters
    ----------
    model
        A timm vision transformer. A registry row without a block size (ResNet-50, CTransPath) takes only ``"none"``.
    method
        ``"none"`` (freeze only), ``"bone"``, or through peft ``"lora"``, ``"adalora"``, ``"miss"``.
    r
        Block size of Bone and MiSS, rank of LoRA, starting rank of AdaLoRA (which prunes to half of it, as the
        authors' configuration does).
    alpha, dropout
        LoRA's and AdaLoRA's scaling and input dropout; MiSS takes the dropout. Bone has neither.
    targets
        Name of the attention sub-layer.
    total_steps
        Optimizer steps to come; AdaLoRA needs it for its rank schedule.
    seed
        Decides the random starts of LoRA, AdaLoRA and MiSS; Bone starts at zero.

    Returns
    -------
    torch.nn.Module
        The same model; ``model.adapter`` says what was done.

    Raises
    ------
    ValueError
        For an unknown method, an `r` that does not divide the layers, a model without such layers, a model already
        adapted, or AdaLoRA without `total_steps`.

    Examples
    --------
    >>> import peka_lite as pk
    >>> student = pk.adapt(pk.load_backbone("mini"), "bone", r=32)
    >>> student.adapter.layers[:2], len(student.adapter.layers)
    (('blocks.0.attn.qkv', 'blocks.1.attn.qkv'), 6)
    >>> sum(weights.numel() for weights in student.parameters() if weights.requires_grad)  # 6 layers of 576 x 32
    110592
    """
    if method not in METHODS:
        raise ValueError(f"unknown method {method!r}; known: {', '.join(METHODS)}")
    if getattr(model, "adapter", None) is not None:
        raise ValueError(f"this model already carries {model.adapter.method!r}; merge it or load a fresh one")
    spec = getattr(model, "spec", None)
    pattern, layers = _pattern(targets), target_layers(model, targets)
    if method != "none" and (not layers or (spec is not None and spec.bone_r is None)):
        name = spec.name if spec is not None else type(model).__name__
        raise ValueError(f"{name} takes only method 'none': adapters go on a vision transformer's attn.{targets}")
    n_base = sum(p.numel() for p in model.parameters())
    model.requires_grad_(False)
    tuner = None
    for name in layers if method != "none" else ():
        attention = model.get_submodule(name.rpartition(".")[0])
        if hasattr(attention, "qkv_bias_separate"):  # EVA, BEiT, Swin V2 of timm: else they read qkv.weight themselves
            attention.qkv_bias_separate = True  # the bias is added to what the layer gives: the same up to rounding
    if method == "bone":
        for name in layers:
            _replace(model, name, BoneLinear(model.get_submodule(name), r=r))
    elif method != "none":
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)  # the CPU's alone: weights start there
            tuner = _inject_peft(model, method, pattern, r=r, alpha=alpha, dropout=dropout, total_steps=total_steps)
    used = {
        "none": {},
        "bone": {"r": r},
        "lora": {"r": r, "alpha": alpha, "dropout": dropout},
        "adalora": {"r": r, "alpha": alpha, "dropout": dropout, "total_steps": total_steps},
        "miss": {"r": r, "dropout": dropout},
    }[method]
    model.adapter = Adapter(method, layers if method != "none" else (), used, n_base, tuner)
    return model


def target_layers(model: nn.Module, targets: str) -> tuple[str, ...]:
    """Return the names of a model's linear layers ``attn.{targets}``."""
    pattern = _pattern(targets)
    return tuple(
        name for name, module in model.named_modules() if isinstance(module, nn.Linear) and re.fullmatch(pattern, name)
    )


def adapted_share(model: nn.Module) -> float:
    """Return trainable weights as a share of the student's own weights (0 to 1).

    Examples
    --------
    >>> import peka_lite as pk
    >>> for r in (16, 32, 64):
    ...     student = pk.adapt(pk.load_backbone("mini"), "bone", r=r)
    ...     print(f"block size {r}: {pk.adapters.adapted_share(student):.1%}")
    block size 16: 2.0%
    block size 32: 3.9%
    block size 64: 7.8%
    """
    return sum(p.numel() for p in model.parameters() if p.requires_grad) / model.adapter.n_base


def lora_rank_like_bone(in_features: int, out_features: int, r: int) -> int:
    """Return the LoRA rank with the parameter count of Bone at block size `r` on one layer (rounded down).

    Bone trains ``out * r`` weights a layer, LoRA ``rank * (in + out)``.

    Examples
    --------
    >>> lora_rank_like_bone(1024, 3072, 256)
    192
    """
    return max(1, out_features * r // (in_features + out_features))


def merge(model: nn.Module) -> nn.Module:
    """Fold adapters into plain timm weights, in place: same outputs, no extra layers, nothing trainable.

    Examples
    --------
    >>> import torch
    >>> import peka_lite as pk
    >>> student = pk.adapt(pk.load_backbone("mini"), "bone", r=32)
    >>> for layer in student.adapter.layers:  # as if it had learnt something
    ...     _ = torch.nn.init.normal_(student.get_submodule(layer).block, std=0.01)
    >>> x = torch.randn(2, 3, 112, 112)
    >>> adapted = student(x)
    >>> torch.allclose(pk.merge(student)(x), adapted, atol=1e-3), student.adapter
    (True, None)
    """
    adapter = getattr(model, "adapter", None)
    if adapter is None:
        raise ValueError("nothing to merge: this model carries no adapter")
    with torch.no_grad():
        for name in adapter.layers:
            layer = model.get_submodule(name)
            if isinstance(layer, BoneLinear):
                base = layer.base
                base.weight.copy_(layer.merged_weight())
            else:
                layer.merge()
                base = layer.get_base_layer()
            _replace(model, name, base)
    model.__dict__.pop("peft_config", None)  # or peft would take the model for an adapted one
    model.adapter = None
    return model.requires_grad_(False)


def adapter_state(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return the adapter's tensors by name, detached, on the CPU: what is saved."""
    return {n: p.detach().cpu().clone() for n, p in model.named_parameters() if _is_adapter(n)}


def load_adapter_state(model: nn.Module, state: dict[str, torch.Tensor]) -> nn.Module:
    """Copy saved adapter tensors into a model adapted the same way; names and shapes must agree."""
    own = {n: p for n, p in model.named_parameters() if _is_adapter(n)}
    if own.keys() != state.keys():
        odd = sorted(own.keys() ^ state.keys())
        raise ValueError(
            f"adapter and model differ in {len(odd)} tensors, first {odd[0]}: adapt with the same method and r"
        )
    with torch.no_grad():
        for name, value in state.items():
            if own[name].shape != value.shape:
                raise ValueError(f"{name} is {tuple(value.shape)} in the file, {tuple(own[name].shape)} in the model")
            own[name].copy_(value)
    return model


def orthogonal_term(model: nn.Module) -> torch.Tensor:
    """Return AdaLoRA's regularizer (arXiv:2303.10512, eq. 4): mean distance of P'P and QQ' from the identity."""
    distances = []
    for name, p in model.named_parameters():
        if "lora_A" in name or "lora_B" in name:
            gram = p @ p.T if "lora_A" in name else p.T @ p
            distances.append(torch.linalg.norm(gram - torch.eye(len(gram), device=gram.device, dtype=gram.dtype)))
    return torch.stack(distances).mean()


def _pattern(targets: str) -> str:
    return rf"(.*\.)?attn\.{re.escape(targets)}"


def _is_adapter(name: str) -> bool:
    return name.endswith(".block") or any(part in name for part in ("lora_", "miss_block", "ranknum"))


def _replace(model: nn.Module, name: str, new: nn.Module) -> None:
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, new)


def _inject_peft(model, method, pattern, *, r, alpha, dropout, total_steps):
    from peft import AdaLoraConfig, AdaLoraModel, LoraConfig, MissConfig, inject_adapter_in_model

    if method == "lora":
        config = LoraConfig(r=r, lora_alpha=alpha, lora_dropout=dropout, target_modules=pattern)
    elif method == "miss":
        config = MissConfig(r=r, miss_dropout=dropout, target_modules=pattern)
    else:
        if not total_steps:
            raise ValueError("adalora needs total_steps, the optimizer steps to come, for its rank schedule")
        if r < 2:
            raise ValueError(f"adalora prunes its starting rank to half, so r must be at least 2, not {r}")
        config = AdaLoraConfig(
            init_r=r, target_r=max(1, r // 2), lora_alpha=alpha, lora_dropout=dropout, total_step=total_steps,
            target_modules=pattern,
        )  # fmt: skip
        return AdaLoraModel(model, {"default": config}, "default")
    inject_adapter_in_model(config, model)
    return None
