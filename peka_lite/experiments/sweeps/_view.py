"""What a sweep shows while it runs: a live table in a terminal, a line a point elsewhere."""

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
from peka_lite._core.progress import Stage, format_duration
from peka_lite.experiments.sweeps.points import (
    STATES,
    describe_outdated,
    expected_seconds,
    group_alike,
    measured_seconds,
)
from peka_lite.experiments.sweeps.read import Sweep


class Board:
    """Running, done and failed points, and the time left.

    Parameters
    ----------
    sweep
        What runs.
    states
        `sweep_states` at the start: what is done already, and how long points took before.
    """

    def __init__(self, sweep: Sweep, states: pd.DataFrame):
        # A notebook's stream may call itself a terminal, and cannot move a cursor.
        terminal = sys.stdout is sys.__stdout__ and sys.stdout.isatty()
        self.console = Console(highlight=False, force_jupyter=False, force_terminal=terminal)
        self.sweep = sweep
        self.kinds, self.took = group_alike(sweep), measured_seconds(states)
        self.waiting = [name for name, state in states["state"].items() if state != "done"]
        self.done = len(states) - len(self.waiting)
        self.running: dict[str, tuple[float, str]] = {}  # since when, on which worker
        self.failed: dict[str, str] = {}
        self.failed_after: dict[str, float] = {}
        self.slots = 1
        self._lock = threading.RLock()  # a cluster's events, the sweep and the live table come from three threads

    def start(self) -> None:
        """Say what is to come."""
        told = f"{self.sweep.title}: {len(self.waiting)} to run, {self.done} done before"
        if self.sweep.notebook is not None:
            told += f"; each runs the code of {self.sweep.notebook}"
        self._print(told)

    def event(self, told: dict) -> None:
        """Take note that a worker began a point; a second time, where the first worker died or the point is retried."""
        with self._lock:
            name = told["point"]
            if name in self.waiting:
                self.waiting.remove(name)
            elif name not in self.running:  # it has ended meanwhile
                return
            self.running[name] = time.monotonic(), told["worker"]
            self.slots = max(self.slots, len(self.running))  # workers that came later

    def ended(self, name: str, error: str | None, *, cached: bool = False) -> None:
        """Take note that a point is done, its students perhaps `cached`, or failed with `error`."""
        with self._lock:
            begun = name in self.running  # not where another sweep has made it
            since, _ = self.running.pop(name, (time.monotonic(), ""))
            if name in self.waiting:
                self.waiting.remove(name)
            seconds = time.monotonic() - since
            if error is None:
                self.done += 1
                if begun and not cached:
                    self.took[name] = seconds
            else:
                self.failed[name], self.failed_after[name] = error, seconds
        if not self.console.is_terminal:
            count = f"[{self.done + len(self.failed)}/{len(self.sweep.points)}]"
            word = f"done in {format_duration(seconds)}" if error is None else f"failed: {error}"
            self._print(f"{count} {name} {word}; {self.left()} left")

    def left(self) -> str:
        """Return the time left, as far as points took as long before that are alike; what is not known is said."""
        with self._lock:
            now, seconds = time.monotonic(), expected_seconds(self.kinds, self.took)
            rest = {name: seconds.get(name) for name in self.waiting}
            for name, (begun, _) in self.running.items():  # longer than expected: nobody knows how long
                rest[name] = seconds[name] - (now - begun) if seconds.get(name, 0) > now - begun else None
            known = [s for s in rest.values() if s is not None]
            slots = max(1, min(self.slots, len(rest)))
            least = max(sum(known) / slots, max(known, default=0))
            if len(known) == len(rest):
                return format_duration(least)
            return f"more than {format_duration(least)}" if least >= 1 else "an unknown time"

    @contextmanager
    def live(self, *, slots: int, dashboard: str | None = None):
        """Show progress until the block ends; `dashboard` is the address of a cluster's."""
        self.slots = max(self.slots, slots)
        told = f"{slots} at once" + (f"; Dask's dashboard: {dashboard}" if dashboard else "")
        self._print(told)
        with ExitStack() as stack:
            stack.enter_context(Stage(self._head, reports=True))
            if self.console.is_terminal:
                options = {"refresh_per_second": 2, "get_renderable": self._table, "transient": True}
                stack.enter_context(Live(console=self.console, **options))
            yield

    def end(self, states: pd.DataFrame) -> None:
        """Say what came of it, with the last line of every point that failed."""
        counts = states["state"].value_counts()
        told = ", ".join(f"{counts[state]} {state}" for state in STATES if state in counts)
        self._print(f"{self.sweep.name}: {told}")
        if states["older"].any():
            self._print(describe_outdated(states))
        for name, row in states[states["state"] == "failed"].iterrows():
            self._print(f"  failed  {name}: {row['last_line']}")

    def _print(self, text: str) -> None:
        self.console.print(escape_control(text), markup=False, soft_wrap=True)

    def _head(self) -> str:
        with self._lock:
            return (
                f"{self.done} of {len(self.sweep.points)} done, {len(self.running)} running, "
                f"{len(self.failed)} failed, {len(self.waiting)} waiting, {self.left()} left"
            )

    def _table(self) -> Group:
        with self._lock:
            running, failed, head = list(self.running.items()), list(self.failed.items()), self._head()
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
