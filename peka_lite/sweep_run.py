"""Run a sweep on a Dask cluster: processes on this machine, or any cluster by its address."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from contextlib import contextmanager, suppress
from glob import escape
from pathlib import Path

import pandas as pd

from peka_lite import __version__
from peka_lite._yaml import yaml_text
from peka_lite.sweep import Sweep, code_of
from peka_lite.sweep_points import (
    finished,
    missing_summary,
    notebook_copy,
    order_of,
    read_json,
    sweep_states,
    write_record,
    write_whole,
)
from peka_lite.sweep_view import Board

ANSWER_WITHIN = 20  # seconds
DEATHS = 3  # of a point's worker, after which the point is given up
# What workers are sent is text, which any of them can read. A function that a worker cannot import ends the worker
# before its task is known, and Dask would wait for another one for ever.
_ASK_VERSION = "__import__('peka_lite.sweep_run').__version__"
_INSTALL = (
    f"Install peka_lite {__version__} in the environment that the workers are started from, and give the command again"
)
_DO = "__import__('peka_lite.sweep_run', fromlist=['_do'])._do(order, **at)"


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

    A point that fails stops no other; one whose worker died three times is failed (on a cluster, as its scheduler's
    ``allowed-failures`` says). What is done stays done whatever is killed: the same call goes on from there.
    Progress is printed, live in a terminal. In a script, call it under ``if __name__ == "__main__":``, because the
    workers are processes.

    Parameters
    ----------
    out
        Folder of the sweep: a folder a point, ``log/`` with each point's output and record, ``sweep.yml``. A failed
        point keeps its notebook, with the traceback, in ``{point}.partial``. On a cluster, a folder that every worker
        sees under the same path, as the cache (``PEKA_LITE_CACHE``) should be.
    workers
        Points at once on this machine; by default one a GPU, or without GPUs as many as cores and memory allow
        (`Sweep.memory`).
    scheduler
        Address of a running Dask scheduler, whose workers make the points; no processes are started here.
    retry
        How often a failed point is tried again.

    Returns
    -------
    pandas.DataFrame
        As `sweep_states`, at the end.

    Raises
    ------
    FileExistsError
        If `out` holds points of the same names with other settings.
    ValueError
        For workers together with a scheduler, more workers than GPUs, and a cluster's worker that lacks this version
        of the package.
    OSError
        If no scheduler answers at that address, or it goes away.

    Examples
    --------
    >>> from pathlib import Path
    >>> import peka_lite as pk
    >>> text = "{fixed: {method: none, slides: [MINI3], split: spot, n_splits: 2}, list: [{features: depth}]}"
    >>> _ = Path("small.yml").write_text(text)
    >>> sweep = pk.read_sweep("small.yml")
    >>> _ = pk.load_or_run(pk.RunConfig(**sweep.points[0].settings), "small/features=depth", maps=False)
    >>> pk.run_sweep(sweep, "small")[["state"]].reset_index()  # what is done is not made again
    small: 1 done
                point state
    0  features=depth  done
    """
    from distributed import as_completed

    out = Path(out).resolve()
    states = sweep_states(sweep, out)
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
    with _client(sweep, scheduler, workers, len(todo)) as client:
        if scheduler is not None and (lacking := _lacking(client)):
            raise ValueError(f"{scheduler}: {'; '.join(lacking[:3])}. {_INSTALL}")
        _write_told(sweep, out)
        at = {"out": str(out), "local": scheduler is None, "sharing": _threads_by_host(client), "version": __version__}
        orders = [order_of(sweep, point) for point in todo]
        # One graph under one name: Dask hands a point out when a worker is free, in this order.
        graph = f"{sweep.name}-{time.time_ns()}"
        at["topic"] = graph
        client.subscribe_topic(graph, lambda event: board.event(event[1]))
        keys = [(graph, k) for k in range(len(orders))]
        given = [{"order": order, "at": at} for order in orders]
        futures = client.map(eval, [_DO] * len(keys), [{}] * len(keys), given, key=keys, retries=retry, pure=False)
        named = dict(zip(keys, todo, strict=True))
        with board.live(dashboard=client.dashboard_link, slots=sum(client.nthreads().values())):
            for future in as_completed(futures):
                if future.status in ("cancelled", "lost"):
                    raise OSError(f"{client.scheduler.address}: the scheduler went away; what is done is kept")
                point, error = named[future.key], future.exception()
                if error is None and (lack := missing_summary(out / point.name, sweep.notebook is not None)):
                    error = PointError(f"{lack} (on {out}, seen from here)")
                if error is not None and not isinstance(error, PointError):  # its workers died, or lack the package
                    error = PointError(_why(client, error))
                    write_record(out, order_of(sweep, point), state="failed", last_line=str(error))
                cached = read_json(out / "log" / f"{point.name}.json").get("cached", False)
                board.ended(point.name, None if error is None else _one_line(error), cached=cached)
    states = sweep_states(sweep, out)
    board.end(states)
    return states


