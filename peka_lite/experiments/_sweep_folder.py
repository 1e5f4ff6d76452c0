"""Reading the folder of a sweep: finished points, their run folders, and missing points."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator
from pathlib import Path

from peka_lite._core._file_kinds import parse_json, read_text
from peka_lite._core._yaml import read_yaml
from peka_lite._core.names import escape_markdown, inline_code
from peka_lite._core.untrusted_files import check_name, check_values, file_inside, folder_inside, read_json_inside

RUN_FILES = ("config.yml", "summary.json", "slides.parquet")
LONGEST_NAME = 240  # bytes of a point's name, so that `.partial` can be added
_LARGEST_JSON = 2**24  # bytes
_MAX_SCALARS = 10_000  # in a notebook's summary, each a column of a report


@dataclasses.dataclass(frozen=True, kw_only=True)
class SweepFolder:
    """A folder that `peka-lite sweep` made.

    Attributes
    ----------
    title, notebook
        As in the sweep; notebook is None if the points are runs.
    varied
        Names of the settings that vary.
    points
        Point -> its settings.
    finished
        Points whose folder is complete.
    missing
        Other points -> state from their logs: ``"missing"``, ``"unfinished"`` or ``"failed: ..."``.
    seconds
        Point -> duration of the last attempt, if recorded.

    Examples
    --------
    >>> from pathlib import Path
    >>> import peka_lite as pk
    >>> import yaml
    >>> Path("quick/method=none.partial").mkdir(parents=True)
    >>> _ = Path("quick/sweep.yml").write_text(yaml.safe_dump(pk.experiments.read_sweep("quick").as_record()))
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
                yield from ((point, path) for path, names in _walk(self.folder / point) if names >= {*RUN_FILES})

    def summaries(self) -> Iterator[tuple[str, dict]]:
        """Yield point and scalars (numbers, text, booleans) of every summary written by a notebook itself.

        Raises
        ------
        ValueError
            For a file that is no JSON mapping, and as `file_inside`.
        """
        for point in self.finished if self.notebook is not None else ():
            for path, names in _walk(self.folder / point):
                if "summary.json" in names and "config.yml" not in names:
                    yield point, _read_scalars(path, within=self.folder)

    def describe(self) -> str:
        """Return, as Markdown, how many points are finished, and the state of the others."""
        words = f"{len(self.finished)} of {len(self.points)} points finished"
        groups = {"missing": [], "unfinished": [], "failed": []}
        for point, state in self.missing.items():
            kind, _, line = state.partition(": ")
            groups[kind].append(inline_code(point) + (f" ({escape_markdown(line)})" if line else ""))
        return "; ".join([words, *(f"{kind}: {', '.join(names)}" for kind, names in groups.items() if names)]) + "."


def is_sweep(folder: Path) -> bool:
    """Return whether a folder was made by `peka-lite sweep`."""
    return (folder / "sweep.yml").is_file()


