"""Run a sweep, one process per point, on this machine or on the workers of a Dask cluster."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import time
from contextlib import suppress
from glob import escape
from pathlib import Path

import pandas as pd

import peka_lite
from peka_lite import __version__
from peka_lite._core._yaml import LARGEST, read_yaml, yaml_text
from peka_lite._core.names import short_name
from peka_lite._core.outputs import check_file
from peka_lite.experiments._sweep_folder import explain_incomplete
from peka_lite.experiments.sweeps._board import Board
from peka_lite.experiments.sweeps.points import (
    LONGEST_LINE,
    build_job,
    notebook_copy,
    read_finished,
    read_record,
    sweep_states,
    write_file_atomically,
    write_record,
)
from peka_lite.experiments.sweeps.read import Point, Sweep

CONNECT_TIMEOUT = 20  # seconds
POLL_INTERVAL = 0.1  # seconds
# A point's process imports the package from the same path as this one, and no modules from the current folder (-P),
# which may have been received with data.
_POINT_CODE = (
    "import sys; from importlib import util; spec = util.spec_from_file_location('peka_lite', sys.argv[1]); "
    "package = sys.modules['peka_lite'] = util.module_from_spec(spec); spec.loader.exec_module(package); "
    "from peka_lite.experiments.sweeps.points import main; main()"
)
# Workers are sent code as text. A function that a worker cannot import would kill the worker while it reads the task,
# and Dask would wait for another one forever.
_VERSION_CODE = "__import__('peka_lite.experiments.sweeps.run').__version__"
_INSTALL = f"Install peka_lite {__version__} in the workers' environment and run the command again"
_MAKE_CODE = "__import__('peka_lite.experiments.sweeps.run', fromlist=['run']).make_on_worker(job, **options)"


class PointError(RuntimeError):
    """Report a failed point with the last line of its log."""


def run_sweep(
    sweep: Sweep, out: str | os.PathLike, *, workers: int | None = None, scheduler: str | None = None, retry: int = 0
) -> pd.DataFrame:
    """Make all missing and failed points, several at once, each in its own process.

    A failed point does not stop the others. A point fails if its process is killed or, on a cluster, if its workers die
    more often than the scheduler's ``allowed-failures``. An interrupted sweep resumes with the same call. Progress is
    printed, live in a terminal. Without a scheduler, no ports are opened except those of notebook kernels, which only
    accept signed messages. The states at the end are returned, as by `sweep_states`.

    Parameters
    ----------
    out
        Folder of the sweep: one folder per point, ``log/`` with each point's output and record, and ``sweep.yml``. The
        notebook of a failed point, with its traceback, stays in ``{point}.partial``. On a cluster, all workers must see
        this folder and the cache (``PEKA_LITE_CACHE``) under the same path. Points and log must not be links.
    workers
        Points at once on this machine. By default one per GPU, or without GPUs as many as cores and memory allow
        (`Sweep.memory`).
    scheduler
        Address of a running Dask scheduler, whose workers make all points. Anyone with access to a scheduler's port can
        run code on its workers: use TLS (``tls://``), with keys in Dask's configuration (``distributed.comm.tls``).
    retry
        Number of further attempts at a failed point.

    Raises
    ------
    FileExistsError
        If `out` has points of the same names with other settings, or a ``sweep.yml`` that is not from a sweep.
    ValueError
        For workers together with a scheduler, more workers than GPUs, cluster workers without this version of the
        package, and links in `out` in place of a point or the log.
    OSError
        If the scheduler does not answer or disconnects.

    Examples
    --------
    >>> from pathlib import Path
    >>> import peka_lite as pk
    >>> text = "{fixed: {method: none, slides: [MINI3], split: spot, n_splits: 2}, list: [{features: depth}]}"
    >>> _ = Path("small.yml").write_text(text)
    >>> sweep = pk.experiments.read_sweep("small.yml")
    >>> _ = pk.load_or_run(pk.RunConfig(**sweep.points[0].settings), "small/features=depth", maps=False)
    >>> pk.experiments.run_sweep(sweep, "small")[["state"]].reset_index()  # skips the finished point
    small: 1 done
                point state
    0  features=depth  done
    """
    out = Path(out).resolve()
    states = sweep_states(sweep, out)
    check_file(out / "sweep.yml", "peka-lite sweep", inputs=[sweep.file], may_replace=_is_sweep_record)
    if scheduler is not None and workers is not None:
        raise ValueError("workers and scheduler: a cluster has its workers already; give one of the two")
    if retry < 0:
        raise ValueError(f"retry must be at least 0, not {retry}")
    todo = [point for point in sweep.points if states.loc[point.name, "state"] != "done"]
    board = Board(sweep, states)
    if not todo:
        _write_sweep_record(sweep, out)
        board.end(states)
        return states
    board.start()
    if scheduler is None:
        _make_locally(sweep, todo, out, board, workers=workers, retry=retry)
    else:
        _make_on_cluster(scheduler, sweep, todo, out, board, retry=retry)
    states = sweep_states(sweep, out)
    board.end(states)
    return states


def _make_locally(sweep: Sweep, todo: list[Point], out: Path, board: Board, *, workers: int | None, retry: int) -> None:
    """Make points in child processes of this one."""
    from dask.system import CPU_COUNT

    free = _plan_environments(sweep, workers, len(todo))
    _write_sweep_record(sweep, out)
    threads = _limit_threads(CPU_COUNT // len(free))
    waiting = [(point, retry) for point in reversed(todo)]
    running: list[tuple[Point, int, dict, _Attempt]] = []
    try:
        with board.live(slots=len(free)):
            while waiting or running:
                while waiting and free:
                    point, tries = waiting.pop()
                    job = build_job(sweep, point)
                    try:
                        finished = read_finished(out, job)  # by another sweep
                    except FileExistsError as error:
                        _report_end(board, out, point, str(error))
                        continue
                    if finished:
                        _report_end(board, out, point, None)
                        continue
                    variables = free.pop(0)
                    host = ", GPU ".join([platform.node(), *variables.values()])
                    board.event({"point": point.name, "worker": host})
                    attempt = _Attempt(job, out, dict(os.environ) | threads | variables, host)
                    running.append((point, tries, variables, attempt))
                ended = [each for each in running if each[-1].process.poll() is not None]
                for each in ended:
                    running.remove(each)
                    point, tries, variables, attempt = each
                    free.append(variables)
                    line = attempt.record_result()
                    if line is not None and tries:
                        waiting.append((point, tries - 1))
                    else:
                        _report_end(board, out, point, line)
                if running and not ended:
                    time.sleep(POLL_INTERVAL)
    finally:
        for *_, attempt in running:
            attempt.kill()


def _make_on_cluster(scheduler: str, sweep: Sweep, todo: list[Point], out: Path, board: Board, *, retry: int) -> None:
    """Make points on the workers of a cluster."""
    from distributed import Client, as_completed

    try:
        client = Client(scheduler, timeout=CONNECT_TIMEOUT)
    except (OSError, ValueError, TypeError) as error:  # TypeError for tls:// without keys
        raise OSError(f"{scheduler}: no Dask scheduler answers ({_join_lines(error)})") from None
    with client:
        if mismatches := _find_mismatches(client):
            raise ValueError(f"{scheduler}: {'; '.join(mismatches[:3])}. {_INSTALL}")
        _write_sweep_record(sweep, out)
        jobs = [build_job(sweep, point) for point in todo]
        # With one graph for all points, Dask assigns them in this order as workers become free.
        graph = f"{sweep.name}-{time.time_ns()}"
        options = {"topic": graph, "out": str(out), "sharing": _count_threads_by_host(client), "version": __version__}
        client.subscribe_topic(graph, lambda event: board.event(event[1]))
        keys = [(graph, k) for k in range(len(jobs))]
        scopes = [{"job": job, "options": options} for job in jobs]
        n = len(keys)
        futures = client.map(eval, [_MAKE_CODE] * n, [{}] * n, scopes, key=keys, retries=retry, pure=False)
        points = dict(zip(keys, todo, strict=True))
        with board.live(slots=sum(client.nthreads().values()), dashboard=client.dashboard_link):
            for future in as_completed(futures):
                if future.cancelled() or future.status == "lost":
                    raise OSError(f"{client.scheduler.address}: the scheduler disconnected; finished points are kept")
                point, error = points[future.key], future.exception()
                if error is None and (problem := explain_incomplete(out / point.name, sweep.notebook is not None)):
                    error = PointError(f"{problem} (in {out} on this machine)")
                if error is not None and not isinstance(error, PointError):  # its workers died, or lack the package
                    error = PointError(_explain_error(client, error))
                    write_record(out, build_job(sweep, point), state="failed", last_line=str(error))
                _report_end(board, out, point, None if error is None else _join_lines(error))


def _report_end(board: Board, out: Path, point: Point, error: str | None) -> None:
    cached = read_record(out, point.name)["cached"]
    board.ended(point.name, error and short_name(error, longest=LONGEST_LINE), cached=cached)


def make_on_worker(job: dict, *, topic: str, out: str, sharing: dict[str, int], version: str) -> None:
    """Make one point in a child process of a cluster's worker."""
    from distributed import get_worker

    out, worker = Path(out), get_worker()
    if version != __version__:  # a worker that joined later
        raise PointError(f"worker {worker.address} has peka_lite {__version__}, not {version}. {_INSTALL}")
    if not (out / "sweep.yml").is_file():
        raise PointError(f"worker {worker.address} cannot see {out}; give a folder that all workers share")
    try:
        if read_finished(out, job):  # before its worker died, or by another sweep
            return
    except FileExistsError as error:
        raise PointError(str(error)) from None
    worker.log_event(topic, {"point": job["name"], "worker": worker.address})
    environment = dict(os.environ) | _share_cores(worker, sharing)
    environment.pop("MALLOC_TRIM_THRESHOLD_", None)  # set by Dask; a run would spend a third of its time on it
    attempt = _Attempt(job, out, environment, worker.address)
    try:
        attempt.process.wait()
    finally:
        attempt.kill()
    if (line := attempt.record_result()) is not None:
        raise PointError(line)


class _Attempt:
    """Make a point in a child process, which ends when this process does."""

    def __init__(self, job: dict, out: Path, environment: dict[str, str], host: str):
        self.job, self.out, self.host = job, out, host
        self.begun, self.begun_at = time.perf_counter(), time.time()
        self.log = out / "log" / f"{job['name']}.txt"
        self.log.unlink(missing_ok=True)  # it may be a link
        # An empty entry, as in `PYTHONPATH=folder:$PYTHONPATH`, would add the current folder.
        paths = [os.path.abspath(path) for path in environment.get("PYTHONPATH", "").split(os.pathsep) if path]
        environment = environment | {"PYTHONPATH": os.pathsep.join(paths)}
        with self.log.open("x") as file:
            self.process = subprocess.Popen(
                [sys.executable, "-P", "-c", _POINT_CODE, peka_lite.__file__], env=environment, text=True,
                start_new_session=True, stdin=subprocess.PIPE, stdout=file, stderr=subprocess.STDOUT,
            )  # fmt: skip
        with suppress(BrokenPipeError):  # it ended at once; the log has the error
            self.process.stdin.write(json.dumps({"job": job, "out": str(out)}) + "\n")
            self.process.stdin.flush()

    def record_result(self) -> str | None:
        """Write the record of the ended attempt, and return why it failed; None if the point is done."""
        with suppress(OSError):
            self.process.stdin.close()
        seconds, status = round(time.perf_counter() - self.begun, 1), self.process.returncode
        line = _read_last_line(self.log)
        if status < 0:
            line = f"killed by signal {-status}" + (", as when memory runs out" if status == -9 else "")
        elif status == 0:
            line = explain_incomplete(self.out / self.job["name"], self.job["notebook"] is not None)
        common = {"seconds": seconds, "host": self.host}
        if line is not None:
            write_record(self.out, self.job, state="failed", last_line=line, **common)
            return line
        write_record(self.out, self.job, state="done", cached=_used_cache(self.job, since=self.begun_at), **common)
        return None

    def kill(self) -> None:
        """Kill the process and its children if it is still running."""
        import psutil

        if self.process.poll() is None:
            with suppress(psutil.NoSuchProcess):
                for child in psutil.Process(self.process.pid).children(recursive=True):  # a notebook's kernel
                    with suppress(psutil.NoSuchProcess):
                        child.kill()
            self.process.kill()
            self.process.wait()


def _used_cache(job: dict, *, since: float) -> bool:
    """Return whether all students of a run were in the cache, so that its run time is not representative."""
    from peka_lite._core.cache import cache_dir
    from peka_lite.backbones.custom import get_backbone
    from peka_lite.experiments.settings import WITH_STUDENT

    settings = job["settings"]
    if job["notebook"] is not None or settings["features"] not in WITH_STUDENT:
        return False
    backbone = get_backbone(settings["backbone"]).name
    name = backbone if settings["method"] == "none" else f"{backbone}_{settings['method']}"
    written = (cache_dir() / "students").glob(f"{escape(name)}_{'?' * 16}/features.npy")
    return not any(path.stat().st_mtime >= since - 1 for path in written)


def _find_mismatches(client) -> list[str]:
    """Return a description of each worker that cannot import this version of the package."""
    mismatches = []
    for address, answer in client.run(eval, _VERSION_CODE, on_error="return").items():
        if isinstance(answer, OSError):  # the worker disconnected
            continue
        if isinstance(answer, BaseException):
            mismatches.append(f"worker {address} cannot import peka_lite ({_join_lines(answer)})")
        elif answer != __version__:
            mismatches.append(f"worker {address} has peka_lite {answer}")
    return mismatches


def _explain_error(client, error: BaseException) -> str:
    """Explain in one sentence an error from outside the point's process."""
    from distributed import KilledWorker

    if isinstance(error, KilledWorker):
        last, times = error.last_worker.address, error.allowed_failures + 1
        return f"its worker died {times} times, the last at {last}, as when memory runs out; see the worker's log"
    mismatches = _find_mismatches(client) if isinstance(error, ImportError | AttributeError) else []
    return f"{mismatches[0]}. {_INSTALL}" if mismatches else f"{type(error).__name__}: {_join_lines(error)}"


def _share_cores(worker, sharing: dict[str, int]) -> dict[str, str]:
    """Return the thread limits of a point on a cluster's worker."""
    from dask.system import CPU_COUNT

    # Workers on one machine share its cores, unless a batch job restricts the worker to some of them.
    threads = worker.state.nthreads
    at_once = sharing.get(_get_host(worker.address), threads) if os.cpu_count() == CPU_COUNT else threads
    return _limit_threads(CPU_COUNT // at_once)


def _limit_threads(cores: int) -> dict[str, str]:
    return dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), str(max(1, cores)))


