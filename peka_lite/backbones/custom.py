"""Custom backbones: check their rows, register them for this process, and store them as YAML files."""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Mapping
from pathlib import Path

from peka_lite._core._lazy import DTYPES, LAYER_TYPES, LazyMapping
from peka_lite._core._yaml import is_line, read_yaml, yaml_text
from peka_lite._core.device import PRECISION
from peka_lite._core.io import write_file_atomically
from peka_lite._core.names import did_you_mean
from peka_lite._core.untrusted_files import file_inside
from peka_lite.backbones.registry import _BACKBONES, BACKBONES, Backbone, check_block_size
from peka_lite.data._choices import ACCESS

POOLING = ("token", "avg", "token+avg", "network")
_PART = r"\w[\w.-]*"  # of a repository, file or revision: no parent folder, no absolute path
_SOURCE = re.compile(rf"package/{_PART}|datasets/{_PART}/{_PART}(/{_PART})+|(?!datasets/)({_PART}/)?{_PART}", re.ASCII)
_REVISION = re.compile(rf"{_PART}(/{_PART})*", re.ASCII)
_ARCH = re.compile(r"\w+(\.[\w-]+)?", re.ASCII)  # of timm, with or without the tag of its weights
_WORD = re.compile(r"[a-z0-9_]{0,32}")  # timm's name of a pooling, an activation, ...
_LIMITS = {"dim": 65_536, "input_size": 1024}
_FLAGS = (
    "always_partition", "attn_only_layer_scale", "class_token", "conv_bias", "conv_mlp", "dynamic_img_pad",
    "dynamic_img_size", "fc_norm", "final_norm", "fix_init", "head_norm_first", "no_embed_class",
    "pool_include_prefix", "pre_norm", "proj_bias", "qk_norm", "qkv_bias", "qkv_fused", "rope_rotate_half",
    "scale_attn_inner", "scale_attn_norm", "scale_mlp", "scale_mlp_norm", "strict_img_size", "swiglu_mlp",
    "use_abs_pos_emb", "use_fc_norm", "use_grn", "use_post_norm", "use_post_transformer_norm",
    "use_pre_transformer_norm", "use_rel_pos_bias", "use_rot_pos_emb", "use_shared_rel_pos_bias",
)  # fmt: skip
_WORDS = ("attn_type", "global_pool", "pos_embed", "rope_grid_indexing", "rope_type", "stem_type", "weight_init")
_LAYERS = ("aa_layer", "act_layer", "attn_layer", "embed_layer", "embed_norm_layer", "mlp_layer", "norm_layer")
_INTEGERS = {  # minimum and maximum of an integer or a list of integers
    "img_size": (1, 1024), "patch_size": (1, 256), "embed_dim": (1, 16_384), "depth": (1, 200), "num_heads": (1, 256),
    "reg_tokens": (0, 1024), "num_reg_tokens": (0, 1024), "depths": (0, 200), "dims": (1, 16_384),
    "window_size": (1, 1024), "pretrained_window_sizes": (0, 1024), "kernel_sizes": (1, 64), "head_dim": (1, 1024),
    "num_kv_heads": (1, 256), "attn_pool_num_heads": (1, 256), "swiglu_align_to": (0, 1024), "layers": (1, 200),
    "channels": (1, 16_384), "cardinality": (1, 256), "base_width": (1, 1024), "stem_width": (1, 1024),
    "head_hidden_size": (1, 65_536), "ref_feat_shape": (1, 1024),
}  # fmt: skip
_NUMBERS = {  # minimum and maximum
    "mlp_ratio": (1 / 64, 64), "attn_pool_mlp_ratio": (1 / 64, 64), "init_values": (0, 1e3), "ls_init_value": (0, 1e3),
    "norm_eps": (0, 1), "head_init_scale": (0, 1e3), "rope_temperature": (1, 1e9), "rope_grid_offset": (-1e3, 1e3),
    **dict.fromkeys(("rope_shift_coords", "rope_jitter_coords", "rope_rescale_coords"), (0, 1e3)),
    **{f"{part}drop_rate": (0, 1) for part in ("", "pos_", "patch_", "proj_", "attn_")}, "drop_path_rate": (0, 1),
}  # fmt: skip
_OPTIONS = (*_FLAGS, *_WORDS, *_LAYERS, *_INTEGERS, *_NUMBERS)  # of `timm.create_model`; none reads a file or downloads
ROW_FILE = "backbone.yml"  # in the folder of a run with a custom backbone
PACKAGED_NAMES = frozenset(BACKBONES)
_FIELDS = {field.name: field for field in dataclasses.fields(Backbone)}
_REQUIRED = [name for name, f in _FIELDS.items() if f.default is f.default_factory is dataclasses.MISSING]


