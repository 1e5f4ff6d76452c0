"""Adapter files: what `adapt` and `fit` made, by name, with the frozen weights that it belongs to."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass

import torch
from torch import nn

from peka_lite import __version__
from peka_lite._core._tensor_files import (
    check_record,
    is_finite,
    is_whole_number,
    read_record,
    read_tensors,
    require_name,
    write_tensors,
)
from peka_lite._core._yaml import is_line
from peka_lite.adapters.adapt import adapt, adapter_state, load_adapter_state, target_layers

SAMPLE = 1024  # values of each tensor that a fingerprint reads
_LINE = (is_line, "text of one line")
_SETS = (
    lambda value: isinstance(value, dict) and 0 < len(value) <= 10_000 and all(map(is_line, value)),
    "a mapping of sets of tensors",
)
_RECORD = {
    "method": (lambda value: value in ("bone", "lora", "adalora", "miss"), "bone, lora, adalora or miss"),
    "layers": (lambda value: is_line(value) and value.isidentifier(), "the name of a layer"),
    **dict.fromkeys(("backbone", "weights", "fingerprint", "version"), _LINE),
    **dict.fromkeys(("options", "data"), _SETS),
}
_OPTIONS = {
    "r": (is_whole_number, "a whole number above 0"),
    "alpha": (is_finite, "a number"),
    "dropout": (lambda value: is_finite(value) and 0 <= value < 1, "a number from 0 to below 1"),
    "total_steps": (is_whole_number, "a whole number above 0"),
}
_OF_METHOD = {
    "bone": ("r",), "lora": ("r", "alpha", "dropout"), "adalora": tuple(_OPTIONS), "miss": ("r", "dropout")
}  # fmt: skip


@dataclass(frozen=True)
class AdapterInfo:
    """What an adapter file says of itself.

    Attributes
    ----------
    method, layers
        As in `adapt`: ``"bone"``, ...; ``"qkv"`` or ``"proj"``.
    backbone, weights, fingerprint
        The student's registry row, where its frozen weights came from, and their `backbone_fingerprint`.
    options
        Name of each set of tensors -> options of `adapt`. Sets share them all but AdaLoRA's total_steps.
    data
        Name of each set -> fingerprint of the cohort that taught it, or None.
    version
        The peka_lite that wrote the file.
    """

    method: str
    layers: str
    backbone: str
    weights: str
    fingerprint: str
    options: dict[str, dict]
    data: dict[str, str | None]
    version: str

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the sets: ``("all",)`` or ``("fold0", "fold1", ...)``."""
        return tuple(self.options)


