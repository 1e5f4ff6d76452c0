"""Look up the states of a sweep's points, and make one point in its own process."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import shutil
import sys
import threading
import traceback
from importlib.machinery import all_suffixes
from pathlib import Path

import pandas as pd

from peka_lite._core._signals import exit_on_signals
from peka_lite._core.io import write_file_atomically
from peka_lite._core.locks import lock_output_folder
from peka_lite._core.names import escape_control, short_name
from peka_lite._core.outputs import check_work
from peka_lite._core.progress import format_duration, show_messages, stage
from peka_lite.experiments._sweep_folder import explain_incomplete, read_json
from peka_lite.experiments.config import RunConfig
from peka_lite.experiments.folder import RunFolder
from peka_lite.experiments.settings import update_words
from peka_lite.experiments.sweeps.read import Point, Sweep

_COST = ("epochs", "n_splits", "train_share", "batch_size")  # numeric settings that affect the run time
STATES = ("done", "failed", "unfinished", "missing")
LONGEST_LINE = 1000  # characters of a log line that are shown


def build_job(sweep: Sweep, point: Point) -> dict:
    """Return the arguments of the process that makes a point, as plain values."""
    notebook = None
    if sweep.notebook is not None:
        notebook = {"folder": str(sweep.notebook.parent), "code": sweep.code, "digest": sweep.digest}
    return {"name": point.name, "notebook": notebook, "settings": point.settings}


def notebook_copy(out: Path, digest: str) -> Path:
    """Return the path of the sweep's copy of its notebook, which later edits do not affect."""
    return out / "log" / f"{digest[:16]}.ipynb"


def sweep_states(sweep: Sweep, out: str | os.PathLike) -> pd.DataFrame:
    """Return the state of each point of a sweep.

    Parameters
    ----------
    out
        The sweep's folder; it may be missing.

    Returns
    -------
    pandas.DataFrame
        One row per point, indexed by name. state: ``"done"`` (with a complete ``summary.json``), ``"failed"``,
        ``"unfinished"`` (started and stopped) or ``"missing"``. seconds: duration of the last attempt (NaN if none).
        last_line: of the log, for failed points. older: done with an earlier version of the notebook's code. cached:
        done with all students from the cache.

    Raises
    ------
    FileExistsError
        If a point's folder has other settings, or is of another notebook.
    ValueError
        If a point's folder, the log or the report is a symbolic link, which would lead out of the sweep's folder.

    Examples
    --------
    >>> from pathlib import Path
    >>> import peka_lite as pk
    >>> Path("quick/method=none.partial").mkdir(parents=True)  # a stopped point
    >>> pk.experiments.sweep_states(pk.experiments.read_sweep("quick"), "quick")[["state"]].reset_index()
                                  point       state
    0                       method=bone     missing
    1                       method=lora     missing
    2                    method=adalora     missing
    3                       method=none  unfinished
    4        features=color,method=none     missing
    5  features=coordinates,method=none     missing
    """
    out, rows = Path(out), {}
    entries = {entry.name: entry.is_symlink() for entry in os.scandir(out)} if out.is_dir() else {}
    written = {"log", "report"}.union(*((point.name, f"{point.name}.partial") for point in sweep.points))
    if links := sorted(name for name, is_link in entries.items() if is_link and name in written):
        raise ValueError(f"{out / links[0]} is a symbolic link; remove it, or give another folder with --out")
    logs = {entry.name for entry in os.scandir(out / "log")} if "log" in entries else set()
    for point in sweep.points:
        record = read_record(out, point.name, exists=f"{point.name}.json" in logs)
        state, line, older = record["state"] or "missing", record["last_line"], False
        if point.name in entries:
            finished = read_finished(out, build_job(sweep, point))
            state, older = ("done", finished["code"] != sweep.code) if finished else ("failed", False)
            line = line or "its folder is incomplete; remove it"
        elif state == "done":  # its folder was removed
            state = "missing"
        elif state == "missing" and f"{point.name}.partial" in entries:
            state = "unfinished"
        line = line if state == "failed" else ""
        rows[point.name] = (state, record["seconds"], line, older, record["cached"])
    columns = ["state", "seconds", "last_line", "older", "cached"]
    return pd.DataFrame.from_dict(rows, orient="index", columns=columns).rename_axis("point")


