"""One point of a sweep: what state its folder is in, and the process that makes it."""

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

from peka_lite._core._file_kinds import parse_json, read_text
from peka_lite._core._signals import exit_on_signals
from peka_lite._core._yaml import read_yaml
from peka_lite._core.io import write_file_atomically
from peka_lite._core.locks import lock_output_folder
from peka_lite._core.names import escape_control, short_name
from peka_lite._core.outputs import check_work
from peka_lite._core.progress import format_duration
from peka_lite.experiments.sweeps.read import Point, Sweep

_LENGTH = ("epochs", "n_splits", "train_share", "batch_size")  # numbers that decide how long a point takes
STATES = ("done", "failed", "unfinished", "missing")
LONGEST_LINE = 1000  # letters of what is shown of a log
LARGEST_JSON = 2**24  # bytes


def point_arguments(sweep: Sweep, point: Point) -> dict:
    """Return all that a process needs to make a point, as plain values."""
    notebook = None
    if sweep.notebook is not None:
        notebook = {"folder": str(sweep.notebook.parent), "code": sweep.code, "digest": sweep.digest}
    return {"name": point.name, "notebook": notebook, "settings": point.settings}


def notebook_copy(out: Path, digest: str) -> Path:
    """Return where a sweep keeps the notebook it runs: one that is edited meanwhile stays one version."""
    return out / "log" / f"{digest[:16]}.ipynb"


def sweep_states(sweep: Sweep, out: str | os.PathLike) -> pd.DataFrame:
    """Look up how far each point is.

    Parameters
    ----------
    out
        The sweep's folder; it need not be there.

    Returns
    -------
    pandas.DataFrame
        A row a point, by name: state (``"done"``: its folder and a complete ``summary.json`` are there; ``"failed"``;
        ``"unfinished"``: begun and stopped; ``"missing"``), seconds its last attempt took (NaN where there was none),
        last_line (of its log, where it failed), older (done, by an earlier version of the notebook's code), cached
        (done, with students that the cache had).

    Raises
    ------
    FileExistsError
        If a folder of that name holds a point with other settings, or of another notebook.
    ValueError
        If a point's folder, the log or the report is a link: what is written there would land elsewhere.

    Examples
    --------
    >>> from pathlib import Path
    >>> import peka_lite as pk
    >>> Path("quick/method=none.partial").mkdir(parents=True)  # as a stopped point leaves it
    >>> pk.experiments.sweep_states(pk.experiments.read_sweep("quick"), "quick")[["state"]].reset_index()
                                  point       state
    0                       method=bone     missing
    1                       method=lora     missing
    2                    method=adalora     missing
    3                       method=none  unfinished
    4       features=color,method=none     missing
    5  features=coordinates,method=none     missing
    """
    out, rows = Path(out), {}
    there = {entry.name: entry.is_symlink() for entry in os.scandir(out)} if out.is_dir() else {}
    own = {"log", "report"}.union(*((point.name, f"{point.name}.partial") for point in sweep.points))
    if links := sorted(name for name, is_link in there.items() if is_link and name in own):
        raise ValueError(f"{out / links[0]} is a link; a sweep writes into no link: remove it, or name another --out")
    logs = {entry.name for entry in os.scandir(out / "log")} if "log" in there else set()
    for point in sweep.points:
        record = read_record(out, point.name, there=f"{point.name}.json" in logs)
        state, line, older = record["state"] or "missing", record["last_line"], False
        if point.name in there:
            made = read_finished(out, point_arguments(sweep, point))
            state, older = ("done", made["code"] != sweep.code) if made else ("failed", False)
            line = line or "its folder is incomplete: remove it"
        elif state == "done":  # its folder was removed: to be made anew
            state = "missing"
        elif state == "missing" and f"{point.name}.partial" in there:
            state = "unfinished"
        line = line if state == "failed" else ""
        rows[point.name] = (state, record["seconds"], line, older, record["cached"])
    columns = ["state", "seconds", "last_line", "older", "cached"]
    return pd.DataFrame.from_dict(rows, orient="index", columns=columns).rename_axis("point")


def read_finished(out: Path, order: dict) -> dict | None:
    """Return settings and hash of the code that made a point's folder, where it is there and complete; else None.

    Raises
    ------
    FileExistsError
        If it was made with other settings, or holds what no sweep of this kind made.
    """
    folder, notebook = out / order["name"], order["notebook"]
    if not folder.is_dir() or explain_incomplete(folder, notebook is not None):
        return None
    made = read_json(folder / "point.json")
    if not made and notebook is None and (config := folder / "config.yml").is_file():  # by `peka-lite run`
        made = {"settings": read_yaml(config)}
    asked = _made(order)
    if not isinstance(made.get("settings"), dict) or (made.get("code") is None) != (asked["code"] is None):
        raise FileExistsError(f"{folder} was not made by this sweep; name another --out, or remove that folder")
    if made["settings"] != asked["settings"]:
        names = [k for k in asked["settings"] | made["settings"] if made["settings"].get(k) != asked["settings"].get(k)]
        told = f"was made with other settings ({short_name(', '.join(map(str, names)), longest=LONGEST_LINE)})"
        raise FileExistsError(f"{folder} {told}; name another --out, or remove that folder")
    return {"settings": made["settings"], "code": made.get("code")}


