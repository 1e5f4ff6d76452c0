"""A backbone of one's own: its row checked, known by name in this process, and kept as a YAML file."""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Mapping
from pathlib import Path

from peka_lite._core._yaml import is_line, read_yaml, yaml_text
from peka_lite._core.device import PRECISION
from peka_lite._core.io import write_file_atomically
from peka_lite._core.lazy import DTYPES, LAYER_TYPES, LazyMapping
from peka_lite._core.names import did_you_mean
from peka_lite._core.received import file_inside
from peka_lite.backbones.registry import _BACKBONES, BACKBONES, Backbone, check_block_size
from peka_lite.data._choices import ACCESS

POOLING = ("token", "avg", "token+avg", "network")
_PART = r"\w[\w.-]*"  # of a repository, file or revision: no folder above, no absolute path
_SOURCE = re.compile(rf"package/{_PART}|datasets/{_PART}/{_PART}(/{_PART})+|(?!datasets/)({_PART}/)?{_PART}", re.ASCII)
_REVISION = re.compile(rf"{_PART}(/{_PART})*", re.ASCII)
_ARCH = re.compile(r"\w+(\.[\w-]+)?", re.ASCII)  # of timm, with the tag of its weights or without
_WORD = re.compile(r"[a-z0-9_]{0,32}")  # what timm calls a pooling, an activation, ...
_LARGEST = {"dim": 65_536, "input_size": 1024}
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
_WHOLE = {  # a whole number, or a list of them; least and greatest
    "img_size": (1, 1024), "patch_size": (1, 256), "embed_dim": (1, 16_384), "depth": (1, 200), "num_heads": (1, 256),
    "reg_tokens": (0, 1024), "num_reg_tokens": (0, 1024), "depths": (0, 200), "dims": (1, 16_384),
    "window_size": (1, 1024), "pretrained_window_sizes": (0, 1024), "kernel_sizes": (1, 64), "head_dim": (1, 1024),
    "num_kv_heads": (1, 256), "attn_pool_num_heads": (1, 256), "swiglu_align_to": (0, 1024), "layers": (1, 200),
    "channels": (1, 16_384), "cardinality": (1, 256), "base_width": (1, 1024), "stem_width": (1, 1024),
    "head_hidden_size": (1, 65_536), "ref_feat_shape": (1, 1024),
}  # fmt: skip
_NUMBERS = {  # least and greatest
    "mlp_ratio": (1 / 64, 64), "attn_pool_mlp_ratio": (1 / 64, 64), "init_values": (0, 1e3), "ls_init_value": (0, 1e3),
    "norm_eps": (0, 1), "head_init_scale": (0, 1e3), "rope_temperature": (1, 1e9), "rope_grid_offset": (-1e3, 1e3),
    **dict.fromkeys(("rope_shift_coords", "rope_jitter_coords", "rope_rescale_coords"), (0, 1e3)),
    **{f"{part}drop_rate": (0, 1) for part in ("", "pos_", "patch_", "proj_", "attn_")}, "drop_path_rate": (0, 1),
}  # fmt: skip
_OPTIONS = (*_FLAGS, *_WORDS, *_LAYERS, *_WHOLE, *_NUMBERS)  # of `timm.create_model`; none reads a file or the net
FILE = "backbone.yml"  # in the folder of a run whose backbone is not the package's
PACKAGE = frozenset(BACKBONES)
_FIELDS = {field.name: field for field in dataclasses.fields(Backbone)}
_REQUIRED = [name for name, f in _FIELDS.items() if f.default is f.default_factory is dataclasses.MISSING]


def register_backbone(row: Backbone) -> Backbone:
    """Make a row of one's own known by its name, as the names in `BACKBONES` are, until this process ends.

    `RunConfig`, `load_backbone` and all that take a backbone's name then take it. A run keeps the row in its folder, so
    that `load_trained` finds it again.

    Parameters
    ----------
    row
        Any architecture of timm. Bone and the others need a vision transformer; ``bone_r=None`` says that it is none.
        A layer among `options` is named, as ``"timm.layers:SwiGLUPacked"`` or ``"torch.nn:SiLU"``. Options and layers
        are those of a fixed list, within bounds.

    Returns
    -------
    Backbone
        The row as it is known. Registering it twice does nothing.

    Raises
    ------
    ValueError
        For a name that stands for another row, and for values that cannot be right.

    Examples
    --------
    >>> from dataclasses import replace
    >>> import peka_lite as pk
    >>> row = replace(pk.backbones.BACKBONES["mini"], mean=(0.5, 0.5, 0.5))
    >>> pk.backbones.register_backbone(row)  # `replace(row, name="mini-half")` would do
    Traceback (most recent call last):
    ValueError: backbone 'mini' is known already, with another mean; give this one another name
    """
    row = _checked(row)
    if (known := BACKBONES.get(row.name)) is not None and known != row:
        other = [name for name in _FIELDS if getattr(known, name) != getattr(row, name)]
        raise ValueError(
            f"backbone {row.name!r} is known already, with another {', '.join(other)}; give this one another name"
        )
    return _BACKBONES.setdefault(row.name, row)