def read_finished(out: Path, job: dict) -> dict | None:
    """Read the settings and the code's hash of a complete point; return None if its folder is missing or incomplete.

    Raises
    ------
    FileExistsError
        If the point has other settings, or is not of a sweep of this kind.
    """
    folder, notebook = out / job["name"], job["notebook"]
    if not folder.is_dir() or explain_incomplete(folder, notebook is not None):
        return None
    record = read_json(folder / "point.json")
    if by_run := not record and notebook is None:
        with contextlib.suppress(ValueError, OSError):  # by `peka-lite run`
            record = {"settings": RunFolder.open(folder).config.as_dict()}
    expected = _build_record(job)
    settings = record.get("settings")
    if not isinstance(settings, dict) or (record.get("code") is None) != (expected["code"] is None):
        raise FileExistsError(f"{folder} is not from this sweep; remove it, or give another folder with --out")
    settings = update_words(settings) if notebook is None else settings
    if by_run:  # its folder has the name of a backbone's file
        expected["settings"] = RunConfig(**expected["settings"]).with_backbone_name().as_dict()
    if settings != expected["settings"]:
        names = [k for k in expected["settings"] | settings if settings.get(k) != expected["settings"].get(k)]
        shown = short_name(", ".join(map(str, names)), longest=LONGEST_LINE)
        raise FileExistsError(f"{folder} has other settings ({shown}); remove it, or give another folder with --out")
    return {"settings": settings, "code": record.get("code")}


def group_similar(sweep: Sweep) -> dict[str, str]:
    """Return a key for each point that is equal for points of similar run time."""

    def affects_time(name: str, value) -> bool:
        return name in _COST or isinstance(value, str | list | tuple)

    return {p.name: json.dumps({k: v for k, v in p.settings.items() if affects_time(k, v)}) for p in sweep.points}


def estimate_seconds(groups: dict[str, str], seconds: dict[str, float]) -> dict[str, float]:
    """Estimate run times by point, from its own time or the mean of its group; omit points of untimed groups.

    Parameters
    ----------
    groups
        From `group_similar`.
    seconds
        From `get_measured_seconds`.
    """
    times: dict[str, list[float]] = {}
    for name, value in seconds.items():
        times.setdefault(groups[name], []).append(value)
    means = {group: sum(values) / len(values) for group, values in times.items()}
    return {name: seconds.get(name, means[group]) for name, group in groups.items() if group in means}


def get_measured_seconds(states: pd.DataFrame) -> dict[str, float]:
    """Return the run times of points whose last attempt succeeded without cached students."""
    measured = states["seconds"].notna() & (states["state"] != "failed")
    if "cached" in states:
        measured &= ~states["cached"]
    return states.loc[measured, "seconds"].to_dict()


def plan_sweep(sweep: Sweep, out: str | os.PathLike) -> str:
    """Describe what `run_sweep` would do: the state and last run time of each point, then totals.

    Examples
    --------
    >>> import peka_lite as pk
    >>> print(pk.experiments.plan_sweep(pk.experiments.read_sweep("quick"), "quick"))
    method=bone                       missing
    method=lora                       missing
    method=adalora                    missing
    method=none                       missing
    features=color,method=none        missing
    features=coordinates,method=none  missing
    6 points in quick: 0 done, 6 to run; run time unknown
    """
    states = sweep_states(sweep, out)
    wide = max(map(len, states.index))
    times = states["seconds"].map(format_duration, na_action="ignore").fillna("")
    lines = [
        escape_control(f"{name:<{wide}}  {row.state:<10}  {times[name]:<14}{row.last_line}".rstrip())
        for name, row in states.iterrows()
    ]
    todo, measured = states[states["state"] != "done"], get_measured_seconds(states)
    estimates = estimate_seconds(group_similar(sweep), measured)
    known = [estimates[name] for name in todo.index if name in estimates]
    work = "run time unknown"
    if known:
        work = f"run time about {format_duration(sum(known))}, estimated from {len(measured)} timed"
        if unknown := len(todo) - len(known):
            work += f", plus {unknown} of unknown run time"
    lines.append(f"{len(states)} points in {out}: {len(states) - len(todo)} done, {len(todo)} to run; {work}")
    if sweep.notebook is not None:
        lines.append(f"each runs the code of {sweep.notebook}")
    return "\n".join(lines + ([describe_outdated(states)] if states["older"].any() else []))


def describe_outdated(states: pd.DataFrame) -> str:
    """Describe how many points are from an earlier version of the notebook."""
    n = int(states["older"].sum())
    return f"{n} of them by an earlier version of the notebook's code; remove their folders to run them again"


def write_record(out: Path, job: dict, **record) -> dict:
    """Write the result of a point's last attempt to ``log/NAME.json``, and return it."""
    record = {"state": "", "seconds": 0.0, "last_line": ""} | record
    record["last_line"] = short_name(record["last_line"], longest=LONGEST_LINE)
    write_file_atomically(out / "log" / f"{job['name']}.json", json.dumps(record, indent=1).encode())
    return record


