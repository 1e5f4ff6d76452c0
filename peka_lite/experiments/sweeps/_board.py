"""Show a sweep's progress: a live table in a terminal, else one line per point."""

from __future__ import annotations

import sys
import threading
import time
from contextlib import ExitStack, contextmanager

import pandas as pd
from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from peka_lite._core.names import escape_control
from peka_lite._core.progress import format_duration, stage
from peka_lite.experiments.sweeps.points import (
    STATES,
    describe_outdated,
    estimate_seconds,
    get_measured_seconds,
    group_similar,
)
from peka_lite.experiments.sweeps.read import Sweep


class Board:
    """Track running, done and failed points, and the time left.

    Parameters
    ----------
    sweep
        The sweep to run.
    states
        `sweep_states` at the start.
    """

    def __init__(self, sweep: Sweep, states: pd.DataFrame):
        # A notebook's stream may report to be a terminal but cannot move a cursor.
        terminal = sys.stdout is sys.__stdout__ and sys.stdout.isatty()
        self.console = Console(highlight=False, force_jupyter=False, force_terminal=terminal)
        self.sweep = sweep
        self.groups, self.seconds = group_similar(sweep), get_measured_seconds(states)
        self.waiting = [name for name, state in states["state"].items() if state != "done"]
        self.done = len(states) - len(self.waiting)
        self.running: dict[str, tuple[float, str]] = {}  # start, worker
        self.failed: dict[str, str] = {}
        self.failed_after: dict[str, float] = {}
        self.slots = 1
        self._lock = threading.RLock()  # shared by the threads of cluster events, the sweep and the live table

    def start(self) -> None:
        """Print the numbers of points to run and done before."""
        message = f"{self.sweep.title}: {len(self.waiting)} to run, {self.done} done before"
        if self.sweep.notebook is not None:
            message += f"; each runs the code of {self.sweep.notebook}"
        self._print(message)

    def event(self, event: dict) -> None:
        """Record that a worker started a point, for the first time or again after a failure."""
        with self._lock:
            name = event["point"]
            if name in self.waiting:
                self.waiting.remove(name)
            elif name not in self.running:  # it has ended meanwhile
                return
            self.running[name] = time.monotonic(), event["worker"]
            self.slots = max(self.slots, len(self.running))  # workers may have joined

    def ended(self, name: str, error: str | None, *, cached: bool = False) -> None:
        """Record that a point is done, with all students from the cache if `cached`, or failed with `error`."""
        with self._lock:
            begun = name in self.running  # False if another sweep made the point
            since, _ = self.running.pop(name, (time.monotonic(), ""))
            if name in self.waiting:
                self.waiting.remove(name)
            seconds = time.monotonic() - since
            if error is None:
                self.done += 1
                if begun and not cached:
                    self.seconds[name] = seconds
            else:
                self.failed[name], self.failed_after[name] = error, seconds
        if not self.console.is_terminal:
            count = f"[{self.done + len(self.failed)}/{len(self.sweep.points)}]"
            result = f"done in {format_duration(seconds)}" if error is None else f"failed: {error}"
            self._print(f"{count} {name} {result}; {self.describe_time_left()} left")

    def describe_time_left(self) -> str:
        """Return the time left, estimated from similar points."""
        with self._lock:
            now, seconds = time.monotonic(), estimate_seconds(self.groups, self.seconds)
            rest = {name: seconds.get(name) for name in self.waiting}
            for name, (begun, _) in self.running.items():  # unknown for a point that exceeds its estimate
                rest[name] = seconds[name] - (now - begun) if seconds.get(name, 0) > now - begun else None
            known = [s for s in rest.values() if s is not None]
            slots = max(1, min(self.slots, len(rest)))
            least = max(sum(known) / slots, max(known, default=0))
            if len(known) == len(rest):
                return format_duration(least)
            return f"more than {format_duration(least)}" if least >= 1 else "an unknown time"

    @contextmanager
    def live(self, *, slots: int, dashboard: str | None = None):
        """Show progress until the block ends; `dashboard` is the address of the cluster's dashboard."""
        self.slots = max(self.slots, slots)
        self._print(f"{slots} at once" + (f"; Dask's dashboard: {dashboard}" if dashboard else ""))
        with ExitStack() as stack:
            stack.enter_context(stage(self._summarize))
            if self.console.is_terminal:
                options = {"refresh_per_second": 2, "get_renderable": self._table, "transient": True}
                stack.enter_context(Live(console=self.console, **options))
            yield

    def end(self, states: pd.DataFrame) -> None:
        """Print the number of points in each state, and the last log line of every failed point."""
        counts = states["state"].value_counts()
        totals = ", ".join(f"{counts[state]} {state}" for state in STATES if state in counts)
        self._print(f"{self.sweep.name}: {totals}")
        if states["older"].any():
            self._print(describe_outdated(states))
        for name, row in states[states["state"] == "failed"].iterrows():
            self._print(f"  failed  {name}: {row['last_line']}")

    def _print(self, text: str) -> None:
        self.console.print(escape_control(text), markup=False, soft_wrap=True)

    def _summarize(self) -> str:
        with self._lock:
            return (
                f"{self.done} of {len(self.sweep.points)} done, {len(self.running)} running, "
                f"{len(self.failed)} failed, {len(self.waiting)} waiting, {self.describe_time_left()} left"
            )

    def _table(self) -> Group:
        with self._lock:
            running, failed, head = list(self.running.items()), list(self.failed.items()), self._summarize()
        table, now = Table(box=None), time.monotonic()
        for column in ("state", "point", "time", "where"):
            table.add_column(column)
        for name, (since, worker) in running[: max(1, self.console.height - 9)]:
            table.add_row(
                "running", Text(escape_control(name)), format_duration(now - since), Text(escape_control(worker))
            )
        for name, error in failed[-5:]:
            table.add_row(
                "failed",
                Text(escape_control(name)),
                format_duration(self.failed_after[name]),
                Text(escape_control(error)),
            )
        return Group(Text(head), table)
