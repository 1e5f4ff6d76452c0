"""What a sweep's file may say: keys, names and values, checked against what is to run."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterable, Mapping
from importlib.util import find_spec
from pathlib import Path

from peka_lite._core.names import did_you_mean
from peka_lite.experiments.config import RunConfig, check_field
from peka_lite.experiments.sweeps._notebook import read_parameters

KEYS = ("title", "notebook", "memory", "fixed", "grid", "zip", "list", "exclude")
_FIELDS = tuple(field.name for field in dataclasses.fields(RunConfig))


def check_shape(asked: dict) -> None:
    """Refuse unknown keys, and values of another kind than the key's."""
    for key in asked:
        _known(key, KEYS, "key")
    for key, kind, words in (("fixed", dict, "parameters"), ("grid", dict, "parameters"), ("zip", list, "groups"),
                             ("list", list, "points"), ("exclude", list, "points")):  # fmt: skip
        value = asked.get(key)
        if value is not None and not isinstance(value, kind):
            raise ValueError(f"{key}: a {'mapping' if kind is dict else 'list'} of {words}, not {value!r}")
        if kind is list and not all(isinstance(entry, dict) for entry in value or []):
            raise ValueError(f"{key}: every entry maps parameters to values; {value!r} has others")
    if not any(asked.get(key) for key in ("grid", "zip", "list")):
        raise ValueError("nothing varies: give grid, zip or list")
    memory = asked.get("memory", 3)
    if isinstance(memory, bool) or not isinstance(memory, int | float) or not 0 < memory <= 1e9:
        raise ValueError(f"memory: GiB that one point needs, above 0, not {memory!r}")
    if not isinstance(asked.get("title", ""), str):
        raise ValueError(f"title: words, not {asked['title']!r}")


def iter_values(axes: dict, fixed: Mapping) -> Iterable[tuple[str, str, object]]:
    """Yield (place in the file, parameter, value); a list is yielded value by value where it is an axis."""
    yield from (("fixed", name, value) for name, value in axes["fixed"].items())
    yield from (("given", name, value) for name, value in fixed.items())
    for place, groups in (("grid", [axes["grid"]]), ("zip", axes["zip"])):
        for group in groups:
            for name, values in group.items():
                yield from ((place, name, v) for v in (values if isinstance(values, list) else [values]))
    for point in axes["list"]:
        yield from (("list", name, value) for name, value in point.items())


def check_excluded(axes: dict) -> None:
    """Refuse exclusions by what does not vary; that their values match a point is for `expand` to see."""
    varied = dict.fromkeys(name for group in (axes["grid"], *axes["zip"], *axes["list"]) for name in group)
    for entry in axes["exclude"]:
        for name in entry:
            _known(name, varied, "name in exclude, which takes what varies:")


def make_checker(notebook: Path | None) -> Callable[[str, object], None]:
    """Return a function that refuses a name or value that the target does not take."""
    if notebook is None:

        def of_run(name: str, value) -> None:
            _known(name, _FIELDS, "setting")
            check_field(name, value)

        return of_run
    if find_spec("papermill") is None:
        raise ValueError("a sweep over a notebook needs papermill: pip install 'peka-lite[notebook]'")
    known = read_parameters(notebook)
    ours = "peka_lite" in notebook.read_text("utf-8")  # then a parameter named like a setting means that setting

    def of_notebook(name: str, value) -> None:
        _known(name, known, f"parameter of {notebook.name}")
        known[name].check(name, value)
        if ours and name in _FIELDS:
            check_field(name, value)
        elif ours and isinstance(value, list) and str(name).removesuffix("s") in _FIELDS:  # methods: each is a method
            for one in value:
                check_field(name.removesuffix("s"), one)

    return of_notebook


def check_json_value(name: str, value) -> None:
    """Refuse a value that JSON would not give back as it is: a run's record could not hold it."""
    try:
        same = json.loads(json.dumps(value, allow_nan=False)) == value
    except (TypeError, ValueError):
        same = False
    if not same:
        raise ValueError(f"{name}: numbers, text, lists and mappings with text as keys, not {value!r}")


def _known(name: str, names: Iterable[str], what: str) -> None:
    if name not in names:
        names = list(map(str, names))
        raise ValueError(f"unknown {what} {name!r}{did_you_mean(str(name), names) or '; known: ' + ', '.join(names)}")