def read_record(out: Path, name: str, *, exists: bool = True) -> dict:
    """Read state, seconds, last_line and cached of a point's last attempt; empty values if there was none."""
    path = out / "log" / f"{name}.json"
    record = read_json(path) if exists and not path.is_symlink() else {}
    state, seconds, line = record.get("state"), record.get("seconds"), record.get("last_line")
    timed = isinstance(seconds, int | float) and 0 <= seconds < 1e9
    return {
        "state": state if state in STATES else "",
        "seconds": float(seconds) if timed else math.nan,
        "last_line": short_name(line, longest=LONGEST_LINE) if isinstance(line, str) else "",
        "cached": record.get("cached") is True,
    }


def make_point(job: dict, out: Path) -> None:
    """Make the folder of one point in this process, unless it is already complete.

    Raises
    ------
    FileExistsError
        If the folder exists and is incomplete.
    RuntimeError
        If a notebook ended without a complete ``summary.json``, or its copy was replaced since the sweep started.
    """
    folder, notebook = out / job["name"], job["notebook"]
    with lock_output_folder(folder) as work:  # another sweep may be making the same point
        if read_finished(out, job):
            return
        if folder.exists():
            raise FileExistsError(f"{folder} exists, but {explain_incomplete(folder, notebook is not None)}; remove it")
        _prepare_folder(work, job)
        if notebook is None:
            from peka_lite.experiments.run import run

            run(RunConfig(**job["settings"]), folder, maps=False, progress=True)
        else:
            import papermill

            source, target = notebook_copy(out, notebook["digest"]), work / "notebook.ipynb"
            content = source.read_bytes()
            if hashlib.sha256(content).hexdigest() != notebook["digest"]:
                raise RuntimeError(f"{source} was replaced since the sweep started; run the command again")
            write_file_atomically(target, content)
            papermill.execute_notebook(
                str(target), str(target), job["settings"], cwd=str(work), progress_bar=False, log_output=False
            )
            if problem := explain_incomplete(work, notebook=True):
                raise RuntimeError(problem)
            os.replace(work, folder)


def _prepare_folder(work: Path, job: dict) -> None:
    """Create the working folder, or reuse the data of a stopped attempt with the same settings."""
    path = work / "point.json"
    if work.is_symlink():
        raise ValueError(f"{work} is a symbolic link; remove it")
    check_work(work)
    if work.is_dir() and read_json(path) != _build_record(job):
        shutil.rmtree(work)
    # Links could lead writes out of the folder, and the kernel could import modules in it. Both are removed: the
    # notebook runs from its first cell and creates its own again.
    code = tuple(all_suffixes()) if job["notebook"] else ()
    for entry in [Path(root, name) for root, folders, files in os.walk(work) for name in (*folders, *files)]:
        real = Path(os.path.realpath(entry))
        inside = real.is_relative_to(os.path.realpath(work)) and (os.path.isfile(real) or os.path.isdir(real))
        if not inside or (entry.name.endswith(code) and os.path.isfile(real)):
            entry.unlink()
    work.mkdir(parents=True, exist_ok=True)
    write_file_atomically(path, json.dumps(_build_record(job), indent=1).encode())


def main() -> None:
    """Make the point given as JSON on the first line of stdin; exit when stdin closes, which means the worker died."""
    arguments = json.loads(sys.stdin.readline())
    threading.Thread(target=_end_with_parent, daemon=True).start()
    if notebook := arguments["job"]["notebook"]:  # its kernel may import modules of its folder
        paths = [notebook["folder"], os.environ.get("PYTHONPATH")]
        os.environ["PYTHONPATH"] = os.pathsep.join(path for path in paths if path)
    try:
        with exit_on_signals(), show_messages(), stage(arguments["job"]["name"]):
            make_point(arguments["job"], Path(arguments["out"]))
    except BaseException:
        traceback.print_exc()
        _end(1)  # at once: the error must be the last line of the log
    _end(0)


def _end_with_parent() -> None:
    sys.stdin.read()
    _kill_children()
    os._exit(1)


def _end(status: int) -> None:
    _kill_children()
    with contextlib.suppress(OSError):  # the log's disk is full
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(status)


def _kill_children() -> None:
    import psutil

    for child in psutil.Process().children(recursive=True):  # a notebook's kernel
        with contextlib.suppress(psutil.NoSuchProcess):
            child.kill()


def _build_record(job: dict) -> dict:
    return {"settings": job["settings"], "code": (job["notebook"] or {}).get("code")}


if __name__ == "__main__":
    main()
