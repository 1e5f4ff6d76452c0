"""Check the keys, names and values of a sweep file against the settings or the notebook it varies."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from importlib.util import find_spec
from pathlib import Path

from peka_lite._core.names import did_you_mean
from peka_lite.experiments.settings import SETTINGS, check_field
from peka_lite.experiments.sweeps._notebook import read_parameters

KEYS = ("title", "notebook", "memory", "fixed", "grid", "zip", "list", "exclude")


def check_shape(fields: dict) -> None:
    """Check that all keys of a sweep file are known and their values have the right type."""
    for key in fields:
        _check_known(key, KEYS, "key")
    for key, kind, content in (("fixed", dict, "parameters"), ("grid", dict, "parameters"), ("zip", list, "groups"),
                               ("list", list, "points"), ("exclude", list, "points")):  # fmt: skip
        value = fields.get(key)
        if value is not None and not isinstance(value, kind):
            raise ValueError(f"{key} must be a {'mapping' if kind is dict else 'list'} of {content}, not {value!r}")
        if kind is list and not all(isinstance(entry, dict) for entry in value or []):
            raise ValueError(f"{key}: every entry must map parameters to values, not {value!r}")
    if not any(fields.get(key) for key in ("grid", "zip", "list")):
        raise ValueError("no parameter varies; give grid, zip or list")
    memory = fields.get("memory", 3)
    if isinstance(memory, bool) or not isinstance(memory, int | float) or not 0 < memory <= 1e9:
        raise ValueError(f"memory must be the GiB that one point needs, above 0, not {memory!r}")
    if not isinstance(fields.get("title", ""), str):
        raise ValueError(f"title must be text, not {fields['title']!r}")


def iter_values(axes: dict, fixed: Mapping) -> Iterable[tuple[str, str, object]]:
    """Yield (key of the file, parameter, value), with one item per value of an axis."""
    yield from (("fixed", name, value) for name, value in axes["fixed"].items())
    yield from (("given", name, value) for name, value in fixed.items())
    for place, groups in (("grid", [axes["grid"]]), ("zip", axes["zip"])):
        for group in groups:
            for name, values in group.items():
                yield from ((place, name, v) for v in (values if isinstance(values, list) else [values]))
    for point in axes["list"]:
        yield from (("list", name, value) for name, value in point.items())


def check_excluded(axes: dict) -> None:
    """Check that exclusions name only parameters that vary; `expand` checks their values."""
    varied = dict.fromkeys(name for group in (axes["grid"], *axes["zip"], *axes["list"]) for name in group)
    for entry in axes["exclude"]:
        for name in entry:
            _check_known(name, varied, "name in exclude, which takes parameters that vary:")


def make_checker(notebook: Path | None) -> Callable[[str, object], None]:
    """Return a function that checks the name and value of a setting, or of a notebook's parameter."""
    if notebook is None:

        def check_setting(name: str, value) -> None:
            _check_known(name, SETTINGS, "setting")
            check_field(name, value)

        return check_setting
    if find_spec("papermill") is None:
        raise ValueError("a sweep over a notebook needs papermill: pip install 'peka-lite[notebook]'")
    parameters = read_parameters(notebook)
    uses_package = "peka_lite" in notebook.read_text("utf-8")  # then a parameter named like a setting is that setting

    def check_parameter(name: str, value) -> None:
        _check_known(name, parameters, f"parameter of {notebook.name}")
        parameters[name].check(name, value)
        if uses_package and name in SETTINGS:
            check_field(name, value)
        elif uses_package and isinstance(value, list) and str(name).removesuffix("s") in SETTINGS:  # such as methods
            for one in value:
                check_field(name.removesuffix("s"), one)

    return check_parameter


def check_json_value(name: str, value) -> None:
    """Check that a value survives a round trip through JSON, in which the run's record is stored."""
    try:
        same = json.loads(json.dumps(value, allow_nan=False)) == value
    except (TypeError, ValueError):
        same = False
    if not same:
        raise ValueError(f"{name} must be made of numbers, text, lists and mappings with text as keys, not {value!r}")


def _check_known(name: str, names: Iterable[str], kind: str) -> None:
    if name not in names:
        names = list(map(str, names))
        raise ValueError(f"unknown {kind} {name!r}{did_you_mean(str(name), names) or '; known: ' + ', '.join(names)}")
