"""Sweeps: a YAML file that names many runs, or many executions of a notebook, checked before any of them starts."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import yaml

from peka_lite.config import RunConfig, check_field
from peka_lite.grids import expand, unique_names
from peka_lite.registry import did_you_mean

READY = Path(__file__).with_name("sweeps")  # table1, table2, ablations, quick
_KEYS = ("title", "notebook", "memory", "fixed", "grid", "zip", "list", "exclude")
_FIELDS = tuple(field.name for field in dataclasses.fields(RunConfig))
_PATHS = ("cohort", "patients", "weights", "teacher_checkpoint", "teacher_genes", "teacher_mapping")
_NO_PATHS = ("mini", "hub", "random")
_TYPES = {"int": int, "float": (int, float), "str": str, "bool": bool, "list": list, "dict": dict}


@dataclass(frozen=True)
class Point:
    """One run of a sweep.

    Attributes
    ----------
    name
        Of its folder, from what varies: ``"method=bone,seed=0"``.
    varied
        What sets it apart, as the file says it.
    settings
        Every field of `RunConfig`, or the parameters that the notebook is given.
    """

    name: str
    varied: dict
    settings: dict


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """Many runs, or many executions of one notebook.

    Attributes
    ----------
    name, title, file
        The file's name without suffix; what it is for, in words; the file.
    notebook
        The notebook that is executed with each point's settings; None for `run`.
    memory
        GiB that one point needs; decides how many run at once on this machine.
    points
        In order; points with equal settings are one, under the first name.
    """

    name: str
    title: str
    file: Path
    notebook: Path | None
    memory: float
    points: tuple[Point, ...]

    @property
    def varied(self) -> tuple[str, ...]:
        """Names of what varies, in the file's order."""
        return tuple(dict.fromkeys(name for point in self.points for name in point.varied))

    @cached_property
    def code(self) -> str | None:
        """Hash of the notebook's code, 16 hex digits: text may change without a run becoming another one."""
        if self.notebook is None:
            return None
        cells = json.loads(self.notebook.read_text("utf-8"))["cells"]
        code = "\0".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")
        return hashlib.sha256(code.encode()).hexdigest()[:16]

    def told(self) -> dict:
        """Return title, notebook, what varies and each point's share of it, as the sweep's folder keeps them."""
        points = {point.name: point.varied for point in self.points}
        notebook = self.notebook and self.notebook.name
        return {"title": self.title, "notebook": notebook, "varied": list(self.varied), "points": points}


def ready_sweeps() -> dict[str, str]:
    """Return names and titles of the sweeps that come with the package.

    Examples
    --------
    >>> sorted(ready_sweeps())
    ['ablations', 'quick', 'table1', 'table2']
    """
    return {path.stem: _load(path.read_text("utf-8"), path)["title"] for path in sorted(READY.glob("*.yml"))}


def read_sweep(source: str | os.PathLike, *, fixed: Mapping | None = None) -> Sweep:
    """Read a sweep and check every name and value in it; nothing is started or written.

    Keys of the file, all but one of grid, zip and list optional: ``title``; ``notebook`` (a path; without it the points
    are runs); ``memory`` (GiB a point needs, 3 by default); ``fixed`` (parameters of every point); ``grid``, ``zip``,
    ``list`` and ``exclude``, as in `expand`. Paths in the file are relative to the file.

    Parameters
    ----------
    source
        A YAML file, or the name of a sweep in `ready_sweeps`.
    fixed
        Parameters of every point, over those of the file. One that the file's grid varies no longer varies; what a
        listed point sets stays.

    Raises
    ------
    FileNotFoundError
        For a file that is not there: the sweep, its notebook, or one that a point names.
    ValueError
        For a key, parameter or value that nothing knows; the message names file and place, and the nearest right name.
    """
    path = _find(source)
    asked = _load(path.read_text("utf-8"), path)
    try:
        _check_shape(asked)
        base = path.resolve().parent
        notebook = _notebook(base, asked.get("notebook"))
        axes = {k: asked.get(k) or ({} if k in ("grid", "fixed") else []) for k in _KEYS[3:]}
        for name in fixed or {}:
            if any(name in group for group in axes["zip"]) or all(name in row for row in axes["list"] or [{}]):
                raise ValueError(f"{name} is set together with others under zip or list: change it there")
            axes["grid"].pop(name, None)
        check = _checker(notebook)
        for place, name, value in _every_value(axes, fixed or {}):
            try:
                check(name, value)
            except ValueError as error:
                raise ValueError(f"{place}: {error}") from None
        points = expand(grid=axes["grid"], zipped=axes["zip"], listed=axes["list"], exclude=axes["exclude"])
        shared = _rooted(axes["fixed"], base) | _rooted(fixed or {}, Path.cwd())
        made = {}
        for name, point in zip(unique_names(points), points, strict=True):
            settings = shared | _rooted(point, base)
            if notebook is None:
                settings = _as_run(name, settings)
            made.setdefault(json.dumps(settings, sort_keys=True), Point(name, point, settings))
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{path}: {error}") from None
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    return Sweep(
        name=path.stem,
        title=asked.get("title", path.stem),
        file=path,
        notebook=notebook,
        memory=float(asked.get("memory", 3)),
        points=tuple(made.values()),
    )


