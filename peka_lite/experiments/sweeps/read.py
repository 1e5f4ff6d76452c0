"""Sweeps: a YAML file that names many runs, or many executions of a notebook, checked before any of them starts."""

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
from peka_lite.experiments.sweeps._checks import (
    KEYS,
    check_excluded,
    check_json_value,
    check_shape,
    iter_values,
    make_checker,
)
from peka_lite.experiments.sweeps._grids import count_points, expand, matches, unique_names

READY = Path(__file__).with_name("presets")  # table1, table2, ablations, quick
_PATHS = ("backbone", "cohort", "patients", "weights", "teacher_checkpoint", "teacher_genes", "teacher_mapping")
_NO_PATHS = ("mini", "hub", "random")
LONGEST = 2000  # letters of a title, or of what is shown of a wrong value


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
        """Names of what varies, in the file's order."""
        return tuple(dict.fromkeys(name for point in self.points for name in point.varied))

    @cached_property
    def code(self) -> str | None:
        """Hash of the notebook's code, 16 hex digits: text may change without a run becoming another one."""
        return None if self.notebook is None else code_of(self.content)

    @cached_property
    def content(self) -> bytes:
        """The notebook's file, read once: one that is edited meanwhile stays one version."""
        return self.notebook.read_bytes()

    @property
    def digest(self) -> str | None:
        """SHA-256 of the notebook's file."""
        return None if self.notebook is None else hashlib.sha256(self.content).hexdigest()

    def told(self) -> dict:
        """Return title, notebook, what varies and each point's share of it, as the sweep's folder keeps them."""
        points = {point.name: point.varied for point in self.points}
        notebook = self.notebook and self.notebook.name
        return {"title": self.title, "notebook": notebook, "varied": list(self.varied), "points": points}


def code_of(notebook: bytes) -> str:
    """Return the hash of a notebook's code cells, 16 hex digits."""
    cells = json.loads(notebook)["cells"]
    code = "\0".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")
    return hashlib.sha256(code.encode()).hexdigest()[:16]


def ready_sweeps() -> dict[str, str]:
    """Return names and titles of the sweeps that come with the package.

    Examples
    --------
    >>> import peka_lite as pk
    >>> pk.experiments.ready_sweeps()["quick"]
    'Four methods and two controls on the embedded cohort'
    >>> sorted(pk.experiments.ready_sweeps())
    ['ablations', 'quick', 'table1', 'table2']
    """
    return {path.stem: _load(path)["title"] for path in sorted(READY.glob("*.yml"))}


def read_sweep(source: str | os.PathLike, *, fixed: Mapping | None = None) -> Sweep:
    """Read a sweep and check every name and value in it; nothing is started or written.

    Keys of the file, all but one of grid, zip and list optional: ``title``; ``notebook`` (a path; without it the points
    are runs); ``memory`` (GiB a point needs, 3 by default); ``fixed`` (parameters of every point); ``grid``, ``zip``,
    ``list`` and ``exclude``, as in `expand`; what varies goes over ``fixed``. Paths of files in it are relative to it.

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
        For more than 100,000 points, before any is excluded, as `count_points`.

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
    path = _find(source)
    asked = _load(path)
    try:
        check_shape(asked)
        base = path.resolve().parent
        notebook = _notebook(base, asked.get("notebook"))
        axes = {k: asked.get(k) or ({} if k in ("grid", "fixed") else []) for k in KEYS[3:]}
        _fix(axes, fixed or {})
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
        rooted = functools.partial(_rooted, names=_PATHS if notebook is None else None)
        shared = rooted(axes["fixed"], base) | rooted(fixed or {}, Path.cwd())
        made = {}
        for name, point in zip(unique_names(points), points, strict=True):
            settings = shared | rooted(point, base)
            if notebook is None:
                settings = _as_run(name, settings)
            same = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).digest()
            made.setdefault(same, Point(name, point, settings))
    except (ValueError, OSError) as error:
        kind = FileNotFoundError if isinstance(error, FileNotFoundError) else ValueError
        raise kind(f"{path}: {short_name(str(error), longest=LONGEST)}") from None
    return Sweep(
        name=path.stem,
        title=short_name(" ".join(asked.get("title", path.stem).split()), longest=LONGEST),
        file=path,
        notebook=notebook,
        memory=float(asked.get("memory", 3)),
        points=tuple(made.values()),
    )


def read_value(text: str):
    """Return a value as a sweep file would hold it: ``"1e-4"`` is a number, ``"[a, b]"`` a list, ``"null"`` None.

    Examples
    --------
    >>> from peka_lite.experiments.sweeps.read import read_value
    >>> read_value("1e-4"), read_value("[uni, 4]"), read_value("bone"), read_value("null")
    (0.0001, ['uni', 4], 'bone', None)
    """
    try:
        return parse_yaml(text)
    except ValueError:
        raise ValueError(f"{text!r} is no value in YAML; put quotes around text") from None


def _find(source: str | os.PathLike) -> Path:
    path = Path(source)
    if path.is_file():
        return path
    if (ready := READY / f"{path}.yml").is_file():
        return ready
    ready = ready_sweeps()
    near = did_you_mean(path.stem, ready)
    raise FileNotFoundError(f"{path}: no such sweep; give a YAML file or one of {', '.join(ready)}{near}")


def _load(path: Path) -> dict:
    asked = read_yaml(path)
    if not isinstance(asked, dict):
        raise ValueError(f"{path}: a sweep is a mapping of {', '.join(KEYS)}")
    return asked


def _fix(axes: dict, fixed: Mapping) -> None:
    """Take given parameters out of what varies."""
    for name, value in fixed.items():
        if any(name in group for group in axes["zip"]) or all(name in row for row in axes["list"] or [{}]):
            raise ValueError(f"{name} is set together with others under zip or list: change it there")
        if name in axes["grid"]:
            del axes["grid"][name]
            left = [entry for entry in axes["exclude"] if name not in entry or matches({name: value}, entry, (name,))]
            axes["exclude"] = [{k: v for k, v in entry.items() if k != name} for entry in left]


def _as_run(name: str, given: dict) -> dict:
    try:
        settings = RunConfig(**given).as_dict()
    except (ValueError, OSError) as error:
        raise type(error)(f"point {name}: {error}") from None
    # Another process makes the point: it knows a backbone of one's own by its file alone.
    return settings | ({"backbone": given["backbone"]} if is_backbone_file(given.get("backbone", "")) else {})


def _notebook(base: Path, given) -> Path | None:
    if given is None:
        return None
    if not isinstance(given, str) or not os.path.isfile(base / given):
        raise FileNotFoundError(f"notebook: no such file {given!r} beside the sweep")
    return (base / given).resolve()


def _rooted(parameters: Mapping, base: Path, *, names: tuple[str, ...] | None) -> dict:
    """Make paths of files that are there absolute, so that a point means the same wherever it runs."""
    found = dict(parameters)
    for name, value in parameters.items():
        if not isinstance(value, str) or not value or value in _NO_PATHS or (names and name not in names):
            continue
        if name == "backbone" and not is_backbone_file(value):  # a name, whatever lies beside the sweep
            continue
        if os.path.exists(base / value):
            found[name] = str((base / value).resolve())
        elif names and os.path.exists(value) and not Path(value).is_absolute():
            raise FileNotFoundError(f"{name}: {value!r} is not beside the sweep, whose paths start there")
    return found