def backbone_fingerprint(model: nn.Module) -> str:
    """Hash a student's frozen weights; 16 hex digits, the same before and after `adapt` and on every device.

    Parameters
    ----------
    model
        From `load_backbone`, plain or adapted. Merging changes the weights, so take it before.

    Notes
    -----
    Read are each tensor's name (as in the plain model), shape, type and about `SAMPLE` values at even distances, so
    that a billion weights take well under a second. Weights that differ only in between have one fingerprint: it
    tells checkpoints apart, and is no proof that a file is whole.

    Examples
    --------
    Adapting leaves the frozen weights as they are:

    >>> import peka_lite as pk
    >>> student = pk.load_backbone("mini")
    >>> plain = pk.adapters.backbone_fingerprint(student)
    >>> len(plain), pk.adapters.backbone_fingerprint(pk.adapt(student, "bone", r=32)) == plain
    (16, True)
    """
    adapter = getattr(model, "adapter", None)
    adapted = tuple(f"{name}." for name in adapter.layers) if adapter is not None else ()
    digest = hashlib.sha256()
    for name, tensor in sorted(_plain(model.state_dict(), adapted).items()):
        flat = tensor.detach().reshape(-1)
        values = flat[:: max(1, len(flat) // SAMPLE)].cpu().double() + 0.0  # of the two zeros one
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype} ".encode() + values.numpy().tobytes())
    return digest.hexdigest()[:16]


def save_adapter(model: nn.Module, path: str | os.PathLike, *, name: str = "all", data: str | None = None) -> None:
    """Write a student's adapter as a file that `load_adapter` reads; only another file of an adapter is replaced.

    Parameters
    ----------
    model
        From `load_backbone`, adapted and not merged.
    name
        Of this set of tensors: ``"all"``, or the fold it was taught for, ``"fold0"``, ...
    data
        `hash_cohort` of the cohort that taught it.

    Raises
    ------
    ValueError
        For a model without an adapter or without a registry row, and for a name with a dot.

    Examples
    --------
    >>> import peka_lite as pk
    >>> student = pk.adapt(pk.load_backbone("mini"), "bone", r=32)
    >>> pk.adapters.save_adapter(student, "fold0.safetensors", name="fold0")
    >>> pk.adapters.read_adapter_info("fold0.safetensors").options
    {'fold0': {'r': 32}}
    """
    adapter = getattr(model, "adapter", None)
    if adapter is None or not adapter.layers:
        raise ValueError("nothing to save: this model carries no adapter (merged already, or method 'none')")
    if getattr(model, "spec", None) is None:
        raise ValueError("the file names the backbone it belongs to: load the student with load_backbone")
    require_name(name)
    info = AdapterInfo(
        method=adapter.method,
        layers=adapter.layers[0].rpartition(".")[2],
        backbone=model.spec.name,
        weights=model.weights_origin,
        fingerprint=backbone_fingerprint(model),
        options={name: dict(adapter.options)},
        data={name: data},
        version=__version__,
    )
    write_tensors(path, {f"{name}.{k}": v for k, v in adapter_state(model).items()}, asdict(info), kind="adapter")


def join_adapters(paths: Mapping[str, str | os.PathLike], out: str | os.PathLike) -> None:
    """Write the adapters of several files, one set each, into one file under the given names.

    Parameters
    ----------
    paths
        Name of the set in the new file -> file of `save_adapter`. Each keeps its options and data fingerprint.

    Raises
    ------
    ValueError
        When a file holds several sets, or two differ in method, layers, options or frozen weights.
    """
    if not paths:
        raise ValueError("no adapter files to join")
    infos = {name: read_adapter_info(path) for name, path in paths.items()}
    first, tensors = next(iter(infos)), {}
    for name, info in infos.items():
        if len(info.names) != 1:
            raise ValueError(f"{paths[name]} holds {len(info.names)} adapters; join files of one each")
        require_name(name)
        for field, mine in _must_agree(info).items():
            if mine != (theirs := _must_agree(infos[first])[field]):
                raise ValueError(f"{field} is {theirs!r} in {paths[first]} and {mine!r} in {paths[name]}: not one run")
        tensors |= {f"{name}.{k}": v for k, v in read_tensors(paths[name], info.names[0]).items()}
    joined = asdict(infos[first]) | {
        "options": {name: info.options[info.names[0]] for name, info in infos.items()},
        "data": {name: info.data[info.names[0]] for name, info in infos.items()},
        "version": __version__,
    }
    write_tensors(out, tensors, joined, kind="adapter")


def read_adapter_info(path: str | os.PathLike) -> AdapterInfo:
    """Read what an adapter file says of itself, without its tensors.

    Raises
    ------
    FileNotFoundError
        For a file that is not there.
    ValueError
        For a truncated file, or one that `save_adapter` did not write.

    Examples
    --------
    >>> import peka_lite as pk
    >>> student = pk.adapt(pk.load_backbone("mini"), "bone", r=16, targets="proj")
    >>> pk.adapters.save_adapter(student, "bone.safetensors")
    >>> info = pk.adapters.read_adapter_info("bone.safetensors")
    >>> info.backbone, info.method, info.layers, info.options
    ('mini', 'bone', 'proj', {'all': {'r': 16}})
    """
    record = read_record(path, kind="adapter")
    check_record(path, record, _RECORD, whose="an adapter's")
    info = AdapterInfo(**record)
    if info.data.keys() != info.options.keys():
        raise ValueError(f"{path}: its record names other sets of tensors in options than in data")
    for name, options in info.options.items():
        wanted = {option: _OPTIONS[option] for option in _OF_METHOD[info.method]}
        check_record(path, options, wanted, whose=f"an adapter's by {info.method}")
        if info.data[name] is not None and not is_line(info.data[name]):
            raise ValueError(f"{path}: its record has data {repr(info.data[name])[:120]}; it is a fingerprint")
    return info


def load_adapter(model: nn.Module, path: str | os.PathLike, *, name: str | None = None) -> nn.Module:
    """Adapt a plain student as a file says and copy the file's tensors in.

    Parameters
    ----------
    model
        From `load_backbone`, with the frozen weights that the adapter was taught on.
    name
        Set of tensors to take; None where the file holds one only.

    Returns
    -------
    torch.nn.Module
        The same model in eval mode; `merge` makes it a plain timm model again.

    Raises
    ------
    ValueError
        For another backbone or other frozen weights, a name that is not there, a model that is adapted already, and
        whatever `read_adapter_info` refuses.

    Examples
    --------
    >>> import peka_lite as pk
    >>> pk.adapters.save_adapter(pk.adapt(pk.load_backbone("mini"), "bone", r=32), "bone.safetensors")
    >>> student = pk.adapters.load_adapter(pk.load_backbone("mini"), "bone.safetensors")
    >>> student.adapter.method, student.adapter.options
    ('bone', {'r': 32})
    """
    info = read_adapter_info(path)
    if name is None and len(info.names) > 1:
        raise ValueError(f"{path} holds several adapters: {', '.join(info.names)}; name one of them")
    name = name or info.names[0]
    if name not in info.names:
        raise ValueError(f"{path} holds no adapter {name!r}; it holds {', '.join(info.names)}")
    spec = getattr(model, "spec", None)
    mine = spec.name if spec is not None else type(model).__name__
    if mine != info.backbone:
        raise ValueError(f"{path} belongs to backbone {info.backbone!r}, not {mine!r}")
    found = backbone_fingerprint(model)
    if found != info.fingerprint:
        raise ValueError(
            f"{path} was taught on {mine} with weights {info.weights!r} (fingerprint {info.fingerprint}); this student "
            f"has weights {model.weights_origin!r} (fingerprint {found}): load the weights it was taught on"
        )
    state, r = read_tensors(path, name), info.options[name]["r"]
    # Every method trains at least r values for each output of each layer; what a file does not hold takes no memory
    # beyond the student's own.
    needed = r * sum(model.get_submodule(layer).out_features for layer in target_layers(model, info.layers))
    held, base = (sum(tensor.numel() for tensor in tensors) for tensors in (state.values(), model.parameters()))
    if needed > held + base:
        raise ValueError(f"{path}: r={r} in its record takes {needed:,} values or more, {name!r} holds {held:,}")
    try:
        adapt(model, info.method, targets=info.layers, **info.options[name])
        return load_adapter_state(model, state).eval()
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def _plain(state: Mapping[str, torch.Tensor], adapted: tuple[str, ...]) -> dict[str, torch.Tensor]:
    """Leave adapter tensors out and name the rest as the plain model does."""
    plain = {}
    for name, tensor in state.items():
        layer = next((prefix for prefix in adapted if name.startswith(prefix)), None)
        if layer is None:
            plain[name] = tensor
        elif name.startswith((f"{layer}base.", f"{layer}base_layer.")):  # Bone's name for it, and peft's
            plain[layer + name.rpartition(".")[2]] = tensor
    return plain


def _must_agree(info: AdapterInfo) -> dict:
    options = {k: v for k, v in info.options[info.names[0]].items() if k != "total_steps"}  # a fold's size decides it
    same = ("method", "layers", "backbone", "fingerprint")
    return {field: getattr(info, field) for field in same} | {"options": options}