def read_value(text: str):
    """Return a value as a sweep file would hold it: ``"1e-4"`` is a number, ``"[a, b]"`` a list, ``"null"`` None.

    Examples
    --------
    >>> read_value("1e-4"), read_value("[uni, 4]"), read_value("bone"), read_value("null")
    (0.0001, ['uni', 4], 'bone', None)
    """
    return yaml.load(text, _Loader)


class _Loader(yaml.SafeLoader):
    """YAML in which ``1e-4`` is a number, as in YAML 1.2; PyYAML alone would make it text."""


_Loader.yaml_implicit_resolvers = {k: list(v) for k, v in yaml.SafeLoader.yaml_implicit_resolvers.items()}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


def _find(source: str | os.PathLike) -> Path:
    path = Path(source)
    if path.is_file():
        return path
    if (ready := READY / f"{path}.yml").is_file():
        return ready
    raise FileNotFoundError(f"{path}: no such sweep; give a YAML file or one of {', '.join(ready_sweeps())}")


def _load(text: str, path: Path) -> dict:
    try:
        asked = yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        raise ValueError(f"{path}: no YAML: {' '.join(str(error).split())}") from None
    if not isinstance(asked, dict):
        raise ValueError(f"{path}: a sweep is a mapping of {', '.join(_KEYS)}")
    return asked


def _check_shape(asked: dict) -> None:
    for key in asked:
        _known(key, _KEYS, "key")
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
    if isinstance(memory, bool) or not isinstance(memory, int | float) or memory <= 0:
        raise ValueError(f"memory: GiB that one point needs, above 0, not {memory!r}")
    if not isinstance(asked.get("title", ""), str):
        raise ValueError(f"title: words, not {asked['title']!r}")


def _every_value(axes: dict, fixed: Mapping) -> Iterable[tuple[str, str, object]]:
    """Yield (place in the file, parameter, value); a list is yielded value by value where it is an axis."""
    yield from (("fixed", name, value) for name, value in axes["fixed"].items())
    yield from (("given", name, value) for name, value in fixed.items())
    for place, groups in (("grid", [axes["grid"]]), ("zip", axes["zip"])):
        for group in groups:
            for name, values in group.items():
                yield from ((place, name, v) for v in (values if isinstance(values, list) else [values]))
    for point in axes["list"]:
        yield from (("list", name, value) for name, value in point.items())
    for entry in axes["exclude"]:
        for name, values in entry.items():
            yield from (("exclude", name, v) for v in (values if isinstance(values, list) else [values]))


def _checker(notebook: Path | None) -> Callable[[str, object], None]:
    """Return a function that refuses a name or value that the target does not take."""
    if notebook is None:

        def of_run(name: str, value) -> None:
            _known(name, _FIELDS, "setting")
            check_field(name, value)

        return of_run
    try:
        from papermill import inspect_notebook
    except ImportError:
        raise ValueError("a sweep over a notebook needs papermill: pip install 'peka-lite[notebook]'") from None
    known = inspect_notebook(str(notebook))
    if not known:
        raise ValueError(f"{notebook.name} has no cell tagged 'parameters'")
    ours = "peka_lite" in notebook.read_text("utf-8")  # then a parameter named like a setting means that setting

    def of_notebook(name: str, value) -> None:
        _known(name, known, f"parameter of {notebook.name}")
        kind = _TYPES.get(known[name]["inferred_type_name"])
        nothing = value is None and known[name]["default"] == "None"
        if kind and not nothing and (not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool)):
            raise ValueError(f"{name} is {known[name]['inferred_type_name']}, not {value!r}")
        if ours and name in _FIELDS:
            check_field(name, value)
        elif ours and isinstance(value, list) and name.removesuffix("s") in _FIELDS:  # methods: each is a method
            for one in value:
                check_field(name.removesuffix("s"), one)

    return of_notebook


def _as_run(name: str, given: dict) -> dict:
    try:
        return RunConfig(**given).as_dict()
    except (ValueError, FileNotFoundError) as error:
        raise type(error)(f"point {name}: {error}") from None


def _known(name: str, names: Iterable[str], what: str) -> None:
    if name not in (names := list(names)):
        raise ValueError(f"unknown {what} {name!r}{did_you_mean(str(name), names) or '; known: ' + ', '.join(names)}")


def _notebook(base: Path, given) -> Path | None:
    if given is None:
        return None
    if not isinstance(given, str) or not (base / given).is_file():
        raise FileNotFoundError(f"notebook: no such file {given!r} beside the sweep")
    return (base / given).resolve()


def _rooted(parameters: Mapping, base: Path) -> dict:
    """Make paths absolute, so that a point means the same wherever it runs."""
    return {
        name: str((base / value).resolve())
        if name in _PATHS and isinstance(value, str) and value not in _NO_PATHS and (base / value).exists()
        else value
        for name, value in parameters.items()
    }