def register_backbone(row: Backbone) -> Backbone:
    """Register a custom row under its name until the process ends.

    `RunConfig`, `load_backbone` and all functions that take a backbone's name then accept it. A run stores the row in
    its folder, and `load_trained` restores it.

    Parameters
    ----------
    row
        Any timm architecture. Adapters need a vision transformer; for other networks set ``bone_r=None``. Layers in
        `options` are given as text, such as ``"timm.layers:SwiGLUPacked"`` or ``"torch.nn:SiLU"``. Only listed options
        and layers are allowed, within bounds.

    Returns
    -------
    Backbone
        The registered row. Registering an equal row again has no effect.

    Raises
    ------
    ValueError
        For a name that another row has, and for invalid values.

    Examples
    --------
    >>> from dataclasses import replace
    >>> import peka_lite as pk
    >>> row = replace(pk.backbones.BACKBONES["mini"], mean=(0.5, 0.5, 0.5))
    >>> pk.backbones.register_backbone(row)  # `replace(row, name="mini-half")` works
    Traceback (most recent call last):
    ValueError: backbone 'mini' is already registered with another mean; choose another name
    """
    row = _check_row(row)
    if (registered := BACKBONES.get(row.name)) is not None and registered != row:
        changed = [name for name in _FIELDS if getattr(registered, name) != getattr(row, name)]
        raise ValueError(
            f"backbone {row.name!r} is already registered with another {', '.join(changed)}; choose another name"
        )
    return _BACKBONES.setdefault(row.name, row)


def read_backbone(path: str | os.PathLike) -> Backbone:
    """Read a row from a YAML file with the fields of `Backbone`.

    Raises
    ------
    FileNotFoundError
        For a missing file.
    ValueError
        For a missing, unknown or invalid field.

    Examples
    --------
    >>> from pathlib import Path
    >>> import peka_lite as pk
    >>> text = "{name: vit-s, arch: vit_small_patch16_224, source: null, dim: 384, license: Apache-2.0, bone_r: 64,"
    >>> _ = Path("vit_s.yml").write_text(text + "mean: [0.5, 0.5, 0.5], std: [0.5, 0.5, 0.5]}")
    >>> pk.backbones.read_backbone("vit_s.yml").dim
    384
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: file not found; a backbone is a registered name or a YAML file")
    fields = read_yaml(path, largest=2**16)
    try:
        if not isinstance(fields, dict):
            raise ValueError(f"the file must map fields to values: {', '.join(_REQUIRED)}, ...")
        if "licence" in fields:  # spelling of version 0.1
            fields["license"] = fields.pop("licence")
        if unknown := [name for name in fields if name not in _FIELDS]:
            raise ValueError(f"unknown field {unknown[0]!r}{did_you_mean(str(unknown[0]), _FIELDS)}")
        if missing := [name for name in _REQUIRED if name not in fields]:
            raise ValueError(f"{', '.join(missing)} missing; a row needs {', '.join(_REQUIRED)}")
        for name in ("mean", "std"):
            fields[name] = tuple(fields[name]) if isinstance(fields[name], list) else fields[name]
        for name in ("options", "precision"):
            if isinstance(fields.get(name), dict):
                fields[name] = LazyMapping(fields[name])
        return _check_row(Backbone(**fields))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def get_backbone(name: str | os.PathLike | Backbone) -> Backbone:
    """Return the row of a registered name or a YAML file (``.yml``, ``.yaml``), or the given row itself.

    Raises
    ------
    FileNotFoundError, ValueError
        As `read_backbone`, and for an unknown name.
    """
    if isinstance(name, Backbone):
        return name
    if is_backbone_file(name):
        return register_backbone(read_backbone(name))
    if name not in BACKBONES:
        raise ValueError(
            f"unknown backbone {name!r}; for a custom one, pass its YAML file or call register_backbone; "
            f"known: {', '.join(BACKBONES)}{did_you_mean(str(name), BACKBONES)}"
        )
    return BACKBONES[name]


def is_backbone_file(name: str | os.PathLike) -> bool:
    """Return whether a backbone's name is the path of a YAML file, existing or not."""
    return Path(name).suffix in (".yml", ".yaml")