def group_alike(sweep: Sweep) -> dict[str, str]:
    """Return point -> what decides how long it takes, the same text for points that are alike."""

    def decides(name: str, value) -> bool:
        return name in _LENGTH or isinstance(value, str | list | tuple)

    return {p.name: json.dumps({k: v for k, v in p.settings.items() if decides(k, v)}) for p in sweep.points}


def expected_seconds(kinds: dict[str, str], took: dict[str, float]) -> dict[str, float]:
    """Return seconds by point, as far as they are known: its own, or the mean of those that are alike.

    Parameters
    ----------
    kinds
        From `group_alike`.
    took
        Seconds of points that were made from start to end, none of them from the cache.

    Examples
    --------
    >>> from peka_lite.experiments.sweeps.points import expected_seconds
    >>> expected_seconds({"a": "bone", "b": "bone", "c": "none"}, {"a": 60.0})
    {'a': 60.0, 'b': 60.0}
    """
    alike: dict[str, list[float]] = {}
    for name, seconds in took.items():
        alike.setdefault(kinds[name], []).append(seconds)
    means = {kind: sum(times) / len(times) for kind, times in alike.items()}
    return {name: took.get(name, means[kind]) for name, kind in kinds.items() if kind in means}


def measured_seconds(states: pd.DataFrame) -> dict[str, float]:
    """Return seconds of the points whose last attempt made them from start to end, none of them from the cache."""
    whole = states["seconds"].notna() & (states["state"] != "failed")
    if "cached" in states:
        whole &= ~states["cached"]
    return states.loc[whole, "seconds"].to_dict()


def plan_sweep(sweep: Sweep, out: str | os.PathLike) -> str:
    """Say what `run_sweep` would do: a line a point with its state and the time its last attempt took, then totals.

    Examples
    --------
    >>> import peka_lite as pk
    >>> print(pk.experiments.plan_sweep(pk.experiments.read_sweep("quick"), "quick"))
    method=bone                       missing
    method=lora                       missing
    method=adalora                    missing
    method=none                       missing
    features=color,method=none       missing
    features=coordinates,method=none  missing
    6 points in quick: 0 done, 6 to run; how long a point takes is not known yet
    """
    states = sweep_states(sweep, out)
    wide = max(map(len, states.index))
    times = states["seconds"].map(format_duration, na_action="ignore").fillna("")
    lines = [
        escape_control(f"{name:<{wide}}  {row.state:<10}  {times[name]:<14}{row.last_line}".rstrip())
        for name, row in states.iterrows()
    ]
    todo, took = states[states["state"] != "done"], measured_seconds(states)
    known = expected_seconds(group_alike(sweep), took)
    known = [known[name] for name in todo.index if name in known]
    work = "how long a point takes is not known yet"
    if known:
        work = f"about {format_duration(sum(known))} of work, by {len(took)} that were timed"
        if unknown := len(todo) - len(known):
            work += f", and {unknown} of which nothing alike was timed"
    lines.append(f"{len(states)} points in {out}: {len(states) - len(todo)} done, {len(todo)} to run; {work}")
    if sweep.notebook is not None:
        lines.append(f"each runs the code of {sweep.notebook}")
    return "\n".join(lines + ([describe_outdated(states)] if states["older"].any() else []))


def describe_outdated(states: pd.DataFrame) -> str:
    """Say how many points an earlier version of the notebook made."""
    n = int(states["older"].sum())
    return f"{n} of them by an earlier version of the notebook's code: remove their folders to make them anew"


def explain_incomplete(folder: Path, notebook: bool) -> str | None:
    """Return what a point's folder lacks for success: a complete ``summary.json`` and nothing unfinished, or None."""
    summaries = sorted(folder.rglob("summary.json")) if notebook else [folder / "summary.json"]
    if not summaries or not summaries[0].is_file():
        return "it ended but left no summary.json, which says that a run is complete; a notebook may write its own"
    for path in summaries:
        if not read_json(path):
            return f"{path.relative_to(folder)} is cut short, or holds no mapping with an entry"
    if notebook and (left := next((p for p in sorted(folder.rglob("*.partial"))), None)):
        return f"{left.relative_to(folder)} is unfinished"
    return None


