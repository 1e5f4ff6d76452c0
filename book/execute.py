"""Run one notebook for the book, and measure what it took: wall time and memory, kept in the notebook itself."""

import os
import platform
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import psutil

EVERY = 0.3  # seconds between two looks at the memory


def memory_of(process: psutil.Process) -> int:
    """Bytes held by a process and all it started; what they share is counted once for each."""
    total = 0
    for one in (process, *process.children(recursive=True)):
        try:
            total += one.memory_info().rss
        except psutil.Error:  # it has just ended
            continue
    return total


def execute(source: Path, target: Path, *, cwd: Path) -> tuple[float, float]:
    """Run `source` with papermill; `target` appears when it has run to its end.

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
    command = [sys.executable, "-m", "papermill", "--no-progress-bar", "--log-level", "WARNING", "--cwd", str(cwd)]
    begun, most = time.monotonic(), 0
    with subprocess.Popen([*command, str(source), str(work)]) as job:
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
    notebook.metadata["cost"] = {
        "seconds": round(seconds),
        "gib": round(gib, 1),
        "machine": f"{os.cpu_count()} CPU cores, {platform.machine()}, Python {platform.python_version()}",
    }
    nbformat.write(notebook, work)
    target.parent.mkdir(parents=True, exist_ok=True)
    os.replace(work, target)
    return seconds, gib


if __name__ == "__main__":
    source, target, cwd = (Path(argument).resolve() for argument in sys.argv[1:])
    print(f"{source.name}", flush=True)
    try:
        seconds, gib = execute(source, target, cwd=cwd)
    except subprocess.CalledProcessError as error:
        sys.exit(error.returncode)
    print(f"  {seconds:.0f} s, {gib:.1f} GiB", flush=True)