def read_backbone(path: str | os.PathLike) -> Backbone:
    """Read a row from a YAML file: the fields of `Backbone` by name.

    Raises
    ------
    FileNotFoundError
        For a file that is not there.
    ValueError
        Naming the file and the field that is missing, unknown or wrong.

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
        raise FileNotFoundError(f"{path}: no such file; a backbone is a known name or the YAML file of a row")
    fields = read_yaml(path, largest=2**16)
    try:
        if not isinstance(fields, dict):
            raise ValueError(f"a row maps fields to values: {', '.join(_REQUIRED)}, ...")
        if "licence" in fields:  # the spelling of version 0.1
            fields["license"] = fields.pop("licence")
        if odd := [name for name in fields if name not in _FIELDS]:
            raise ValueError(f"unknown field {odd[0]!r}{did_you_mean(str(odd[0]), _FIELDS)}")
        if missing := [name for name in _REQUIRED if name not in fields]:
            raise ValueError(f"{', '.join(missing)} missing; a row needs {', '.join(_REQUIRED)}")
        for name in ("mean", "std"):
            fields[name] = tuple(fields[name]) if isinstance(fields[name], list) else fields[name]
        for name in ("options", "precision"):
            if isinstance(fields.get(name), dict):
                fields[name] = LazyMapping(fields[name])
        return _checked(Backbone(**fields))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def backbone_row(name: str | os.PathLike | Backbone) -> Backbone:
    """Return the row of a known name, of a YAML file (``.yml``, ``.yaml``), or the row that is given.

    Raises
    ------
    FileNotFoundError, ValueError
        As `read_backbone`, and for a name that nothing knows.
    """
    if isinstance(name, Backbone):
        return name
    if is_backbone_file(name):
        return register_backbone(read_backbone(name))
    if name not in BACKBONES:
        raise ValueError(
            f"unknown backbone {name!r}; one's own is given as the YAML file of its row, or made known by "
            f"register_backbone; known: {', '.join(BACKBONES)}{did_you_mean(str(name), BACKBONES)}"
        )
    return BACKBONES[name]


def is_backbone_file(name: str | os.PathLike) -> bool:
    """Say whether a backbone's name is that of a YAML file, whether or not it is there."""
    return Path(name).suffix in (".yml", ".yaml")


def save_backbone(name: str, folder: Path) -> None:
    """Keep the row of a backbone that is not the package's in a run's folder."""
    if name not in PACKAGE:
        write_file_atomically(folder / FILE, yaml_text(row_fields(BACKBONES[name])).encode())


def restore_backbone(folder: Path) -> None:
    """Make the backbone of a run's folder known, where the folder keeps its row.

    Raises
    ------
    ValueError
        If another row is known under its name; the message names both.
    """
    if (path := folder / FILE).is_file():
        row = read_backbone(file_inside(folder, FILE))
        try:
            register_backbone(row)
        except ValueError as error:
            raise ValueError(f"{path}: {error}, or load this run in a process of its own") from None


def row_fields(row: Backbone) -> dict:
    """Return a row's fields as YAML and JSON hold them; what stands at its default is left out."""
    fields = {}
    for name, field in _FIELDS.items():
        value = getattr(row, name)
        if name == "precision":
            if value is PRECISION:
                continue
            value = {device: str(kind).replace(".", ":") for device, kind in _as_given(value).items()}
        if name == "options":
            value = _options(row)
        if name in _REQUIRED or value != field.default:
            fields[name] = list(value) if isinstance(value, tuple) else value
    return {name: value for name, value in fields.items() if name != "options" or value}


def check_statistic(name: str, value: tuple[float, float, float]) -> None:
    """Refuse a mean or standard deviation of pixels (``"mean"``, ``"std"``) that cannot be one."""
    if not isinstance(value, tuple) or len(value) != 3 or not all(type(v) in (int, float) for v in value):
        raise ValueError(f"{name} is three numbers (red, green, blue), not {value!r}")
    if not all(0 <= v <= 1 for v in value) or (name == "std" and min(value) == 0):
        raise ValueError(f"{name} is on a scale of 0 to 1, not {value!r}; divide by 255")


def _options(row: Backbone) -> dict:
    return _as_given(row.options)


def _as_given(values) -> dict:
    return dict(values._values if isinstance(values, LazyMapping) else values)


def _brief(value) -> str:
    text = repr(value)
    return text if len(text) <= 120 else f"{text[:119]}…"


def check_architecture(arch: str) -> None:
    """Refuse what cannot be the name of an architecture in timm: its ``hf-hub:`` and ``local-dir:`` read elsewhere."""
    if not _ARCH.fullmatch(arch):
        raise ValueError(f"arch is a name of timm, as 'vit_small_patch16_224', not {_brief(arch)}")


