"""Run a sweep: a process a point, on this machine or by the workers of a Dask cluster."""

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
from peka_lite.experiments.sweeps._view import Board
from peka_lite.experiments.sweeps.points import (
    LONGEST_LINE,
    explain_incomplete,
    notebook_copy,
    point_arguments,
    read_finished,
    read_record,
    sweep_states,
    write_file_atomically,
    write_record,
)
from peka_lite.experiments.sweeps.read import Point, Sweep

ANSWER_WITHIN = 20  # seconds
LOOK_EVERY = 0.1  # seconds
# A point's process has the package from where this one has it, and no module from the current folder (-P): what lies
# there may have come with received data.
_POINT = (
    "import sys; from importlib import util; spec = util.spec_from_file_location('peka_lite', sys.argv[1]); "
    "package = sys.modules['peka_lite'] = util.module_from_spec(spec); spec.loader.exec_module(package); "
    "from peka_lite.experiments.sweeps.points import main; main()"
)
# What workers are sent is text, which any of them can read. A function that a worker cannot import ends the worker
# before its task is known, and Dask would wait for another one for ever.
_ASK_VERSION = "__import__('peka_lite.experiments.sweeps.run').__version__"
_INSTALL = (
    f"Install peka_lite {__version__} in the environment that the workers are started from, and give the command again"
)
_DO = "__import__('peka_lite.experiments.sweeps.run', fromlist=['_do'])._do(order, **at)"


class PointError(RuntimeError):
    """A point failed; the message is its log's last line."""


def run_sweep(
    sweep: Sweep,
    out: str | os.PathLike,
    *,
    workers: int | None = None,
    scheduler: str | None = None,
    retry: int = 0,
) -> pd.DataFrame:
    """Make every point that is missing or failed, several at once, each in a process of its own.

    A point that fails stops no other; one whose process is killed is failed (one whose worker on a cluster dies, when
    that happened more often than its scheduler's ``allowed-failures``). What is done stays done whatever is killed: the
    same call goes on from there. Progress is printed, live in a terminal. Without a scheduler no port is opened but
    those of notebooks' kernels, which take signed messages alone.

    Parameters
    ----------
    out
        Folder of the sweep: a folder a point, ``log/`` with each point's output and record, ``sweep.yml``. A failed
        point keeps its notebook, with the traceback, in ``{point}.partial``. On a cluster, a folder that every worker
        sees under the same path, as the cache (``PEKA_LITE_CACHE``) should be. Points and log are no links.
    workers
        Points at once on this machine; by default one a GPU, or without GPUs as many as cores and memory allow
        (`Sweep.memory`).
    scheduler
        Address of a running Dask scheduler, whose workers make the points; no processes are started here. Whoever
        reaches a scheduler's port can run code on its workers: give it TLS (``tls://``), with the keys in Dask's own
        configuration (``distributed.comm.tls``).
    retry
        How often a failed point is tried again.

    Returns
    -------
    pandas.DataFrame
        As `sweep_states`, at the end.

    Raises
    ------
    FileExistsError
        If `out` holds points of the same names with other settings, or a ``sweep.yml`` that no sweep wrote.
    ValueError
        For workers together with a scheduler, more workers than GPUs, a cluster's worker that lacks this version of the
        package, and a link in `out` where a point or the log is to be written.
    OSError
        If no scheduler answers at that address, or it goes away.

    Examples
    --------
    >>> from pathlib import Path
    >>> import peka_lite as pk
    >>> text = "{fixed: {method: none, slides: [MINI3], split: spot, n_splits: 2}, list: [{features: depth}]}"
    >>> _ = Path("small.yml").write_text(text)
    >>> sweep = pk.experiments.read_sweep("small.yml")
    >>> _ = pk.load_or_run(pk.RunConfig(**sweep.points[0].settings), "small/features=depth", maps=False)
    >>> pk.experiments.run_sweep(sweep, "small")[["state"]].reset_index()  # what is done is not made again
    small: 1 done
                point state
    0  features=depth  done
    """
    out = Path(out).resolve()
    states = sweep_states(sweep, out)
    check_file(out / "sweep.yml", "peka-lite sweep", inputs=[sweep.file], own=_is_told)
    if scheduler is not None and workers is not None:
        raise ValueError("workers and scheduler: a running cluster has workers of its own; give one of the two")
    if retry < 0:
        raise ValueError(f"retry is a number of further tries, not {retry}")
    todo = [point for point in sweep.points if states.loc[point.name, "state"] != "done"]
    board = Board(sweep, states)
    if not todo:
        _write_told(sweep, out)
        board.end(states)
        return states
    board.start()
    if scheduler is None:
        _make_here(sweep, todo, out, board, workers=workers, retry=retry)
    else:
        _make_on(scheduler, sweep, todo, out, board, retry=retry)
    states = sweep_states(sweep, out)
    board.end(states)
    return states


