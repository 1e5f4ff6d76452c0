"""Run one notebook for the book: what it took is kept in it, and exercises' checks have to refuse wrong answers."""

import os
import platform
import re
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import nbformat
import psutil
import yaml

EVERY = 0.3  # seconds between two looks at the memory
DROPPED = "-dropped"  # ends the ids of cells that are run and not kept


def memory_of(process: psutil.Process) -> int:
    """Bytes held by a process and all it started; what they share is counted once for each."""
    total = 0
    for one in (process, *process.children(recursive=True)):
        try:
            total += one.memory_info().rss
        except psutil.Error:  # it has just ended
            continue
    return total


def with_refused_answers(notebook: nbformat.NotebookNode, wrong: dict[str, list[str]]) -> nbformat.NotebookNode:
    """Add, before each solution, its check unsolved and after each wrong answer; it has to fail by `AssertionError`."""
    cells = []
    for i, cell in enumerate(notebook.cells):
        if "solution" in cell.metadata.get("tags", []):
            check = notebook.cells[i + 1]
            body = textwrap.indent(check.source, "    ")
            for n, answer in enumerate(["", *wrong.get(check.id.removesuffix("-check"), [])]):
                passes = f"accepts wrong answer {n}: {answer}" if n else "passes before the exercise is solved"
                passes = f"raise RuntimeError({f'{check.id} {passes}'!r})"
                code = f"{answer}\ntry:\n{body}\nexcept AssertionError:\n    pass\nelse:\n    {passes}"
                cells.append(nbformat.v4.new_code_cell(code, id=f"{check.id}-{n}{DROPPED}"))
        cells.append(cell)
    return nbformat.from_dict(notebook | {"cells": cells})


def execute(source: Path, target: Path, *, cwd: Path) -> tuple[float, float]:
    """Run `source` with papermill, each exercise's check before its solution and after; `target` appears at the end.

    ``wrong_answers.yml`` beside `source` holds, for an exercise's id, answers that its check has to refuse.

    Returns
    -------
    seconds, gib
        Wall time, and the most memory that the notebook and its child processes held at once.

    Raises
    ------
    subprocess.CalledProcessError
        When a cell fails; papermill has said which.
    """
    work = cwd / "executed" / source.name
    work.parent.mkdir(parents=True, exist_ok=True)
    answers = source.with_name("wrong_answers.yml")
    wrong = yaml.safe_load(answers.read_text("utf-8")) if answers.is_file() else {}
    nbformat.write(with_refused_answers(nbformat.read(source, as_version=4), wrong), work)
    cores = os.cpu_count() or 1
    parallel = re.search(r"-j ?(\d+)", os.environ.get("MAKEFLAGS", ""))  # `make -j2 book`
    at_once = int(parallel[1]) if parallel else 1
    threads = {"OMP_NUM_THREADS": str(max(1, cores // at_once))} if at_once > 1 else {}
    command = [sys.executable, "-m", "papermill", "--no-progress-bar", "--log-level", "WARNING", "--cwd", str(cwd)]
    begun, most = time.monotonic(), 0
    with subprocess.Popen([*command, str(work), str(work)], env=os.environ | threads) as job:
        try:
            while job.poll() is None:
                most = max(most, memory_of(psutil.Process(job.pid)))
                time.sleep(EVERY)
        except psutil.NoSuchProcess:
            job.wait()
        except BaseException:  # Ctrl-C: the notebook's kernel must not outlive it
            job.terminate()
            raise
    if job.returncode:
        raise subprocess.CalledProcessError(job.returncode, command)
    seconds, gib = time.monotonic() - begun, most / 2**30
    notebook = nbformat.read(work, as_version=4)
    notebook.cells = [cell for cell in notebook.cells if not cell.id.endswith(DROPPED)]
    notebook.metadata["cost"] = {
        "seconds": round(seconds),
        "gib": round(gib, 1),
        "machine": f"{cores} CPU cores, {platform.machine()}, Python {platform.python_version()}"
        + (f"; {at_once} chapters at once" if at_once > 1 else ""),
    }
    nbformat.write(notebook, work)
    target.parent.mkdir(parents=True, exist_ok=True)
    os.replace(work, target)
    return seconds, gib


if __name__ == "__main__":
    source, target, cwd = (Path(argument).resolve() for argument in sys.argv[1:])
    try:
        seconds, gib = execute(source, target, cwd=cwd)
    except subprocess.CalledProcessError as error:
        sys.exit(error.returncode)
    print(f"{source.name}: {seconds:.0f} s, {gib:.1f} GiB", flush=True)