def _checked(row: Backbone) -> Backbone:
    """Refuse values that cannot be right; whether timm builds the architecture is seen when it does."""
    for name, kind in {"name": str, "arch": str, "dim": int, "input_size": int, "license": str}.items():
        value = getattr(row, name)
        if type(value) is not kind or not value or (kind is str and not is_line(value)):
            told = "text of one line" if kind is str else "a whole number above 0"
            raise ValueError(f"{name} is {told}, not {_brief(value)}")
    if Path(row.name).name != row.name or row.name == ".." or "\\" in row.name or is_backbone_file(row.name):
        raise ValueError(f"name {row.name!r}: it names folders, so no slash in it and no .yml at its end")
    check_architecture(row.arch)
    for name, most in _LARGEST.items():
        if getattr(row, name) < 1:
            raise ValueError(f"{name} is a whole number above 0, not {getattr(row, name)}")
        if getattr(row, name) > most:
            raise ValueError(f"{name} is at most {most:,}, not {getattr(row, name):,}")
    for name in ("mean", "std"):
        check_statistic(name, getattr(row, name))
    _check_origin(row)
    if row.pooling not in POOLING:
        raise ValueError(f"unknown pooling {_brief(row.pooling)}; known: {', '.join(POOLING)}")
    if row.access not in (None, *ACCESS):
        raise ValueError(f"access is one of {', '.join(ACCESS)}, not {row.access!r}")
    if row.bone_r is not None:
        if type(row.bone_r) is not int:
            raise ValueError(f"bone_r is a whole number or None, not {_brief(row.bone_r)}")
        try:
            check_block_size(row, row.bone_r)
        except ValueError as error:
            raise ValueError(f"bone_r: {error}; None is for a model without attention to adapt") from None
    for name in ("options", "precision"):
        if not isinstance(getattr(row, name), Mapping):
            example = ": {'cpu': torch:float32, ...}" if name == "precision" else ""
            raise ValueError(f"{name} maps names to values{example}, not {_brief(getattr(row, name))}")
    if row.precision.keys() != PRECISION.keys():
        example = ", ".join(f"'{device}': {kind}" for device, kind in _as_given(PRECISION).items())
        raise ValueError(f"precision names one type for each kind of device, as {{{example}}}")
    for device, kind in _as_given(row.precision).items():
        if str(kind).replace(".", ":") not in DTYPES:
            raise ValueError(f"precision: {device} is {_brief(kind)}; give one of {', '.join(DTYPES)}")
    for option, value in _options(row).items():
        check_option(option, value)
    late = {name: LazyMapping(_as_given(getattr(row, name))) for name in ("options", "precision")}
    late = {name: values for name, values in late.items() if not isinstance(getattr(row, name), LazyMapping)}
    return dataclasses.replace(row, **late) if late else row


def check_option(option: str, value) -> None:
    """Refuse what a row cannot hand to timm, with the nearest that it can."""
    if option not in _OPTIONS:
        raise ValueError(
            f"options: {_brief(option)} is none that a row can set{did_you_mean(str(option), _OPTIONS)}; known: "
            f"{', '.join(sorted(_OPTIONS))}"
        )
    if value is None:
        return
    if option in _FLAGS:
        right, wanted = type(value) is bool, "true or false"
    elif option in _WHOLE:
        least, most = _WHOLE[option]
        values = value if type(value) is list and 0 < len(value) <= 16 else [value]
        right = all(type(v) is int and least <= v <= most for v in values)
        wanted = f"a whole number from {least} to {most:,}, or a list of them"
    elif option in _NUMBERS:
        least, most = _NUMBERS[option]
        right, wanted = type(value) in (int, float) and least <= value <= most, f"a number from {least:g} to {most:g}"
    else:
        word = isinstance(value, str) and _WORD.fullmatch(value) is not None  # timm has names of its own for layers
        right, wanted = word, "a plain name"
        if option in _LAYERS:
            right = word or (isinstance(value, str) and value in LAYER_TYPES)
            wanted = f"plain values, a layer as text: 'timm.layers:SwiGLUPacked'; known: {', '.join(LAYER_TYPES)}"
    if not right:
        raise ValueError(f"options: {option} is {_brief(value)}; give {wanted}")


def _check_origin(row: Backbone) -> None:
    """Refuse a source, a revision or a page that leads elsewhere than its field says."""
    source = row.source
    if source is not None and not (is_line(source) and _SOURCE.fullmatch(source) and ".." not in source):
        raise ValueError(
            f"source is a repository of the hub ('owner/name'), 'datasets/owner/name/FILE', 'package/FILE' or None, "
            f"not {_brief(source)}"
        )
    revision = row.revision
    if revision is not None and not (is_line(revision) and _REVISION.fullmatch(revision) and ".." not in revision):
        raise ValueError(f"revision is a commit, tag or branch of the hub, not {_brief(revision)}")
    if row.gate is not None and not (is_line(row.gate) and re.fullmatch(r"https?://\S+", row.gate)):
        raise ValueError(f"gate is the address of a page (https://...) or None, not {_brief(row.gate)}")