def save_backbone(name: str, folder: Path) -> None:
    """Store the row of a custom backbone in a run's folder."""
    if name not in PACKAGED_NAMES:
        write_file_atomically(folder / ROW_FILE, yaml_text(row_fields(BACKBONES[name])).encode())


def restore_backbone(folder: Path) -> None:
    """Register the backbone that is stored in a run's folder, if any.

    Raises
    ------
    ValueError
        If another row is registered under its name.
    """
    if (path := folder / ROW_FILE).is_file():
        row = read_backbone(file_inside(folder, ROW_FILE))
        try:
            register_backbone(row)
        except ValueError as error:
            raise ValueError(f"{path}: {error}, or load this run in a separate process") from None


def row_fields(row: Backbone) -> dict:
    """Return a row's fields for YAML and JSON, without those at their default."""
    fields = {}
    for name, field in _FIELDS.items():
        value = getattr(row, name)
        if name == "precision":
            if value is PRECISION:
                continue
            value = {device: str(kind).replace(".", ":") for device, kind in _to_dict(value).items()}
        if name == "options":
            value = _to_dict(row.options)
        if name in _REQUIRED or value != field.default:
            fields[name] = list(value) if isinstance(value, tuple) else value
    return {name: value for name, value in fields.items() if name != "options" or value}


def check_statistic(name: str, value: tuple[float, float, float]) -> None:
    """Check a mean or standard deviation of pixels (``"mean"``, ``"std"``)."""
    if not isinstance(value, tuple) or len(value) != 3 or not all(type(v) in (int, float) for v in value):
        raise ValueError(f"{name} must be three numbers (red, green, blue), not {value!r}")
    if not all(0 <= v <= 1 for v in value) or (name == "std" and min(value) == 0):
        raise ValueError(f"{name} must be on a scale of 0 to 1, not {value!r}; divide by 255")


def _to_dict(values) -> dict:
    return dict(values._values if isinstance(values, LazyMapping) else values)


def _shorten(value) -> str:
    text = repr(value)
    return text if len(text) <= 120 else f"{text[:119]}…"


def check_architecture(arch: str) -> None:
    """Check that `arch` has the form of a timm architecture, not of timm's ``hf-hub:`` and ``local-dir:`` sources."""
    if not _ARCH.fullmatch(arch):
        raise ValueError(f"arch must be a timm name such as 'vit_small_patch16_224', not {_shorten(arch)}")


