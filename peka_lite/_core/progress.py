"""Report long work on stderr: bars in a terminal or a notebook, and elsewhere a plain line every half minute."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress

from peka_lite._core.names import escape_control

EVERY = 30.0  # seconds between two lines

_lock = threading.RLock()
_open: list[Stage] = []  # active stages, outermost first
_lines: tuple[threading.Thread, threading.Event] | None = None  # the printing thread, and the event that ends it


class Stage:
    """Show a part of some work on stderr while it runs.

    Use it as a ``with`` block, or in a ``for`` loop over its items. It costs nothing if no outer stage reports. One
    thread prints for all stages; it ends with the outermost stage that reports, also after an error.

    Parameters
    ----------
    text
        Description of the work, or a function that returns it.
    items
        Items of the ``for`` loop; lines show the number of the current one.
    total, done
        Number of all steps, and of those already done, if `update` counts them.
    unit
        Name of a step, with a leading blank.
    measure
        Function that returns the number of steps done, if nothing counts them.
    reports
        Print a line every `EVERY` seconds, with all inner stages, unless bars are drawn (`draws_bars`). Of several
        processes of a run, only the first prints.
    """

    def __init__(
        self,
        text: str | Callable[[], str],
        items: Iterable | None = None,
        *,
        total: int | None = None,
        done: int = 0,
        unit: str = "",
        measure: Callable[[], int] | None = None,
        reports: bool = False,
    ):
        self.text, self.items, self.unit, self.measure = text, items, unit, measure
        self.total = len(items) if items is not None and total is None and measure is None else total
        self.done = self.before = measure() if measure else done
        self.begun = self.moved = time.monotonic()
        self.reports = reports and os.environ.get("RANK", "0") == "0"

    def __enter__(self) -> Stage:
        self.begun = self.moved = time.monotonic()
        with _lock:
            if self not in _open:
                _open.append(self)
            if self.reports:
                _begin_lines()
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def __iter__(self) -> Iterator:
        with self:
            for item in self.items:
                yield item
                self.update()

    def update(self, steps: int = 1) -> None:
        """Add to the number of steps done."""
        self.done += steps
        self.moved = time.monotonic()

    def close(self) -> None:
        """End the stage, and the lines if no other stage reports."""
        with _lock:
            if self in _open:
                _open.remove(self)
            ended = None if any(stage.reports for stage in _open) else _end_lines()
        if ended is not None and ended is not threading.current_thread():
            ended.join(1)  # no longer: stderr may be a pipe that is not read

    def set_postfix(self, **_) -> None:
        """Do nothing; only a bar shows these."""

    def line(self) -> str:
        """Return the line of this stage: steps done, of how many, and about how long the rest takes."""
        text = self.text() if callable(self.text) else self.text
        if self.total is None:
            return text
        if self.measure:
            self.done, self.moved = self.measure(), time.monotonic()
        at = min(self.done + (self.items is not None and not self.measure), self.total)
        line = f"{text} {at:,} of {self.total:,}{self.unit}"
        if self.done <= self.before:
            return line
        each = (self.moved - self.begun) / (self.done - self.before)
        left = each * (self.total - self.done) - (time.monotonic() - self.moved)
        return f"{line}, about {format_duration(left)} left" if left >= 1 else line


def progress_bar(
    items: Iterable | None = None, *, desc: str, enabled: bool | None, total: int | None = None, **options
):
    """Return tqdm's bar in a terminal or a notebook, elsewhere a reporting `Stage`; for a ``with`` block or a loop.

    Parameters are tqdm's, and `enabled`: True, False (show nothing), or None (a bar only in a terminal, elsewhere a
    stage that appears in the lines of others).
    """
    if enabled is not False and not draws_bars():
        done, unit = options.get("initial", 0), options.get("unit", "")
        return Stage(f"{desc}:", items, total=total, done=done, unit=unit, reports=bool(enabled))
    from tqdm.auto import tqdm

    outer = [f"{stage.text} {stage.done + 1} of {stage.total}" for stage in _open if stage.items is not None]
    disable = _in_notebook() if enabled is None else not enabled  # a widget in a page's output needs the network
    return tqdm(items, total=total, desc=escape_control(", ".join([*outer, desc])), disable=disable, **options)


def print_line(text: str) -> None:
    """Print a line on stderr if a stage reports; ignore a missing or closed stderr."""
    if any(stage.reports for stage in list(_open)):
        with suppress(AttributeError, OSError, ValueError):  # no stderr, a closed pipe, a closed file
            sys.stderr.write(f"{escape_control(text)}\n")
            sys.stderr.flush()


def draws_bars() -> bool:
    """Return whether stderr can show a bar: in a terminal or a notebook."""
    try:
        return sys.stderr.isatty() or _in_notebook()
    except (AttributeError, ValueError):  # no stderr, or a closed file
        return False


def _in_notebook() -> bool:
    return type(sys.stderr).__module__.startswith("ipykernel")


def format_duration(seconds: float) -> str:
    """Return a duration as text."""
    seconds = round(seconds)
    if seconds < 60:
        return f"{seconds} s"
    if seconds < 3600:
        return f"{seconds // 60} min {seconds % 60} s"
    return f"{seconds // 3600} h {seconds % 3600 // 60} min"


def _begin_lines() -> None:
    global _lines
    if _lines is None and not draws_bars():
        stop = threading.Event()
        _lines = threading.Thread(target=_print_lines, args=(stop,), name="progress", daemon=True), stop
        _lines[0].start()


def _end_lines() -> threading.Thread | None:
    global _lines
    if _lines is None:
        return None
    thread, stop = _lines
    _lines = None
    stop.set()
    return thread


def _print_lines(stop: threading.Event) -> None:
    while not stop.wait(EVERY):
        if stages := list(_open):  # without the lock, which a process forked now would hold forever
            line = "; ".join(part for stage in stages if (part := stage.line()))
            print_line(f"[{format_duration(time.monotonic() - stages[0].begun)}] {line or 'at work'}")
