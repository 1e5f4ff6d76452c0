"""Points of a sweep: every combination of a grid, zipped lists and listed points, less what is excluded."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from itertools import product
from pathlib import Path


def expand(
    *,
    grid: Mapping[str, Sequence] | None = None,
    zipped: Sequence[Mapping[str, Sequence]] = (),
    listed: Sequence[Mapping] = (),
    exclude: Sequence[Mapping] = (),
) -> list[dict]:
    """Combine every value of the grid with every step of each zipped group and every listed point.

    Parameters
    ----------
    grid
        Values by parameter.
    zipped
        Groups of equally long lists by parameter, walked through together.
    listed
        Points written out: parameters that are set together. An empty one changes nothing: the reference.
    exclude
        A point goes where all of an entry's parameters match; a list matches any of its values.

    Returns
    -------
    list of dict
        What each point sets, in order: the grid's last parameter changes fastest, then groups, then listed points.

    Raises
    ------
    ValueError
        For an axis without values, lists of unequal length, a parameter that two axes set, an exclusion that matches
        nothing, and where no point is left.

    Examples
    --------
    >>> from peka_lite.grids import expand
    >>> expand(grid={"seed": [0, 1], "method": ["none", "bone"]}, exclude=[{"method": "none", "seed": 1}])
    [{'seed': 0, 'method': 'none'}, {'seed': 0, 'method': 'bone'}, {'seed': 1, 'method': 'bone'}]
    >>> expand(zipped=[{"backbone": ["uni", "h-optimus-0"], "r": [256, 192]}])
    [{'backbone': 'uni', 'r': 256}, {'backbone': 'h-optimus-0', 'r': 192}]
    """
    axes = [[{name: value} for value in _values(name, values)] for name, values in (grid or {}).items()]
    for group in zipped:
        lengths = {name: len(_values(name, values)) for name, values in group.items()}
        if len(set(lengths.values())) != 1:
            told = ", ".join(f"{name} has {n}" for name, n in lengths.items()) or "it is empty"
            raise ValueError(f"zip: lists of one group are equally long, but {told}")
        axes.append([dict(zip(group, step, strict=True)) for step in zip(*group.values(), strict=True)])
    axes += [[dict(point) for point in listed]] if listed else []
    seen = set()
    for axis in axes:
        names = {name for step in axis for name in step}
        if both := sorted(seen & names):
            raise ValueError(f"{', '.join(both)}: set by two of grid, zip and list; a parameter belongs to one of them")
        seen |= names
    points = [{k: v for step in steps for k, v in step.items()} for steps in product(*axes)]
    for entry in exclude:
        kept = [point for point in points if not matches(point, entry)]
        if len(kept) == len(points):
            raise ValueError(f"exclude: {dict(entry)} matches no point; check its names and values")
        points = kept
    if not points:
        raise ValueError("exclude: no point is left")
    return points


def matches(point: Mapping, entry: Mapping, names: Iterable[str] | None = None) -> bool:
    """Tell whether a point sets all that an exclusion's entry names, or of `names` alone, to one of its values.

    Examples
    --------
    >>> from peka_lite.grids import matches
    >>> matches({"seed": 1, "tau": 2.0}, {"seed": [1, 2]}), matches({"seed": 1}, {"seed": 1, "tau": 2.0})
    (True, False)
    """

    def is_one_of(value, wanted) -> bool:
        return value == wanted or (isinstance(wanted, list) and any(value == w for w in wanted))

    return all(name in point and is_one_of(point[name], entry[name]) for name in (entry if names is None else names))


def point_name(parameters: Mapping) -> str:
    """Return a folder name that says what a point sets; ``"base"`` where it sets nothing.

    A file counts by its name alone, and a name of more than 120 bytes is cut and given a hash: two points may share a
    name, which `unique_names` mends.

    Examples
    --------
    >>> from peka_lite.grids import point_name
    >>> point_name({"method": "bone", "lr": 0.0001, "slides": ["A1", "B1"], "r": None})
    'method=bone,lr=0.0001,slides=A1+B1,r=null'
    """
    name = ",".join(f"{key}={_word(value)}" for key, value in parameters.items()) or "base"
    name = re.sub(r"\.partial$", "-partial", name)  # which is how unfinished folders are named
    if len(name.encode()) > 120:
        name = f"{name.encode()[:111].decode(errors='ignore')}-{_hash(parameters)}"
    return name


def unique_names(points: Iterable[Mapping]) -> list[str]:
    """Name points; those whose names would agree, upper and lower case aside, get a hash of their values."""
    points = list(points)
    names = [point_name(point) for point in points]
    folded = [name.casefold() for name in names]
    return [
        f"{name}-{_hash(point)}" if folded.count(fold) > 1 else name
        for name, fold, point in zip(names, folded, points, strict=True)
    ] if len(set(folded)) < len(folded) else names  # fmt: skip


def _values(name: str, values) -> Sequence:
    if isinstance(values, str) or not isinstance(values, Sequence) or not values:
        raise ValueError(f"{name}: give a list of at least one value, not {values!r}")
    return values


def _word(value) -> str:
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    if isinstance(value, list | tuple):
        return "+".join(map(_word, value))
    text = Path(value).name if isinstance(value, str) and "/" in value else str(value)
    return re.sub(r"[^\w.+-]+", "-", text).strip("-") or "empty"


def _hash(parameters: Mapping) -> str:
    return hashlib.sha256(json.dumps(parameters, sort_keys=True, default=str).encode()).hexdigest()[:8]