def _check_row(row: Backbone) -> Backbone:
    """Return a row with checked values. Whether timm can build the architecture is checked when it is built."""
    for name, kind in {"name": str, "arch": str, "dim": int, "input_size": int, "license": str}.items():
        value = getattr(row, name)
        if type(value) is not kind or not value or (kind is str and not is_line(value)):
            expected = "text of one line" if kind is str else "a whole number above 0"
            raise ValueError(f"{name} must be {expected}, not {_shorten(value)}")
    if Path(row.name).name != row.name or row.name == ".." or "\\" in row.name or is_backbone_file(row.name):
        raise ValueError(f"name {row.name!r} is used for folders; it must not contain a slash or end in .yml")
    check_architecture(row.arch)
    for name, limit in _LIMITS.items():
        if getattr(row, name) < 1:
            raise ValueError(f"{name} must be a whole number above 0, not {getattr(row, name)}")
        if getattr(row, name) > limit:
            raise ValueError(f"{name} must be at most {limit:,}, not {getattr(row, name):,}")
    for name in ("mean", "std"):
        check_statistic(name, getattr(row, name))
    _check_origin(row)
    if row.pooling not in POOLING:
        raise ValueError(f"unknown pooling {_shorten(row.pooling)}; known: {', '.join(POOLING)}")
    if row.access not in (None, *ACCESS):
        raise ValueError(f"access must be one of {', '.join(ACCESS)}, not {row.access!r}")
    if row.bone_r is not None:
        if type(row.bone_r) is not int:
            raise ValueError(f"bone_r must be a whole number or None, not {_shorten(row.bone_r)}")
        try:
            check_block_size(row, row.bone_r)
        except ValueError as error:
            raise ValueError(f"bone_r: {error}; use None for a model without attention") from None
    for name in ("options", "precision"):
        if not isinstance(getattr(row, name), Mapping):
            example = ": {'cpu': torch:float32, ...}" if name == "precision" else ""
            raise ValueError(f"{name} must map names to values{example}, not {_shorten(getattr(row, name))}")
    if row.precision.keys() != PRECISION.keys():
        example = ", ".join(f"'{device}': {kind}" for device, kind in _to_dict(PRECISION).items())
        raise ValueError(f"precision must have one type per kind of device: {{{example}}}")
    for device, kind in _to_dict(row.precision).items():
        if str(kind).replace(".", ":") not in DTYPES:
            raise ValueError(f"precision: {device} is {_shorten(kind)}; give one of {', '.join(DTYPES)}")
    for option, value in _to_dict(row.options).items():
        check_option(option, value)
    lazy = {name: LazyMapping(_to_dict(getattr(row, name))) for name in ("options", "precision")}
    lazy = {name: values for name, values in lazy.items() if not isinstance(getattr(row, name), LazyMapping)}
    return dataclasses.replace(row, **lazy) if lazy else row


def check_option(option: str, value) -> None:
    """Check the name and value of an option for timm."""
    if option not in _OPTIONS:
        raise ValueError(
            f"options: {_shorten(option)} is not allowed{did_you_mean(str(option), _OPTIONS)}; known: "
            f"{', '.join(sorted(_OPTIONS))}"
        )
    if value is None:
        return
    if option in _FLAGS:
        valid, expected = type(value) is bool, "true or false"
    elif option in _INTEGERS:
        low, high = _INTEGERS[option]
        values = value if type(value) is list and 0 < len(value) <= 16 else [value]
        valid = all(type(v) is int and low <= v <= high for v in values)
        expected = f"a whole number from {low} to {high:,}, or a list of them"
    elif option in _NUMBERS:
        low, high = _NUMBERS[option]
        valid, expected = type(value) in (int, float) and low <= value <= high, f"a number from {low:g} to {high:g}"
    else:
        valid, expected = isinstance(value, str) and _WORD.fullmatch(value) is not None, "a plain name"
        if option in _LAYERS:  # timm has short names for layers too
            valid = valid or (isinstance(value, str) and value in LAYER_TYPES)
            expected = f"a layer as text, such as 'timm.layers:SwiGLUPacked'; known: {', '.join(LAYER_TYPES)}"
    if not valid:
        raise ValueError(f"options: {option} is {_shorten(value)}; give {expected}")


def _check_origin(row: Backbone) -> None:
    """Check the form of a row's source, revision and gate."""
    source = row.source
    if source is not None and not (is_line(source) and _SOURCE.fullmatch(source) and ".." not in source):
        raise ValueError(
            f"source must be a hub repository ('owner/name'), 'datasets/owner/name/FILE', 'package/FILE' or None, "
            f"not {_shorten(source)}"
        )
    revision = row.revision
    if revision is not None and not (is_line(revision) and _REVISION.fullmatch(revision) and ".." not in revision):
        raise ValueError(f"revision must be a commit, tag or branch of the hub, not {_shorten(revision)}")
    if row.gate is not None and not (is_line(row.gate) and re.fullmatch(r"https?://\S+", row.gate)):
        raise ValueError(f"gate must be the address of a page (https://...) or None, not {_shorten(row.gate)}")