def _do(order: dict, *, topic: str, out: str, local: bool, sharing: dict[str, int], version: str) -> None:
    """Make one point, on a worker: a process of its own that ends when the worker does."""
    from distributed import get_worker

    out, worker = Path(out), get_worker()
    if version != __version__:  # of one that joined later
        raise PointError(f"worker {worker.address} has peka_lite {__version__}, not {version}. {_INSTALL}")
    if not (out / "sweep.yml").is_file():
        raise PointError(f"{out} is not to be seen from {worker.address}: give a folder that all workers share")
    try:
        if finished(out, order):  # before its worker died, or by another sweep
            return
    except FileExistsError as error:
        raise PointError(str(error)) from None
    begun, at = time.perf_counter(), time.time()
    worker.log_event(topic, {"point": order["name"], "worker": worker.address})
    environment = dict(os.environ) | _environment(order, worker, local, sharing)
    environment.pop("MALLOC_TRIM_THRESHOLD_", None)  # Dask's own; a run would spend a third of its time on it
    log = out / "log" / f"{order['name']}.txt"
    with log.open("w") as file:
        process = subprocess.Popen(
            [sys.executable, "-m", "peka_lite.sweep_points"], env=environment, text=True, start_new_session=True,
            stdin=subprocess.PIPE, stdout=file, stderr=subprocess.STDOUT,
        )  # fmt: skip
        try:
            with suppress(BrokenPipeError):  # it ended at once: its log says why
                process.stdin.write(json.dumps({"order": order, "out": str(out)}) + "\n")
                process.stdin.flush()
            status = process.wait()
        finally:
            process.kill()
            process.wait()
    seconds = round(time.perf_counter() - begun, 1)
    line = _last_line(log)
    if status < 0:
        line = f"killed by signal {-status}" + (", as when memory runs out" if status == -9 else "")
    elif status == 0:
        line = missing_summary(out / order["name"], order["notebook"] is not None)
    if line is not None:
        write_record(out, order, state="failed", seconds=seconds, last_line=line, host=worker.address)
        raise PointError(line)
    write_record(out, order, state="done", seconds=seconds, host=worker.address, cached=_from_cache(order, since=at))


def _from_cache(order: dict, *, since: float) -> bool:
    """Say whether the cache had every student that a run asked for, so that its time says nothing of another's."""
    from peka_lite.locks import RECORD
    from peka_lite.manifest import cache_dir
    from peka_lite.registry import WITH_STUDENT

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


def _environment(order: dict, worker, local: bool, sharing: dict[str, int]) -> dict[str, str]:
    """Return a point's share of the cores, and for a notebook the modules that lie beside it."""
    from dask.system import CPU_COUNT

    # Workers of one machine share its cores; on a cluster one that sees fewer than all, in a job, has those alone.
    own = worker.state.nthreads
    at_once = sharing.get(_host(worker.address), own) if local or os.cpu_count() == CPU_COUNT else own
    threads = str(max(1, CPU_COUNT // at_once))
    found = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), threads)
    if order["notebook"]:
        paths = [order["notebook"]["folder"], os.environ.get("PYTHONPATH")]
        found["PYTHONPATH"] = os.pathsep.join(path for path in paths if path)
    return found


@contextmanager
def _client(sweep: Sweep, scheduler: str | None, workers: int | None, points: int):
    from distributed import Client

    if scheduler is not None:
        try:
            client = Client(scheduler, timeout=ANSWER_WITHIN)
        except (OSError, ValueError) as error:
            raise OSError(f"{scheduler}: no Dask scheduler answers ({_one_line(error)})") from None
        with client:
            yield client
        return
    import dask
    from distributed import Nanny, Scheduler, SpecCluster

    environments = _local_environments(sweep, workers, points)
    options = {"nthreads": 1, "memory_limit": 0, "dashboard": False, "host": "127.0.0.1", "silence_logs": 50}
    spec = {i: {"cls": Nanny, "options": options | {"env": env}} for i, env in enumerate(environments)}
    head = {"cls": Scheduler, "options": {"host": "127.0.0.1", "dashboard": True, "dashboard_address": _dashboard()}}
    settings = {
        "distributed.scheduler.worker-saturation": 1.0,  # no second point ahead: what is shown as running runs
        "distributed.scheduler.allowed-failures": DEATHS - 1,
        "distributed.deploy.lost-worker-timeout": "1 day",  # a busy machine restarts one later than after 15 s
    }
    with (
        dask.config.set(settings),
        SpecCluster(workers=spec, scheduler=head, silence_logs=50) as cluster,
        Client(cluster) as client,
    ):
        client.wait_for_workers(len(spec))
        yield client


def _local_environments(sweep: Sweep, workers: int | None, points: int) -> list[dict[str, str]]:
    """Return a worker's environment variables for each process that fits cores, memory and GPUs."""
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
    return [{}] * min(workers or max(1, min(CPU_COUNT, int(memory / sweep.memory))), points)


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


def _dashboard() -> str:
    """Return Dask's usual address, or any free port where that is taken."""
    import socket

    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", 8787))
        except OSError:
            return "127.0.0.1:0"
    return "127.0.0.1:8787"


def _write_told(sweep: Sweep, out: Path) -> None:
    (out / "log").mkdir(parents=True, exist_ok=True)
    write_whole(out / "sweep.yml", yaml_text(sweep.told()).encode())
    if sweep.notebook is not None and not (copy := notebook_copy(out, sweep.code)).is_file():
        text = sweep.notebook.read_bytes()
        if code_of(text) != sweep.code:
            raise ValueError(f"{sweep.notebook} was changed while the sweep was read; start it again")
        write_whole(copy, text)


def _last_line(log: Path) -> str:
    lines = [line for line in log.read_text("utf-8", errors="replace").splitlines() if line.strip()]
    return lines[-1].strip() if lines else "it ended without a word"


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
