"""Adapt attention layers with Bone, or with LoRA, AdaLoRA or MiSS through peft."""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch
from torch import nn

from peka_lite.adapters._choices import METHODS
from peka_lite.adapters.bone import BoneLinear


@dataclass
class Adapter:
    """Method, layers and options of an adapted model, stored at ``model.adapter``."""

    method: str
    layers: tuple[str, ...]
    options: dict
    n_base: int
    tuner: object = None  # peft's AdaLoraModel, with the rank schedule
    fitted_on: object = None  # row_ids of the tiles that `fit` trained on


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
    """Freeze a student and add trainable adapters to every ``attn.{targets}`` layer, in place.

    Parameters
    ----------
    model
        A timm vision transformer. Students without a block size (ResNet-50, CTransPath) support only ``"none"``.
    method
        ``"none"`` (freeze only), ``"bone"``, or through peft ``"lora"``, ``"adalora"``, ``"miss"``.
    r
        Block size of Bone and MiSS, rank of LoRA, starting rank of AdaLoRA (which prunes to half of it, as in the
        authors' configuration).
    alpha, dropout
        Scaling and input dropout of LoRA and AdaLoRA. MiSS uses the dropout only, Bone neither.
    targets
        Name of the attention sub-layer.
    total_steps
        Number of optimizer steps; AdaLoRA needs it for its rank schedule.
    seed
        Seed of the random initial weights of LoRA, AdaLoRA and MiSS. Bone starts at zero.

    Returns
    -------
    torch.nn.Module
        The same model, with ``model.adapter`` set.

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
        raise ValueError(f"this model already has adapter {model.adapter.method!r}; merge it or load a fresh one")
    spec = getattr(model, "spec", None)
    pattern, layers = _pattern(targets), target_layers(model, targets)
    if method != "none" and (not layers or (spec is not None and spec.bone_r is None)):
        name = spec.name if spec is not None else type(model).__name__
        raise ValueError(f"{name} supports only method 'none': adapters need attn.{targets} layers of a transformer")
    n_base = sum(p.numel() for p in model.parameters())
    model.requires_grad_(False)
    tuner = None
    for name in layers if method != "none" else ():
        attention = model.get_submodule(name.rpartition(".")[0])
        if hasattr(attention, "qkv_bias_separate"):  # timm's EVA, BEiT, Swin V2 else read qkv.weight directly
            attention.qkv_bias_separate = True  # adds the bias to the layer's output: same up to rounding
    if method == "bone":
        for name in layers:
            _replace(model, name, BoneLinear(model.get_submodule(name), r=r))
    elif method != "none":
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)  # CPU only: weights are created there
            tuner = _inject_peft(model, method, pattern, r=r, alpha=alpha, dropout=dropout, total_steps=total_steps)
    options = {
        "none": {},
        "bone": {"r": r},
        "lora": {"r": r, "alpha": alpha, "dropout": dropout},
        "adalora": {"r": r, "alpha": alpha, "dropout": dropout, "total_steps": total_steps},
        "miss": {"r": r, "dropout": dropout},
    }[method]
    model.adapter = Adapter(method, layers if method != "none" else (), options, n_base, tuner)
    return model


def target_layers(model: nn.Module, targets: str) -> tuple[str, ...]:
    """Return the names of a model's linear layers ``attn.{targets}``."""
    pattern = _pattern(targets)
    return tuple(
        name for name, module in model.named_modules() if isinstance(module, nn.Linear) and re.fullmatch(pattern, name)
    )


def adapted_share(model: nn.Module) -> float:
    """Return trainable weights as a share of the frozen student's weights (0 to 1).

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
    """Return the LoRA rank with as many parameters per layer as Bone at block size `r`, rounded down.

    Bone trains ``out * r`` weights per layer, LoRA ``rank * (in + out)``.

    Examples
    --------
    >>> import peka_lite as pk
    >>> pk.adapters.lora_rank_like_bone(1024, 3072, 256)
    192
    """
    return max(1, out_features * r // (in_features + out_features))


def merge(model: nn.Module) -> nn.Module:
    """Merge adapters into plain timm weights, in place; outputs stay the same up to rounding.

    Examples
    --------
    >>> import torch
    >>> import peka_lite as pk
    >>> student = pk.adapt(pk.load_backbone("mini"), "bone", r=32)
    >>> for layer in student.adapter.layers:  # stands for training
    ...     _ = torch.nn.init.normal_(student.get_submodule(layer).block, std=0.01)
    >>> x = torch.randn(2, 3, 112, 112)
    >>> adapted = student(x)
    >>> torch.allclose(pk.merge(student)(x), adapted, atol=1e-3), student.adapter
    (True, None)
    """
    adapter = getattr(model, "adapter", None)
    if adapter is None:
        raise ValueError("nothing to merge: this model has no adapter")
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
    model.__dict__.pop("peft_config", None)  # else peft treats the model as adapted
    model.adapter = None
    return model.requires_grad_(False)


def adapter_state(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return copies of the adapter's tensors by name, on the CPU.

    Examples
    --------
    >>> import peka_lite as pk
    >>> model = pk.adapt(pk.load_backbone("mini", weights="random"), "bone", r=32)
    >>> {name: tuple(block.shape) for name, block in pk.adapters.adapter_state(model).items() if "blocks.0" in name}
    {'blocks.0.attn.qkv.block': (18, 32, 32)}
    """
    return {n: p.detach().cpu().clone() for n, p in model.named_parameters() if _is_adapter(n)}


def load_adapter_state(model: nn.Module, state: dict[str, torch.Tensor]) -> nn.Module:
    """Copy saved adapter tensors into a model adapted with the same method and options."""
    params = {n: p for n, p in model.named_parameters() if _is_adapter(n)}
    if params.keys() != state.keys():
        names = sorted(params.keys() ^ state.keys())
        raise ValueError(
            f"adapter and model differ in {len(names)} tensors, first {names[0]}: adapt with the same method and r"
        )
    with torch.no_grad():
        for name, value in state.items():
            if (p := params[name]).shape != value.shape:
                raise ValueError(f"{name} is {tuple(value.shape)} in the file, {tuple(p.shape)} in the model")
            p.copy_(value)
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
            raise ValueError("adalora needs total_steps, the number of optimizer steps, for its rank schedule")
        if r < 2:
            raise ValueError(f"adalora prunes its starting rank to half, so r must be at least 2, not {r}")
        config = AdaLoraConfig(
            init_r=r, target_r=max(1, r // 2), lora_alpha=alpha, lora_dropout=dropout, total_step=total_steps,
            target_modules=pattern,
        )  # fmt: skip
        return AdaLoraModel(model, {"default": config}, "default")
    inject_adapter_in_model(config, model)
    return None
