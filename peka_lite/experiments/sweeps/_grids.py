"""Points of a sweep: every combination of a grid, zipped lists and listed points, less what is excluded."""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from itertools import product
from pathlib import Path

from peka_lite._core.names import short_name

MOST = 100_000  # points
LARGEST = 2**28  # letters of all that points set, and of what is compared with each of them


def count_points(
    *,
    grid: Mapping[str, Sequence] | None = None,
    zipped: Sequence[Mapping[str, Sequence]] = (),
    listed: Sequence[Mapping] = (),
    exclude: Sequence[Mapping] = (),
    fixed: Mapping | None = None,
) -> int:
    """Return how many points `expand` combines before any is excluded; none of them is made.

    Parameters
    ----------
    grid, zipped, listed, exclude
        As in `expand`.
    fixed
        What every point holds besides.

    Raises
    ------
    ValueError
        For an axis without values, lists of unequal length, more than 100,000 points, and points that are too large
        together.

    Examples
    --------
    >>> from peka_lite.experiments.sweeps._grids import count_points
    >>> count_points(grid={"seed": [0, 1, 2], "tau": [1, 2]}, listed=[{}, {"method": "none"}])
    12
    >>> count_points(grid={name: range(1000) for name in ("seed", "n_genes", "epochs")})
    Traceback (most recent call last):
    ValueError: 1,000,000,000 points, before any is excluded, are more than a sweep may have (100,000); split it
    """
    axes = [(len(_values(name, values)), _size(values)) for name, values in (grid or {}).items()]
    for group in zipped:
        lengths = {name: len(_values(name, values)) for name, values in group.items()}
        if len(set(lengths.values())) != 1:
            told = ", ".join(f"{short_name(str(name))} has {n}" for name, n in lengths.items()) or "it is empty"
            raise ValueError(f"zip: lists of one group are equally long, but {told}")
        axes.append((len(next(iter(group.values()))), _size(group)))
    axes += [(len(listed), _size(listed))] if listed else []
    n = 1
    for length, _ in axes:
        n *= length
        if n > 10**18:
            break
    if n > MOST:
        told = f"{n:,}" if n <= 10**18 else "more than 10^18"
        raise ValueError(f"{told} points, before any is excluded, are more than a sweep may have ({MOST:,}); split it")
    size = n * (_size(fixed or {}) + _size(exclude)) + sum(n // length * letters for length, letters in axes)
    if size > LARGEST:
        raise ValueError(
            f"{n:,} points set or are compared with {size:,} letters in all, more than a sweep may have ({LARGEST:,}); "
            "give fewer points or shorter values"
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
        As `count_points`; for a parameter that two axes set, an exclusion that matches nothing, and where no point is
        left.

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
    >>> from peka_lite.experiments.sweeps._grids import matches
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
    >>> from peka_lite.experiments.sweeps._grids import point_name
    >>> point_name({"method": "bone", "lr": 0.0001, "slides": ["A1", "B1"], "r": None})
    'method=bone,lr=0.0001,slides=A1+B1,r=null'
    """
    name = ",".join(f"{key}={_word(value)}" for key, value in parameters.items()) or "base"
    name = re.sub(r"(?i)\.partial$", "-partial", name)  # which is how unfinished folders are named
    if len(name.encode()) > 120:
        name = f"{name.encode()[:111].decode(errors='ignore')}-{_hash(parameters)[:8]}"
    return name


def unique_names(points: Iterable[Mapping]) -> list[str]:
    """Name points; those whose names would agree, upper and lower case aside, get a hash of their values."""
    points = list(points)
    names = [point_name(point) for point in points]
    for digits in (8, 64):  # of 100,000 hashes, two begin alike
        times = Counter(name.casefold() for name in names)
        names = [
            f"{name}-{_hash(point)[:digits]}" if times[name.casefold()] > 1 else name
            for name, point in zip(names, points, strict=True)
        ]
    return names


def _values(name: str, values) -> Sequence:
    if isinstance(values, str) or not isinstance(values, Sequence) or not values:
        raise ValueError(f"{short_name(str(name))}: give a list of at least one value, not {short_name(repr(values))}")
    return values


def _size(values) -> int:
    try:
        return len(repr(values))
    except ValueError:  # which Python does not write out
        raise ValueError("a whole number has more than 4,300 digits") from None


def _word(value) -> str:
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    if isinstance(value, list | tuple):
        return "+".join(map(_word, value))
    text = Path(value).name if isinstance(value, str) and "/" in value else str(value)
    return re.sub(r"[^\w.+-]+", "-", text).strip("-") or "empty"


def _hash(parameters: Mapping) -> str:
    return hashlib.sha256(json.dumps(parameters, sort_keys=True, default=str).encode()).hexdigest()