def _make_here(sweep: Sweep, todo: list[Point], out: Path, board: Board, *, workers: int | None, retry: int) -> None:
    """Make points by processes of this machine, which end when this one does."""
    from dask.system import CPU_COUNT

    free = _local_environments(sweep, workers, len(todo))
    _write_told(sweep, out)
    threads = _threads(CPU_COUNT // len(free))
    waiting = [(point, retry) for point in reversed(todo)]
    running: list[tuple[Point, int, dict, _Attempt]] = []
    try:
        with board.live(slots=len(free)):
            while waiting or running:
                while waiting and free:
                    point, tries = waiting.pop()
                    order = point_arguments(sweep, point)
                    try:
                        made = read_finished(out, order)  # by another sweep
                    except FileExistsError as error:
                        _end_on(board, out, point, str(error))
                        continue
                    if made:
                        _end_on(board, out, point, None)
                        continue
                    own = free.pop(0)
                    where = ", GPU ".join([platform.node(), *own.values()])
                    board.event({"point": point.name, "worker": where})
                    attempt = _Attempt(order, out, dict(os.environ) | threads | own, where)
                    running.append((point, tries, own, attempt))
                ended = [each for each in running if each[-1].process.poll() is not None]
                for each in ended:
                    running.remove(each)
                    point, tries, own, attempt = each
                    free.append(own)
                    line = attempt.outcome()
                    if line is not None and tries:
                        waiting.append((point, tries - 1))
                    else:
                        _end_on(board, out, point, line)
                if running and not ended:
                    time.sleep(LOOK_EVERY)
    finally:
        for *_, attempt in running:
            attempt.kill()


def _make_on(scheduler: str, sweep: Sweep, todo: list[Point], out: Path, board: Board, *, retry: int) -> None:
    """Make points by the workers of a cluster."""
    from distributed import Client, as_completed

    try:
        client = Client(scheduler, timeout=ANSWER_WITHIN)
    except (OSError, ValueError, TypeError) as error:  # the last for tls:// without keys
        raise OSError(f"{scheduler}: no Dask scheduler answers ({_one_line(error)})") from None
    with client:
        if lacking := _lacking(client):
            raise ValueError(f"{scheduler}: {'; '.join(lacking[:3])}. {_INSTALL}")
        _write_told(sweep, out)
        orders = [point_arguments(sweep, point) for point in todo]
        # One graph under one name: Dask hands a point out when a worker is free, in this order.
        graph = f"{sweep.name}-{time.time_ns()}"
        at = {"topic": graph, "out": str(out), "sharing": _threads_by_host(client), "version": __version__}
        client.subscribe_topic(graph, lambda event: board.event(event[1]))
        keys = [(graph, k) for k in range(len(orders))]
        given = [{"order": order, "at": at} for order in orders]
        futures = client.map(eval, [_DO] * len(keys), [{}] * len(keys), given, key=keys, retries=retry, pure=False)
        named = dict(zip(keys, todo, strict=True))
        with board.live(slots=sum(client.nthreads().values()), dashboard=client.dashboard_link):
            for future in as_completed(futures):
                if future.status in ("canceled", "lost"):
                    raise OSError(f"{client.scheduler.address}: the scheduler went away; what is done is kept")
                point, error = named[future.key], future.exception()
                if error is None and (lack := explain_incomplete(out / point.name, sweep.notebook is not None)):
                    error = PointError(f"{lack} (on {out}, seen from here)")
                if error is not None and not isinstance(error, PointError):  # its workers died, or lack the package
                    error = PointError(_why(client, error))
                    write_record(out, point_arguments(sweep, point), state="failed", last_line=str(error))
                _end_on(board, out, point, None if error is None else _one_line(error))


def _end_on(board: Board, out: Path, point: Point, error: str | None) -> None:
    cached = read_record(out, point.name)["cached"]
    board.ended(point.name, error and short_name(error, longest=LONGEST_LINE), cached=cached)


def _do(order: dict, *, topic: str, out: str, sharing: dict[str, int], version: str) -> None:
    """Make one point, on a cluster's worker: in a process of its own that ends when the worker does."""
    from distributed import get_worker

    out, worker = Path(out), get_worker()
    if version != __version__:  # of one that joined later
        raise PointError(f"worker {worker.address} has peka_lite {__version__}, not {version}. {_INSTALL}")
    if not (out / "sweep.yml").is_file():
        raise PointError(f"{out} is not to be seen from {worker.address}: give a folder that all workers share")
    try:
        if read_finished(out, order):  # before its worker died, or by another sweep
            return
    except FileExistsError as error:
        raise PointError(str(error)) from None
    worker.log_event(topic, {"point": order["name"], "worker": worker.address})
    environment = dict(os.environ) | _share(worker, sharing)
    environment.pop("MALLOC_TRIM_THRESHOLD_", None)  # Dask's own; a run would spend a third of its time on it
    attempt = _Attempt(order, out, environment, worker.address)
    try:
        attempt.process.wait()
    finally:
        attempt.kill()
    if (line := attempt.outcome()) is not None:
        raise PointError(line)


class _Attempt:
    """A point that is being made, in a process of its own that ends when this one does."""

    def __init__(self, order: dict, out: Path, environment: dict[str, str], where: str):
        self.order, self.out, self.where = order, out, where
        self.begun, self.at = time.perf_counter(), time.time()
        self.log = out / "log" / f"{order['name']}.txt"
        self.log.unlink(missing_ok=True)  # which may be a link
        # An empty entry, as `PYTHONPATH=mine:$PYTHONPATH` leaves one, would be the current folder once more.
        paths = [os.path.abspath(path) for path in environment.get("PYTHONPATH", "").split(os.pathsep) if path]
        environment = environment | {"PYTHONPATH": os.pathsep.join(paths)}
        with self.log.open("x") as file:
            self.process = subprocess.Popen(
                [sys.executable, "-P", "-c", _POINT, peka_lite.__file__], env=environment, text=True,
                start_new_session=True, stdin=subprocess.PIPE, stdout=file, stderr=subprocess.STDOUT,
            )  # fmt: skip
        with suppress(BrokenPipeError):  # it ended at once: its log says why
            self.process.stdin.write(json.dumps({"order": order, "out": str(out)}) + "\n")
            self.process.stdin.flush()

    def outcome(self) -> str | None:
        """Keep what came of it, and return why it failed; None where it is done."""
        with suppress(OSError):
            self.process.stdin.close()
        seconds, status = round(time.perf_counter() - self.begun, 1), self.process.returncode
        line = _last_line(self.log)
        if status < 0:
            line = f"killed by signal {-status}" + (", as when memory runs out" if status == -9 else "")
        elif status == 0:
            line = explain_incomplete(self.out / self.order["name"], self.order["notebook"] is not None)
        told = {"seconds": seconds, "host": self.where}
        if line is not None:
            write_record(self.out, self.order, state="failed", last_line=line, **told)
            return line
        write_record(self.out, self.order, state="done", cached=_from_cache(self.order, since=self.at), **told)
        return None

    def kill(self) -> None:
        """End the process, where it has not ended, and all that it started."""
        import psutil

        if self.process.poll() is None:
            with suppress(psutil.NoSuchProcess):
                for child in psutil.Process(self.process.pid).children(recursive=True):  # a notebook's kernel
                    with suppress(psutil.NoSuchProcess):
                        child.kill()
            self.process.kill()
            self.process.wait()


def _from_cache(order: dict, *, since: float) -> bool:
    """Say whether the cache had every student that a run asked for, so that its time says nothing of another's."""
    from peka_lite._core.locks import RECORD
    from peka_lite.data.download import cache_dir
    from peka_lite.experiments.config import WITH_STUDENT

    settings = order["settings"]
    if order["notebook"] is not None or settings["features"] not in WITH_STUDENT:
        return False
    name = settings["backbone"] if settings["method"] == "none" else f"{settings['backbone']}_{settings['method']}"
    made = (path.stat().st_mtime for path in (cache_dir() / "students").glob(f"{escape(name)}_{'?' * 16}/{RECORD}"))
    return not any(time >= since - 1 for time in made)


def _lacking(client) -> list[str]:
    """Say which workers cannot import this version of the package."""
    lacking = []
    for address, answer in client.run(eval, _ASK_VERSION, on_error="return").items():
        if isinstance(answer, OSError):  # it went away
            continue
        if isinstance(answer, BaseException):
            lacking.append(f"worker {address} cannot import peka_lite ({_one_line(answer)})")
        elif answer != __version__:
            lacking.append(f"worker {address} has peka_lite {answer}")
    return lacking


def _why(client, error: BaseException) -> str:
    """Say in one sentence why a point ended outside its own process."""
    from distributed import KilledWorker

    if isinstance(error, KilledWorker):
        last, times = error.last_worker.address, error.allowed_failures + 1
        return f"its worker died {times} times, the last at {last}, as when memory runs out: see the worker's log"
    lacking = _lacking(client) if isinstance(error, ImportError | AttributeError) else []
    return f"{lacking[0]}. {_INSTALL}" if lacking else f"{type(error).__name__}: {_one_line(error)}"


def _share(worker, sharing: dict[str, int]) -> dict[str, str]:
    """Return a point's share of the cores of a cluster's worker."""
    from dask.system import CPU_COUNT

    # Workers of one machine share its cores; one that sees fewer than all, in a job, has those alone.
    own = worker.state.nthreads
    at_once = sharing.get(_host(worker.address), own) if os.cpu_count() == CPU_COUNT else own
    return _threads(CPU_COUNT // at_once)


def _threads(cores: int) -> dict[str, str]:
    return dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), str(max(1, cores)))


