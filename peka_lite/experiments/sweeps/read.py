"""Read and check a sweep: a YAML file of many runs, or of many executions of a notebook."""

from __future__ import annotations

import functools
import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from peka_lite._core._yaml import parse_yaml, read_yaml
from peka_lite._core.names import did_you_mean, short_name
from peka_lite.backbones.custom import is_backbone_file
from peka_lite.experiments.config import RunConfig
from peka_lite.experiments.settings import FEATURES, SETTINGS
from peka_lite.experiments.sweeps._checks import (
    KEYS,
    check_excluded,
    check_json_value,
    check_shape,
    iter_values,
    make_checker,
)
from peka_lite.experiments.sweeps._grids import count_points, expand, matches, unique_names

PRESETS = Path(__file__).with_name("presets")  # table1, table2, ablations, quick
_PATHS = tuple(name for name, row in SETTINGS.items() if row.path)
_NO_PATHS = ("mini", "hub", "random", *FEATURES)
LONGEST = 2000  # characters of a title or an error message


@dataclass(frozen=True)
class Point:
    """Describe one run of a sweep.

    Attributes
    ----------
    name
        Name of its folder, made of the parameters that vary: ``"method=bone,seed=0"``.
    varied
        The parameters that vary, with the file's values.
    settings
        All fields of `RunConfig`, or the notebook's parameters.

    Examples
    --------
    >>> import peka_lite as pk
    >>> point = pk.experiments.read_sweep("quick").points[3]
    >>> point.name, point.varied
    ('method=none', {'method': 'none'})
    >>> point.settings["protocol"], point.settings["epochs"], pk.RunConfig(**point.settings).split
    ('strict', 2, 'patient')
    """

    name: str
    varied: dict
    settings: dict


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """Describe many runs, or many executions of one notebook.

    Attributes
    ----------
    name, title, file
        The file's name without suffix, its title, and its path.
    notebook
        The notebook executed with each point's settings. None for `run`.
    memory
        GiB that one point needs, which limits the number of points at once on this machine.
    points
        In the file's order. Points with equal settings are merged under the first name.

    Examples
    --------
    >>> import peka_lite as pk
    >>> sweep = pk.experiments.read_sweep("quick")
    >>> sweep.title
    'Four methods and two controls on the embedded cohort'
    >>> sweep.varied, len(sweep.points), sweep.memory, sweep.notebook
    (('method', 'features'), 6, 2.0, None)
    """

    name: str
    title: str
    file: Path
    notebook: Path | None
    memory: float
    points: tuple[Point, ...]

    @property
    def varied(self) -> tuple[str, ...]:
        """Return the names of the parameters that vary, in the file's order."""
        return tuple(dict.fromkeys(name for point in self.points for name in point.varied))

    @cached_property
    def code(self) -> str | None:
        """Return the hash of the notebook's code, 16 hex digits; text cells do not change it."""
        return None if self.notebook is None else hash_code(self.content)

    @cached_property
    def content(self) -> bytes:
        """Return the notebook's bytes, read once so that later edits have no effect."""
        return self.notebook.read_bytes()

    @property
    def digest(self) -> str | None:
        """Return the SHA-256 of the notebook's file."""
        return None if self.notebook is None else hashlib.sha256(self.content).hexdigest()

    def as_record(self) -> dict:
        """Return title, notebook and varied parameters, as stored in the sweep's folder."""
        points = {point.name: point.varied for point in self.points}
        notebook = self.notebook and self.notebook.name
        return {"title": self.title, "notebook": notebook, "varied": list(self.varied), "points": points}


def hash_code(notebook: bytes) -> str:
    """Return the hash of a notebook's code cells, 16 hex digits."""
    cells = json.loads(notebook)["cells"]
    code = "\0".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")
    return hashlib.sha256(code.encode()).hexdigest()[:16]


def ready_sweeps() -> dict[str, str]:
    """Return the names and titles of the sweeps in the package.

    Examples
    --------
    >>> import peka_lite as pk
    >>> pk.experiments.ready_sweeps()["quick"]
    'Four methods and two controls on the embedded cohort'
    >>> sorted(pk.experiments.ready_sweeps())
    ['ablations', 'quick', 'table1', 'table2']
    """
    return {path.stem: _load_mapping(path)["title"] for path in sorted(PRESETS.glob("*.yml"))}


