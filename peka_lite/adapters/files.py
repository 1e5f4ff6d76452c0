"""Read and write adapter files, each tied to the frozen weights it was trained on."""

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

SAMPLE = 1024  # values of each tensor in a fingerprint
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
_OPTIONS_OF = {
    "bone": ("r",), "lora": ("r", "alpha", "dropout"), "adalora": tuple(_OPTIONS), "miss": ("r", "dropout")
}  # fmt: skip


@dataclass(frozen=True)
class AdapterInfo:
    """Metadata of an adapter file.

    Attributes
    ----------
    method, layers
        As in `adapt`: ``"bone"``, ...; ``"qkv"`` or ``"proj"``.
    backbone, weights, fingerprint
        Name of the student, origin of its frozen weights, and their `backbone_fingerprint`.
    options
        Name of each set of tensors -> options of `adapt`. Only AdaLoRA's total_steps may differ between sets.
    data
        Name of each set -> fingerprint of its training cohort, or None.
    version
        peka_lite's version when the file was written.
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
    """Hash a student's frozen weights to 16 hex digits, the same before and after `adapt` and on every device.

    Parameters
    ----------
    model
        From `load_backbone`, plain or adapted. Merging changes the weights: hash before it.

    Notes
    -----
    The hash covers each tensor's name (as in the plain model), shape, dtype and about `SAMPLE` evenly spaced values, so
    that a billion weights take well under a second. It distinguishes checkpoints, but weights that differ only between
    the samples have the same fingerprint: it is not an integrity check.

    Examples
    --------
    Adapting does not change the frozen weights:

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
        values = flat[:: max(1, len(flat) // SAMPLE)].cpu().double() + 0.0  # -0.0 becomes 0.0
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype} ".encode() + values.numpy().tobytes())
    return digest.hexdigest()[:16]


def save_adapter(model: nn.Module, path: str | os.PathLike, *, name: str = "all", data: str | None = None) -> None:
    """Write a student's adapter to a file for `load_adapter`; only an adapter file is overwritten.

    Parameters
    ----------
    model
        From `load_backbone`, adapted and not merged.
    name
        Name of this set of tensors: ``"all"``, or the fold it was trained for, ``"fold0"``, ...
    data
        `hash_cohort` of the training cohort.

    Raises
    ------
    ValueError
        For a model without an adapter or not from `load_backbone`, or a name with a dot.

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
        raise ValueError("nothing to save: this model has no adapter (already merged, or method 'none')")
    if getattr(model, "spec", None) is None:
        raise ValueError("an adapter file records its backbone: load the student with load_backbone")
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
    """Join adapter files of one set each into one file, under the given names.

    Parameters
    ----------
    paths
        Name of the set in the new file -> file of `save_adapter`. Options and data fingerprints are copied.

    Raises
    ------
    ValueError
        For a file with several sets, or files that differ in method, layers, options or frozen weights.
    """
    if not paths:
        raise ValueError("no adapter files to join")
    infos = {name: read_adapter_info(path) for name, path in paths.items()}
    first, tensors = next(iter(infos)), {}
    for name, info in infos.items():
        if len(info.names) != 1:
            raise ValueError(f"{paths[name]} has {len(info.names)} adapters; join files with one each")
        require_name(name)
        for field, value in _shared_fields(info).items():
            if value != (expected := _shared_fields(infos[first])[field]):
                raise ValueError(
                    f"{field} is {expected!r} in {paths[first]} and {value!r} in {paths[name]}; join files of one run"
                )
        tensors |= {f"{name}.{k}": v for k, v in read_tensors(paths[name], info.names[0]).items()}
    joined = asdict(infos[first]) | {
        "options": {name: info.options[info.names[0]] for name, info in infos.items()},
        "data": {name: info.data[info.names[0]] for name, info in infos.items()},
        "version": __version__,
    }
    write_tensors(out, tensors, joined, kind="adapter")


def read_adapter_info(path: str | os.PathLike) -> AdapterInfo:
    """Read the metadata of an adapter file, without its tensors.

    Raises
    ------
    FileNotFoundError
        If the file does not exist.
    ValueError
        For a truncated file, or one not written by `save_adapter`.

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
        raise ValueError(f"{path}: its record has different sets of tensors in options and in data")
    for name, options in info.options.items():
        expected = {option: _OPTIONS[option] for option in _OPTIONS_OF[info.method]}
        check_record(path, options, expected, whose=f"an adapter's by {info.method}")
        if info.data[name] is not None and not is_line(info.data[name]):
            raise ValueError(f"{path}: its record has data {repr(info.data[name])[:120]}; it is a fingerprint or null")
    return info


def load_adapter(model: nn.Module, path: str | os.PathLike, *, name: str | None = None) -> nn.Module:
    """Adapt a plain student with the method, options and tensors of an adapter file.

    Parameters
    ----------
    model
        From `load_backbone`, with the frozen weights that the adapter was trained on.
    name
        Set of tensors to load; None if the file has only one.

    Returns
    -------
    torch.nn.Module
        The same model in eval mode; `merge` makes it a plain timm model again.

    Raises
    ------
    ValueError
        For another backbone or other frozen weights, an unknown name, a model that is already adapted, or an invalid
        file (`read_adapter_info`).

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
        raise ValueError(f"{path} has several adapters: {', '.join(info.names)}; pass one as name")
    name = name or info.names[0]
    if name not in info.names:
        raise ValueError(f"{path} has no adapter {name!r}; it has {', '.join(info.names)}")
    spec = getattr(model, "spec", None)
    backbone = spec.name if spec is not None else type(model).__name__
    if backbone != info.backbone:
        raise ValueError(f"{path} was trained on backbone {info.backbone!r}, not {backbone!r}")
    fingerprint = backbone_fingerprint(model)
    if fingerprint != info.fingerprint:
        raise ValueError(
            f"{path} was trained on {backbone} with weights {info.weights!r} (fingerprint {info.fingerprint}); this "
            f"student has weights {model.weights_origin!r} (fingerprint {fingerprint}): load those of the adapter"
        )
    state, r = read_tensors(path, name), info.options[name]["r"]
    # Every method trains at least r values for each output of each layer. A file with a huge r and few values must not
    # make `adapt` allocate more than the student and the file together.
    needed = r * sum(model.get_submodule(layer).out_features for layer in target_layers(model, info.layers))
    stored, base = (sum(tensor.numel() for tensor in tensors) for tensors in (state.values(), model.parameters()))
    if needed > stored + base:
        raise ValueError(f"{path}: r={r} in its record needs at least {needed:,} values, but {name!r} has {stored:,}")
    try:
        adapt(model, info.method, targets=info.layers, **info.options[name])
        return load_adapter_state(model, state).eval()
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def _plain(state: Mapping[str, torch.Tensor], adapted: tuple[str, ...]) -> dict[str, torch.Tensor]:
    """Return the frozen tensors under their names in the plain model."""
    plain = {}
    for name, tensor in state.items():
        layer = next((prefix for prefix in adapted if name.startswith(prefix)), None)
        if layer is None:
            plain[name] = tensor
        elif name.startswith((f"{layer}base.", f"{layer}base_layer.")):  # Bone's name for it, and peft's
            plain[layer + name.rpartition(".")[2]] = tensor
    return plain


def _shared_fields(info: AdapterInfo) -> dict:
    options = {k: v for k, v in info.options[info.names[0]].items() if k != "total_steps"}  # depends on the fold's size
    fields = ("method", "layers", "backbone", "fingerprint")
    return {field: getattr(info, field) for field in fields} | {"options": options}