def _local_environments(sweep: Sweep, workers: int | None, points: int) -> list[dict[str, str]]:
    """Return the variables of its own of each process that fits cores, memory and GPUs at once."""
    import psutil
    from dask.system import CPU_COUNT
    from distributed.system import MEMORY_LIMIT

    if workers is not None and workers < 1:
        raise ValueError(f"workers: at least 1, not {workers}")
    gpus = [] if all(point.settings.get("device") == "cpu" for point in sweep.points) else _gpus()
    if gpus:
        if workers is not None and workers > len(gpus):
            raise ValueError(f"workers: {workers} are more than the {len(gpus)} GPUs here, and a point takes one")
        return [{"CUDA_VISIBLE_DEVICES": gpu} for gpu in gpus[: min(workers or points, points)]]
    memory = min(psutil.virtual_memory().available, MEMORY_LIMIT) / 2**30
    return [{}] * min(workers or max(1, int(min(CPU_COUNT, memory / sweep.memory))), points)


def _gpus() -> list[str]:
    import torch

    n, named = torch.cuda.device_count(), os.environ.get("CUDA_VISIBLE_DEVICES")
    return named.split(",")[:n] if named else [str(i) for i in range(n)]


def _threads_by_host(client) -> dict[str, int]:
    """Return how many points run at once on each host, so that they share its cores."""
    hosts: dict[str, int] = {}
    for address, threads in client.nthreads().items():
        hosts[_host(address)] = hosts.get(_host(address), 0) + threads
    return hosts


def _host(address: str) -> str:
    return address.rpartition(":")[0]


def _is_told(path: Path) -> bool:
    """Say whether a file is the ``sweep.yml`` of a sweep's folder, not a user's file that asks for a sweep."""
    try:
        told = read_yaml(path)
    except ValueError:
        return False
    return isinstance(told, dict) and told.keys() >= {"varied", "points"}


def _write_told(sweep: Sweep, out: Path) -> None:
    told = yaml_text(sweep.told()).encode()
    if len(told) > LARGEST:
        raise ValueError(f"{sweep.file}: what its points set takes {len(told):,} bytes, above {LARGEST:,}; split it")
    (out / "log").mkdir(parents=True, exist_ok=True)
    write_file_atomically(out / "sweep.yml", told)
    if sweep.notebook is not None:  # over whatever lies there under this name
        write_file_atomically(notebook_copy(out, sweep.digest), sweep.content)


def _last_line(log: Path) -> str:
    lines = [line for line in log.read_text("utf-8", errors="replace").splitlines() if line.strip()]
    return lines[-1].strip() if lines else "it ended without a word"


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