def write_record(out: Path, order: dict, **record) -> dict:
    """Keep what came of a point's last attempt in ``log/NAME.json``; returns it."""
    record = {"state": "", "seconds": 0.0, "last_line": ""} | record
    record["last_line"] = short_name(record["last_line"], longest=LONGEST_LINE)
    write_file_atomically(out / "log" / f"{order['name']}.json", json.dumps(record, indent=1).encode())
    return record


def read_record(out: Path, name: str, *, there: bool = True) -> dict:
    """Return state, seconds, last_line and cached of a point's last attempt, each empty where none is on record."""
    path = out / "log" / f"{name}.json"
    found = read_json(path) if there and not path.is_symlink() else {}
    state, seconds, line = found.get("state"), found.get("seconds"), found.get("last_line")
    timed = isinstance(seconds, int | float) and 0 <= seconds < 1e9
    return {
        "state": state if state in STATES else "",
        "seconds": float(seconds) if timed else math.nan,
        "last_line": short_name(line, longest=LONGEST_LINE) if isinstance(line, str) else "",
        "cached": found.get("cached") is True,
    }


def make_point(order: dict, out: Path) -> None:
    """Make one point's folder, in this process; a folder that is complete already is left as it is.

    Raises
    ------
    FileExistsError
        If the folder is there and incomplete.
    RuntimeError
        If a notebook ended without a complete ``summary.json``, or is not the one that the sweep was started with.
    """
    folder, notebook = out / order["name"], order["notebook"]
    with lock_output_folder(folder) as work:  # where two sweeps want it, the second waits and finds it done
        if read_finished(out, order):
            return
        if folder.exists():
            raise FileExistsError(
                f"{folder} is there, but {explain_incomplete(folder, notebook is not None)}; remove it"
            )
        _begin(work, order)
        if notebook is None:
            from peka_lite.experiments.config import RunConfig
            from peka_lite.experiments.run import run

            run(RunConfig(**order["settings"]), folder, maps=False, progress=True)
        else:
            import papermill

            source, target = notebook_copy(out, notebook["digest"]), work / "notebook.ipynb"
            content = source.read_bytes()
            if hashlib.sha256(content).hexdigest() != notebook["digest"]:
                raise RuntimeError(f"{source} was replaced since the sweep was started; give the command again")
            write_file_atomically(target, content)
            papermill.execute_notebook(
                str(target), str(target), order["settings"], cwd=str(work), progress_bar=False, log_output=False
            )
            if lack := explain_incomplete(work, notebook=True):
                raise RuntimeError(lack)
            os.replace(work, folder)


def _begin(work: Path, order: dict) -> None:
    """Make the folder to work in, or keep the data that a stopped attempt at the very same left there."""
    path = work / "point.json"
    if work.is_symlink():
        raise ValueError(f"{work} is a link; a sweep writes into no link: remove it")
    check_work(work)
    if work.is_dir() and read_json(path) != _made(order):
        shutil.rmtree(work)
    # What is written must not land elsewhere, and a kernel can import what lies in its folder. The notebook starts from
    # its first cell: it makes its own links and code once more.
    code = tuple(all_suffixes()) if order["notebook"] else ()
    for entry in [Path(here, name) for here, folders, files in os.walk(work) for name in (*folders, *files)]:
        real = Path(os.path.realpath(entry))
        inside = real.is_relative_to(os.path.realpath(work)) and (os.path.isfile(real) or os.path.isdir(real))
        if not inside or (entry.name.endswith(code) and os.path.isfile(real)):
            entry.unlink()
    work.mkdir(parents=True, exist_ok=True)
    write_file_atomically(path, json.dumps(_made(order), indent=1).encode())


def main() -> None:
    """Make the point that the first line on stdin orders; ends at once when stdin closes, for then its worker died."""
    told = json.loads(sys.stdin.readline())
    threading.Thread(target=_end_with_parent, daemon=True).start()
    if notebook := told["order"]["notebook"]:  # its kernel can import what lies beside it
        paths = [notebook["folder"], os.environ.get("PYTHONPATH")]
        os.environ["PYTHONPATH"] = os.pathsep.join(path for path in paths if path)
    try:
        with exit_on_signals():
            make_point(told["order"], Path(told["out"]))
    except BaseException:
        traceback.print_exc()
        _end(1)  # without what libraries may still print: the log's last line is the error
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


def _made(order: dict) -> dict:
    return {"settings": order["settings"], "code": (order["notebook"] or {}).get("code")}


def read_json(path: Path) -> dict:
    """Return a JSON mapping; an empty one where there is none, its writing was cut short, or it has no end."""
    try:
        found = parse_json(read_text(path, longest=LARGEST_JSON))
    except (FileNotFoundError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


if __name__ == "__main__":
    main()