def read_sweep(source: str | os.PathLike, *, fixed: Mapping | None = None) -> Sweep:
    """Read a sweep and check all its names and values, without running it.

    Keys of the file: ``title``; ``notebook`` (a path; without it the points are runs); ``memory`` (GiB per point, 3 by
    default); ``fixed`` (parameters of all points); ``grid``, ``zip``, ``list`` and ``exclude``, as in `expand`, which
    override ``fixed``. At least one of grid, zip and list is required. Paths are relative to the file.

    Parameters
    ----------
    source
        A YAML file, or the name of a sweep in `ready_sweeps`.
    fixed
        Parameters of all points, which override the file's ``fixed`` and ``grid``, but not the values of listed points.

    Raises
    ------
    FileNotFoundError
        If the sweep, its notebook or a file named by a point is missing.
    ValueError
        For an unknown key or parameter and an invalid value. As `count_points`, for more than 100,000 points before
        exclusions.

    Examples
    --------
    >>> from pathlib import Path
    >>> import peka_lite as pk
    >>> text = "{fixed: {features: depth, method: none}, grid: {seed: [0, 1], n_genes: [10, 50]}}"
    >>> _ = Path("seeds.yml").write_text(text)
    >>> [point.name for point in pk.experiments.read_sweep("seeds.yml").points]
    ['seed=0,n_genes=10', 'seed=0,n_genes=50', 'seed=1,n_genes=10', 'seed=1,n_genes=50']
    >>> [point.name for point in pk.experiments.read_sweep("seeds.yml", fixed={"n_genes": 20}).points]
    ['seed=0', 'seed=1']
    >>> pk.experiments.read_sweep("seeds.yml", fixed={"epoch": 4})
    Traceback (most recent call last):
    ValueError: seeds.yml: given: unknown setting 'epoch'; did you mean 'epochs'?
    """
    path = _find_file(source)
    fields = _load_mapping(path)
    try:
        check_shape(fields)
        base = path.resolve().parent
        notebook = _find_notebook(base, fields.get("notebook"))
        axes = {k: fields.get(k) or ({} if k in ("grid", "fixed") else []) for k in KEYS[3:]}
        _apply_fixed(axes, fixed or {})
        combined = {"grid": axes["grid"], "zipped": axes["zip"], "listed": axes["list"], "exclude": axes["exclude"]}
        count_points(**combined, fixed=axes["fixed"] | dict(fixed or {}))
        check_excluded(axes)
        check = make_checker(notebook)
        for place, name, value in iter_values(axes, fixed or {}):
            try:
                check_json_value(name, value)
                check(name, value)
            except ValueError as error:
                raise ValueError(f"{place}: {error}") from None
        points = expand(**combined)
        points = list({json.dumps(point): point for point in points}.values())
        resolve_paths = functools.partial(_resolve_paths, names=_PATHS if notebook is None else None)
        shared = resolve_paths(axes["fixed"], base) | resolve_paths(fixed or {}, Path.cwd())
        distinct = {}
        for name, point in zip(unique_names(points), points, strict=True):
            settings = shared | resolve_paths(point, base)
            if notebook is None:
                settings = _complete_settings(name, settings)
            key = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).digest()
            distinct.setdefault(key, Point(name, point, settings))
    except (ValueError, OSError) as error:
        kind = FileNotFoundError if isinstance(error, FileNotFoundError) else ValueError
        raise kind(f"{path}: {short_name(str(error), longest=LONGEST)}") from None
    return Sweep(
        name=path.stem,
        title=short_name(" ".join(fields.get("title", path.stem).split()), longest=LONGEST),
        file=path,
        notebook=notebook,
        memory=float(fields.get("memory", 3)),
        points=tuple(distinct.values()),
    )


def read_value(text: str):
    """Parse a value as in a sweep file: ``"1e-4"`` is a number, ``"[a, b]"`` a list, ``"null"`` None."""
    try:
        return parse_yaml(text)
    except ValueError:
        raise ValueError(f"{text!r} is not valid YAML; put text in quotes") from None


def _find_file(source: str | os.PathLike) -> Path:
    path = Path(source)
    if path.is_file():
        return path
    if (preset := PRESETS / f"{path}.yml").is_file():
        return preset
    presets = ready_sweeps()
    near = did_you_mean(path.stem, presets)
    raise FileNotFoundError(f"{path}: no such sweep; give a YAML file or one of {', '.join(presets)}{near}")


def _load_mapping(path: Path) -> dict:
    fields = read_yaml(path)
    if not isinstance(fields, dict):
        raise ValueError(f"{path}: a sweep must be a mapping with keys of {', '.join(KEYS)}")
    return fields


def _apply_fixed(axes: dict, fixed: Mapping) -> None:
    """Remove parameters given as fixed from the grid and the exclusions."""
    for name, value in fixed.items():
        if any(name in group for group in axes["zip"]) or all(name in row for row in axes["list"] or [{}]):
            raise ValueError(f"{name} is set together with others under zip or list; change it there")
        if name in axes["grid"]:
            del axes["grid"][name]
            left = [entry for entry in axes["exclude"] if name not in entry or matches({name: value}, entry, (name,))]
            axes["exclude"] = [{k: v for k, v in entry.items() if k != name} for entry in left]


def _complete_settings(name: str, given: dict) -> dict:
    try:
        config = RunConfig(**given)
        config.check()
    except (ValueError, OSError) as error:
        raise type(error)(f"point {name}: {error}") from None
    return config.as_dict()


def _find_notebook(base: Path, given) -> Path | None:
    if given is None:
        return None
    if not isinstance(given, str) or not os.path.isfile(base / given):
        raise FileNotFoundError(f"notebook: no such file {given!r} in the sweep's folder")
    return (base / given).resolve()


def _resolve_paths(parameters: Mapping, base: Path, *, names: tuple[str, ...] | None) -> dict:
    """Make paths of existing files absolute, so that a point can run in any folder."""
    resolved = dict(parameters)
    for name, value in parameters.items():
        if not isinstance(value, str) or not value or value in _NO_PATHS or (names and name not in names):
            continue
        if name == "backbone" and not is_backbone_file(value):  # a name, even if there is such a file
            continue
        if os.path.exists(base / value):
            resolved[name] = str((base / value).resolve())
        elif names and os.path.exists(value) and not Path(value).is_absolute():
            raise FileNotFoundError(f"{name}: no file {value!r} in the sweep's folder, to which its paths are relative")
    return resolved
