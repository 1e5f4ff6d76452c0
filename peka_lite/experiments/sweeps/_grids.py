"""Combine a grid, zipped lists and listed points into the points of a sweep, and name them."""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from itertools import product
from pathlib import Path

from peka_lite._core.names import short_name

MAX_POINTS = 100_000
MAX_CHARACTERS = 2**28  # of all points' values, and of the exclusions compared with each point


def count_points(
    *,
    grid: Mapping[str, Sequence] | None = None,
    zipped: Sequence[Mapping[str, Sequence]] = (),
    listed: Sequence[Mapping] = (),
    exclude: Sequence[Mapping] = (),
    fixed: Mapping | None = None,
) -> int:
    """Count the points that `expand` combines before exclusions, without creating them.

    Parameters
    ----------
    grid, zipped, listed, exclude
        As in `expand`.
    fixed
        Parameters that every point sets too.

    Raises
    ------
    ValueError
        For an axis without values, zipped lists of unequal length, more than 100,000 points, and too large values.
    """
    axes = [(len(_check_values(name, values)), _count_characters(values)) for name, values in (grid or {}).items()]
    for group in zipped:
        lengths = {name: len(_check_values(name, values)) for name, values in group.items()}
        if len(set(lengths.values())) != 1:
            counts = ", ".join(f"{short_name(str(name))} has {n}" for name, n in lengths.items()) or "it is empty"
            raise ValueError(f"zip: the lists of a group must have equal length, but {counts}")
        axes.append((len(next(iter(group.values()))), _count_characters(group)))
    axes += [(len(listed), _count_characters(listed))] if listed else []
    n = 1
    for length, _ in axes:
        n *= length
        if n > 10**18:
            break
    if n > MAX_POINTS:
        count = f"{n:,}" if n <= 10**18 else "more than 10^18"
        raise ValueError(
            f"{count} points before exclusions are more than a sweep may have ({MAX_POINTS:,}); split the sweep"
        )
    size = n * (_count_characters(fixed or {}) + _count_characters(exclude))
    size += sum(n // length * characters for length, characters in axes)
    if size > MAX_CHARACTERS:
        raise ValueError(
            f"the values and exclusions of {n:,} points have {size:,} characters, more than a sweep may have "
            f"({MAX_CHARACTERS:,}); give fewer points or shorter values"
        )
    return n


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
        Groups of equally long lists by parameter, iterated in parallel.
    listed
        Points with all their parameters. An empty one is the reference, which changes nothing.
    exclude
        A point is removed if all parameters of an entry match; a list matches any of its values.

    Returns
    -------
    list of dict
        Parameters of each point. Listed points change fastest, then zipped groups, then the grid's last parameter.

    Raises
    ------
    ValueError
        As `count_points`, for a parameter set by two axes, an exclusion that matches no point, and if no point is left.

    Examples
    --------
    >>> from peka_lite.experiments.sweeps._grids import expand
    >>> expand(grid={"seed": [0, 1], "method": ["none", "bone"]}, exclude=[{"method": "none", "seed": 1}])
    [{'seed': 0, 'method': 'none'}, {'seed': 0, 'method': 'bone'}, {'seed': 1, 'method': 'bone'}]
    >>> expand(zipped=[{"backbone": ["uni", "h-optimus-0"], "r": [256, 192]}])
    [{'backbone': 'uni', 'r': 256}, {'backbone': 'h-optimus-0', 'r': 192}]
    """
    count_points(grid=grid, zipped=zipped, listed=listed, exclude=exclude)
    axes = [[{name: value} for value in values] for name, values in (grid or {}).items()]
    for group in zipped:
        axes.append([dict(zip(group, step, strict=True)) for step in zip(*group.values(), strict=True)])
    axes += [[dict(point) for point in listed]] if listed else []
    seen = set()
    for axis in axes:
        names = {name for step in axis for name in step}
        if both := sorted(seen & names):
            raise ValueError(f"{', '.join(both)}: set by two of grid, zip and list; set each parameter in one of them")
        seen |= names
    points = [{k: v for step in steps for k, v in step.items()} for steps in product(*axes)]
    for entry in exclude:
        left = [point for point in points if not matches(point, entry)]
        if len(left) == len(points):
            raise ValueError(f"exclude: {dict(entry)} matches no point; check its names and values")
        points = left
    if not points:
        raise ValueError("exclude: no point is left")
    return points


def matches(point: Mapping, entry: Mapping, names: Iterable[str] | None = None) -> bool:
    """Return whether a point matches an exclusion in all its parameters, or in those of `names`."""

    def is_one_of(value, excluded) -> bool:
        return value == excluded or (isinstance(excluded, list) and any(value == e for e in excluded))

    return all(name in point and is_one_of(point[name], entry[name]) for name in (entry if names is None else names))


def point_name(parameters: Mapping) -> str:
    """Return a folder name made of a point's parameters; ``"base"`` if there are none.

    Paths are shortened to the file's name, and names above 120 bytes are cut and given a hash. Two points may get the
    same name; `unique_names` makes names unique.
    """
    name = ",".join(f"{key}={_format_value(value)}" for key, value in parameters.items()) or "base"
    name = re.sub(r"(?i)\.partial$", "-partial", name)  # reserved for unfinished folders
    if len(name.encode()) > 120:
        name = f"{name.encode()[:111].decode(errors='ignore')}-{_hash_point(parameters)[:8]}"
    return name


def unique_names(points: Iterable[Mapping]) -> list[str]:
    """Name points, and add a hash of the values to names that differ only in case or not at all.

    Examples
    --------
    >>> import peka_lite as pk
    >>> pk.experiments.unique_names([{"method": "bone"}, {"method": "lora"}])
    ['method=bone', 'method=lora']
    """
    points = list(points)
    names = [point_name(point) for point in points]
    for digits in (8, 64):  # 8 digits can collide among 100,000 points
        times = Counter(name.casefold() for name in names)
        names = [
            f"{name}-{_hash_point(point)[:digits]}" if times[name.casefold()] > 1 else name
            for name, point in zip(names, points, strict=True)
        ]
    return names


def _check_values(name: str, values) -> Sequence:
    if isinstance(values, str) or not isinstance(values, Sequence) or not values:
        raise ValueError(f"{short_name(str(name))}: give a list of at least one value, not {short_name(repr(values))}")
    return values


def _count_characters(values) -> int:
    try:
        return len(repr(values))
    except ValueError:  # Python's limit for converting whole numbers to text
        raise ValueError("a whole number has more than 4,300 digits; give a shorter one") from None


def _format_value(value) -> str:
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    if isinstance(value, list | tuple):
        return "+".join(map(_format_value, value))
    text = Path(value).name if isinstance(value, str) and "/" in value else str(value)
    return re.sub(r"[^\w.+-]+", "-", text).strip("-") or "empty"


def _hash_point(parameters: Mapping) -> str:
    return hashlib.sha256(json.dumps(parameters, sort_keys=True, default=str).encode()).hexdigest()
