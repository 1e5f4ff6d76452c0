"""A backbone of one's own: its row checked, known by name in this process, and kept as a YAML file."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

from peka_lite._yaml import read_yaml, yaml_text
from peka_lite.registry import _BACKBONES, ACCESS, BACKBONES, PRECISION, Backbone, Late, check_block_size, did_you_mean

POOLING = ("token", "avg", "token+avg", "network")
MODULES = ("timm.layers:", "torch.nn:")  # where a layer that an option names may come from
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
        A layer among `options` is named, as ``"timm.layers:SwiGLUPacked"`` or ``"torch.nn:SiLU"``.

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
    >>> row = replace(pk.BACKBONES["mini"], mean=(0.5, 0.5, 0.5))
    >>> pk.register_backbone(row)  # `replace(row, name="mini-half")` would do
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
    >>> text = "{name: vit-s, arch: vit_small_patch16_224, source: null, dim: 384, licence: Apache-2.0, bone_r: 64,"
    >>> _ = Path("vit_s.yml").write_text(text + "mean: [0.5, 0.5, 0.5], std: [0.5, 0.5, 0.5]}")
    >>> pk.read_backbone("vit_s.yml").dim
    384
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; a backbone is a known name or the YAML file of a row")
    fields = read_yaml(path)
    try:
        if not isinstance(fields, dict):
            raise ValueError(f"a row maps fields to values: {', '.join(_REQUIRED)}, ...")
        if odd := [name for name in fields if name not in _FIELDS]:
            raise ValueError(f"unknown field {odd[0]!r}{did_you_mean(str(odd[0]), _FIELDS)}")
        if missing := [name for name in _REQUIRED if name not in fields]:
            raise ValueError(f"{', '.join(missing)} missing; a row needs {', '.join(_REQUIRED)}")
        for name in ("mean", "std"):
            fields[name] = tuple(fields[name]) if isinstance(fields[name], list) else fields[name]
        for name in ("options", "precision"):
            if isinstance(fields.get(name), dict):
                fields[name] = Late(fields[name])
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
    if is_file(name):
        return register_backbone(read_backbone(name))
    if name not in BACKBONES:
        raise ValueError(
            f"unknown backbone {name!r}; one's own is given as the YAML file of its row, or made known by "
            f"register_backbone; known: {', '.join(BACKBONES)}{did_you_mean(str(name), BACKBONES)}"
        )
    return BACKBONES[name]


def is_file(name: str | os.PathLike) -> bool:
    """Say whether a backbone's name is that of a YAML file, whether or not it is there."""
    return Path(name).suffix in (".yml", ".yaml")


def save_backbone(name: str, folder: Path) -> None:
    """Keep the row of a backbone that is not the package's in a run's folder."""
    if name not in PACKAGE:
        (folder / FILE).write_text(yaml_text(row_fields(BACKBONES[name])), encoding="utf-8")


def restore_backbone(folder: Path) -> None:
    """Make the backbone of a run's folder known, where the folder keeps its row.

    Raises
    ------
    ValueError
        If another row is known under its name; the message names both.
    """
    if (path := folder / FILE).is_file():
        row = read_backbone(path)
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
            value = {device: str(kind).replace(".", ":") for device, kind in value.items()}
        if name == "options":
            value = _options(row)
        if name in _REQUIRED or value != field.default:
            fields[name] = list(value) if isinstance(value, tuple) else value
    return {name: value for name, value in fields.items() if name != "options" or value}


def check_statistic(name: str, value: tuple[float, float, float]) -> None:
    """Refuse a mean or standard deviation of pixels (``"mean"``, ``"std"``) that cannot be one."""
    if not isinstance(value, tuple) or len(value) != 3 or not all(type(v) in (int, float) for v in value):
        raise ValueError(f"{name} is three numbers (red, green, blue), not {value!r}")
    if not (max(value) <= 1 and min(value) >= 0) or (name == "std" and min(value) == 0):
        raise ValueError(f"{name} is on a scale of 0 to 1, not {value!r}; divide by 255")


def _options(row: Backbone) -> dict:
    return dict(row.options._values if isinstance(row.options, Late) else row.options)


def _checked(row: Backbone) -> Backbone:
    """Refuse values that cannot be right; whether timm builds the architecture is seen when it does."""
    for name, kind in {"name": str, "arch": str, "dim": int, "input_size": int, "licence": str}.items():
        if type(getattr(row, name)) is not kind or not getattr(row, name):
            told = "text" if kind is str else "a whole number above 0"
            raise ValueError(f"{name} is {told}, not {getattr(row, name)!r}")
    if Path(row.name).name != row.name or is_file(row.name):
        raise ValueError(f"name {row.name!r}: it names folders, so no slash in it and no .yml at its end")
    for name in ("dim", "input_size"):
        if getattr(row, name) < 1:
            raise ValueError(f"{name} is a whole number above 0, not {getattr(row, name)}")
    for name in ("mean", "std"):
        check_statistic(name, getattr(row, name))
    if row.pooling not in POOLING:
        raise ValueError(f"unknown pooling {row.pooling!r}; known: {', '.join(POOLING)}")
    if row.access not in (None, *ACCESS):
        raise ValueError(f"access is one of {', '.join(ACCESS)}, not {row.access!r}")
    if row.bone_r is not None:
        try:
            check_block_size(row, row.bone_r)
        except ValueError as error:
            raise ValueError(f"bone_r: {error}; None is for a model without attention to adapt") from None
    if row.precision.keys() != PRECISION.keys():
        raise ValueError(f"precision names a type for {', '.join(PRECISION)}, not for {', '.join(row.precision)}")
    for option, value in _options(row).items():
        named = isinstance(value, str) and ":" in value
        if not isinstance(value, str | int | float | bool | list | None) or (named and not value.startswith(MODULES)):
            raise ValueError(
                f"options: {option} is {value!r}; give plain values, a layer as text: 'timm.layers:SwiGLUPacked'"
            )
    return row if isinstance(row.options, Late) else dataclasses.replace(row, options=Late(row.options))
