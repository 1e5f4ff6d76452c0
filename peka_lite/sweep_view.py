"""What a sweep shows while it runs: a live table in a terminal, a line a point elsewhere."""

from __future__ import annotations

import time
from contextlib import contextmanager

import pandas as pd
from rich.console import Console
from rich.live import Live
from rich.table import Table

from peka_lite.sweep import Sweep
from peka_lite.sweep_points import STATES, clock


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
        self.console = Console(highlight=False, force_jupyter=False)
        self.sweep = sweep
        self.took = {name: s for name, s in states["seconds"].items() if s == s}  # NaN: never tried
        self.waiting = [name for name, state in states["state"].items() if state != "done"]
        self.done = len(states) - len(self.waiting)
        self.running: dict[str, tuple[float, str]] = {}  # since when, on which worker
        self.failed: dict[str, str] = {}
        self.slots = 1

    def event(self, told: dict) -> None:
        """Take note that a worker began a point; a second time, where the first worker died or the point is retried."""
        name = told["point"]
        if name in self.waiting:
            self.waiting.remove(name)
        self.running[name] = time.monotonic(), told["worker"]

    def ended(self, name: str, error: str | None) -> None:
        """Take note that a point is done, or failed with `error`."""
        since, _ = self.running.pop(name, (time.monotonic(), ""))
        if name in self.waiting:
            self.waiting.remove(name)
        seconds = self.took[name] = time.monotonic() - since
        if error is None:
            self.done += 1
        else:
            self.failed[name] = error
        if not self.console.is_terminal:
            count = f"[{self.done + len(self.failed)}/{len(self.sweep.points)}]"
            word = f"done in {clock(seconds)}" if error is None else f"failed: {error}"
            self.console.print(f"{count} {name} {word}; {self.left()} left", markup=False, soft_wrap=True)

    def left(self) -> str:
        """Return the time left, from what points took before and have taken now; a question mark where none has."""
        if not self.took:
            return "?"
        mean = sum(self.took.values()) / len(self.took)
        now = time.monotonic()
        rest = sum(self.took.get(name, mean) for name in self.waiting)
        rest += sum(max(0.0, self.took.get(name, mean) - (now - since)) for name, (since, _) in self.running.items())
        return clock(rest / max(1, min(self.slots, len(self.waiting) + len(self.running))))

    @contextmanager
    def live(self, *, dashboard: str, slots: int):
        """Show progress until the block ends."""
        self.slots = slots
        n = len(self.waiting)
        self.console.print(
            f"{self.sweep.title}: {n} to run, {slots} at once, {self.done} done before\nDask's dashboard: {dashboard}",
            markup=False, soft_wrap=True,
        )  # fmt: skip
        if not self.console.is_terminal:
            yield
            return
        with Live(console=self.console, refresh_per_second=2, get_renderable=self._table, transient=True):
            yield

    def end(self, states: pd.DataFrame) -> None:
        """Say what came of it, with the last line of every point that failed."""
        counts = states["state"].value_counts()
        told = ", ".join(f"{counts[state]} {state}" for state in STATES if state in counts)
        self.console.print(f"{self.sweep.name}: {told}", markup=False)
        for name, row in states[states["state"] == "failed"].iterrows():
            self.console.print(f"  failed  {name}: {row['last_line']}", markup=False, soft_wrap=True)

    def _table(self) -> Table:
        total, failed = len(self.sweep.points), len(self.failed)
        table = Table(
            title=f"{self.sweep.name}: {self.done} of {total} done, {len(self.running)} running, {failed} failed, "
            f"{len(self.waiting)} waiting, {self.left()} left",
            title_justify="left", box=None,
        )  # fmt: skip
        for column in ("state", "point", "time", "where"):
            table.add_column(column)
        now = time.monotonic()
        for name, (since, worker) in list(self.running.items())[: self.console.height - 8]:
            table.add_row("running", name, clock(now - since), worker)
        for name, error in list(self.failed.items())[-5:]:
            table.add_row("failed", name, clock(self.took[name]), error)
        return table
