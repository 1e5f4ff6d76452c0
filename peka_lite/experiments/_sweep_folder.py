"""What the folder of a sweep holds: points that are finished, run folders below them, and what is missing."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator
from pathlib import Path

from peka_lite._core._yaml import read_yaml
from peka_lite._core.names import escape_markdown, inline_code
from peka_lite._core.received import check_name, check_values, file_inside, folder_inside, read_json_inside

RUN_FILES = ("config.yml", "summary.json", "slides.parquet")
LONGEST_NAME = 240  # bytes of a folder's name, of which `.partial` leaves so many
_MOST_SCALARS = 10_000  # of a notebook's summary, each a column of a report


@dataclasses.dataclass(frozen=True, kw_only=True)
class SweepFolder:
    """A folder that `peka-lite sweep` made.

    Attributes
    ----------
    title, notebook
        As the sweep names them; None where its points are runs.
    varied
        Names of the settings that vary.
    points
        What each point sets.
    finished
        Points whose folder is there.
    missing
        The other points, with what their logs say of them: ``"missing"``, ``"unfinished"``, ``"failed: ..."``.
    seconds
        What the last attempt of each point took, where that is on record.

    Examples
    --------
    >>> from pathlib import Path
    >>> import peka_lite as pk
    >>> import yaml
    >>> Path("quick/method=none.partial").mkdir(parents=True)
    >>> _ = Path("quick/sweep.yml").write_text(yaml.safe_dump(pk.experiments.read_sweep("quick").told()))
    >>> folder = pk.experiments.read_sweep_folder("quick")
    >>> folder.varied, folder.finished
    (('method', 'features'), ())
    >>> folder.missing["method=none"], folder.missing["method=bone"]
    ('unfinished', 'missing')
    """

    folder: Path
    title: str
    notebook: str | None
    varied: tuple[str, ...]
    points: dict[str, dict]
    finished: tuple[str, ...]
    missing: dict[str, str]
    seconds: dict[str, float]

    def run_folders(self) -> Iterator[tuple[str, Path]]:
        """Yield point and folder of every finished run, at any depth below the points."""
        for point in self.finished:
            if self.notebook is None:
                yield point, self.folder / point
            else:
                yield from ((point, here) for here, names in _below(self.folder / point) if names >= {*RUN_FILES})

    def summaries(self) -> Iterator[tuple[str, dict]]:
        """Yield point and scalars (numbers, text, truth values) of every summary that is a notebook's own.

        Raises
        ------
        ValueError
            For a file that is no JSON, or no mapping, and as `file_inside`.
        """
        for point in self.finished if self.notebook is not None else ():
            for here, names in _below(self.folder / point):
                if "summary.json" in names and "config.yml" not in names:
                    yield point, _scalars(here, within=self.folder)

    def told(self) -> str:
        """Return in Markdown how many points are finished, and what became of the others."""
        words = f"{len(self.finished)} of {len(self.points)} points finished"
        groups = {"missing": [], "unfinished": [], "failed": []}
        for point, state in self.missing.items():
            kind, _, line = state.partition(": ")
            groups[kind].append(inline_code(point) + (f" ({escape_markdown(line)})" if line else ""))
        return "; ".join([words, *(f"{kind}: {', '.join(names)}" for kind, names in groups.items() if names)]) + "."


def is_sweep(folder: Path) -> bool:
    """Tell whether `peka-lite sweep` made a folder."""
    return (folder / "sweep.yml").is_file()


def read_sweep_folder(folder: str | os.PathLike) -> SweepFolder:
    """Read what a sweep's folder says of itself, and look which of its points are there.

    Raises
    ------
    ValueError
        If ``sweep.yml`` is not what `peka-lite sweep` writes into its folder, and for a point that lies elsewhere: one
        that is named by a path, or is a link out of the folder.

    Examples
    --------
    >>> from pathlib import Path
    >>> import peka_lite as pk
    >>> import yaml
    >>> text = "{fixed: {method: none, slides: [MINI3], split: spot}, grid: {features: [depth, coordinates]}}"
    >>> _ = Path("controls.yml").write_text(text)
    >>> sweep = pk.experiments.read_sweep("controls.yml")
    >>> _ = pk.load_or_run(pk.RunConfig(**sweep.points[0].settings), "controls/features=depth", maps=False)
    >>> _ = Path("controls/sweep.yml").write_text(yaml.safe_dump(sweep.told()))  # which `run_sweep` writes
    >>> pk.experiments.read_sweep_folder("controls").told()
    '1 of 2 points finished; missing: `features=coordinates`.'
    """
    folder = Path(folder)
    path = file_inside(folder, "sweep.yml")
    try:
        asked = read_yaml(path)
        title, notebook, varied = asked["title"], asked["notebook"], tuple(asked["varied"])
        points = {name: dict(given) for name, given in asked["points"].items()}
        if not (isinstance(title, str) and isinstance(notebook, str | None) and isinstance(asked["varied"], list)):
            raise TypeError
        if not all(isinstance(name, str) for given in (varied, *points.values()) for name in given):
            raise TypeError
    except (KeyError, TypeError, ValueError, AttributeError):
        raise ValueError(
            f"{path} does not name title, notebook, varied and points, as in a folder that `peka-lite sweep` made; "
            "give that folder, or the run folders themselves"
        ) from None
    try:
        check_values(asked)
        for name in points:
            if len(os.fsencode(check_name(name))) > LONGEST_NAME:
                raise ValueError(f"point {name[:40]!r}... has a name of more than {LONGEST_NAME} bytes")
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    finished, missing, seconds = [], {}, {}
    for name in points:
        record = _record(folder, name)
        if isinstance(record.get("seconds"), int | float):
            seconds[name] = float(record["seconds"])
        if (folder / name).is_dir() and _is_finished(folder_inside(folder, name), notebook):
            finished.append(name)
        elif record.get("state") == "failed":
            missing[name] = f"failed: {record.get('last_line', '')}"
        else:
            missing[name] = "unfinished" if (folder / f"{name}.partial").is_dir() else "missing"
    return SweepFolder(
        folder=folder, title=title, notebook=notebook, varied=varied, points=points, finished=tuple(finished),
        missing=missing, seconds=seconds,
    )  # fmt: skip


def _is_finished(folder: Path, notebook: str | None) -> bool:
    if notebook is None:
        return (folder / "summary.json").is_file()
    return any("summary.json" in names for _, names in _below(folder))


def _below(folder: Path) -> Iterator[tuple[Path, set[str]]]:
    """Yield a folder and those below it, with the names of their files; nothing that is unfinished."""
    for here, folders, files in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.endswith(".partial"))
        yield Path(here), set(files)


def _record(folder: Path, point: str) -> dict:
    """Return what is on record of a point's last attempt; nothing where its writing was cut short."""
    if not os.path.lexists(folder / "log" / f"{point}.json"):
        return {}
    file_inside(folder, "log", f"{point}.json")
    try:
        found = read_json_inside(folder, "log", f"{point}.json", largest=2**20)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _scalars(folder: Path, *, within: Path) -> dict:
    path = file_inside(folder, "summary.json", within=within)
    try:
        summary = read_json_inside(folder, "summary.json", within=within)
        found = {name: value for name, value in summary.items() if isinstance(value, str | bool | int | float)}
    except (ValueError, AttributeError):
        raise ValueError(f"{path} is no JSON mapping; remove the point's folder and run it anew") from None
    if len(found) > _MOST_SCALARS:
        raise ValueError(f"{path} holds {len(found):,} values; a report has a column for each, of {_MOST_SCALARS:,}")
    return found