def _plan_environments(sweep: Sweep, workers: int | None, points: int) -> list[dict[str, str]]:
    """Return environment variables for each of the processes that fit cores, memory and GPUs at once."""
    import psutil
    from dask.system import CPU_COUNT
    from distributed.system import MEMORY_LIMIT

    if workers is not None and workers < 1:
        raise ValueError(f"workers must be at least 1, not {workers}")
    gpus = [] if all(point.settings.get("device") == "cpu" for point in sweep.points) else _list_gpus()
    if gpus:
        if workers is not None and workers > len(gpus):
            raise ValueError(f"workers: {workers} are more than the {len(gpus)} GPUs, and each point needs one")
        return [{"CUDA_VISIBLE_DEVICES": gpu} for gpu in gpus[: min(workers or points, points)]]
    memory = min(psutil.virtual_memory().available, MEMORY_LIMIT) / 2**30
    return [{}] * min(workers or max(1, int(min(CPU_COUNT, memory / sweep.memory))), points)


def _list_gpus() -> list[str]:
    import torch

    n, visible = torch.cuda.device_count(), os.environ.get("CUDA_VISIBLE_DEVICES")
    return visible.split(",")[:n] if visible else [str(i) for i in range(n)]


def _count_threads_by_host(client) -> dict[str, int]:
    """Return how many points run at once on each host, where they share the cores."""
    hosts: dict[str, int] = {}
    for address, threads in client.nthreads().items():
        hosts[_get_host(address)] = hosts.get(_get_host(address), 0) + threads
    return hosts


def _get_host(address: str) -> str:
    return address.rpartition(":")[0]


def _is_sweep_record(path: Path) -> bool:
    """Return whether a file is the ``sweep.yml`` of a sweep's folder, not a sweep file of the user."""
    try:
        content = read_yaml(path)
    except ValueError:
        return False
    return isinstance(content, dict) and content.keys() >= {"varied", "points"}


def _write_sweep_record(sweep: Sweep, out: Path) -> None:
    record = yaml_text(sweep.as_record()).encode()
    if len(record) > LARGEST:
        raise ValueError(f"{sweep.file}: its points take {len(record):,} bytes, above {LARGEST:,}; split the sweep")
    (out / "log").mkdir(parents=True, exist_ok=True)
    write_file_atomically(out / "sweep.yml", record)
    if sweep.notebook is not None:  # overwrites any file of this name
        write_file_atomically(notebook_copy(out, sweep.digest), sweep.content)


def _read_last_line(log: Path) -> str:
    lines = [line for line in log.read_text("utf-8", errors="replace").splitlines() if line.strip()]
    return lines[-1].strip() if lines else "it ended without output"


def _join_lines(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