def read_sweep_folder(folder: str | os.PathLike) -> SweepFolder:
    """Read the folder of a sweep, and find which of its points are finished.

    Raises
    ------
    ValueError
        If ``sweep.yml`` was not written by `peka-lite sweep`, and for a point outside the folder: one named by a path,
        or a symbolic link to elsewhere.

    Examples
    --------
    >>> from pathlib import Path
    >>> import peka_lite as pk
    >>> import yaml
    >>> text = "{fixed: {method: none, slides: [MINI3], split: spot}, grid: {features: [depth, coordinates]}}"
    >>> _ = Path("controls.yml").write_text(text)
    >>> sweep = pk.experiments.read_sweep("controls.yml")
    >>> _ = pk.load_or_run(pk.RunConfig(**sweep.points[0].settings), "controls/features=depth", maps=False)
    >>> _ = Path("controls/sweep.yml").write_text(yaml.safe_dump(sweep.as_record()))  # which `run_sweep` writes
    >>> pk.experiments.read_sweep_folder("controls").describe()
    '1 of 2 points finished; missing: `features=coordinates`.'
    """
    folder = Path(folder)
    path = file_inside(folder, "sweep.yml")
    try:
        sweep = read_yaml(path)
        title, notebook, varied = sweep["title"], sweep["notebook"], tuple(sweep["varied"])
        points = {name: dict(settings) for name, settings in sweep["points"].items()}
        if not (isinstance(title, str) and isinstance(notebook, str | None) and isinstance(sweep["varied"], list)):
            raise TypeError
        if not all(isinstance(name, str) for names in (varied, *points.values()) for name in names):
            raise TypeError
    except (KeyError, TypeError, ValueError, AttributeError):
        raise ValueError(
            f"{path} does not name title, notebook, varied and points, as in a folder that `peka-lite sweep` made; "
            "give that folder, or the run folders themselves"
        ) from None
    try:
        check_values(sweep)
        for name in points:
            if len(os.fsencode(check_name(name))) > LONGEST_NAME:
                raise ValueError(f"point {name[:40]!r}... has a name of more than {LONGEST_NAME} bytes; shorten it")
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    finished, missing, seconds = [], {}, {}
    for name in points:
        record = _read_record(folder, name)
        if isinstance(record.get("seconds"), int | float):
            seconds[name] = float(record["seconds"])
        inside = folder_inside(folder, name) if (folder / name).is_dir() else None
        if inside and not (problem := explain_incomplete(inside, notebook is not None)):
            finished.append(name)
        elif inside:
            missing[name] = f"failed: {problem}"
        elif record.get("state") == "failed":
            missing[name] = f"failed: {record.get('last_line', '')}"
        else:
            missing[name] = "unfinished" if (folder / f"{name}.partial").is_dir() else "missing"
    return SweepFolder(
        folder=folder, title=title, notebook=notebook, varied=varied, points=points, finished=tuple(finished),
        missing=missing, seconds=seconds,
    )  # fmt: skip


def _walk(folder: Path) -> Iterator[tuple[Path, set[str]]]:
    """Yield a folder and those below it, with the names of their files; skip unfinished ones."""
    for path, folders, files in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.endswith(".partial"))
        yield Path(path), set(files)


def _read_record(folder: Path, point: str) -> dict:
    """Return the record of a point's last attempt, empty if absent or truncated."""
    if not os.path.lexists(folder / "log" / f"{point}.json"):
        return {}
    file_inside(folder, "log", f"{point}.json")
    try:
        record = read_json_inside(folder, "log", f"{point}.json", largest=2**20)
    except ValueError:
        return {}
    return record if isinstance(record, dict) else {}


def _read_scalars(folder: Path, *, within: Path) -> dict:
    path = file_inside(folder, "summary.json", within=within)
    try:
        summary = read_json_inside(folder, "summary.json", within=within)
        scalars = {name: value for name, value in summary.items() if isinstance(value, str | bool | int | float)}
    except (ValueError, AttributeError):
        raise ValueError(f"{path} is no JSON mapping; remove the point's folder and run it again") from None
    if len(scalars) > _MAX_SCALARS:
        raise ValueError(f"{path} holds {len(scalars):,} values; a report takes at most {_MAX_SCALARS:,}")
    return scalars


def explain_incomplete(folder: Path, notebook: bool) -> str | None:
    """Explain why a point's folder is incomplete; return None if it has a complete ``summary.json``."""
    summaries = sorted(folder.rglob("summary.json")) if notebook else [folder / "summary.json"]
    if not summaries or not summaries[0].is_file():
        return "no summary.json was written, which marks a complete run; a notebook may write its own"
    for path in summaries:
        if not read_json(path):
            return f"{path.relative_to(folder)} is truncated or not a mapping with entries"
    if notebook and (partial := next((p for p in sorted(folder.rglob("*.partial"))), None)):
        return f"{partial.relative_to(folder)} is unfinished"
    return None


def read_json(path: Path) -> dict:
    """Read a JSON mapping; return an empty one if the file is missing, truncated, too large or not a mapping."""
    try:
        content = parse_json(read_text(path, longest=_LARGEST_JSON))
    except (FileNotFoundError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}
