"""Report long work: messages and stages through the `peka_lite` logger, and tqdm's bars.

A command shows the messages on stderr (`show_messages`); in Python they reach the handlers of `logging`. Bars are drawn
in a terminal or a notebook. Elsewhere a line is logged every half minute, with all that is in progress.
"""

from __future__ import annotations

import io
import logging
import os
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager

from tqdm import tqdm

from peka_lite._core.names import escape_control

EVERY = 30.0  # seconds between two lines
LINE = "{desc}: {n_fmt} of {total_fmt}{unit}{postfix}, {elapsed} so far, {remaining} left"

logger = logging.getLogger("peka_lite")
logger.addHandler(logging.NullHandler())
_open: list[str | Callable[[], str]] = []  # texts of what is in progress, outermost first


@contextmanager
def show_messages() -> Iterator[None]:
    """Print the library's messages on stderr until the block ends; of several processes only the first prints."""
    handler, level = logging.StreamHandler(sys.stderr), logger.level
    handler.format = lambda record: escape_control(record.getMessage())
    handler.handleError = lambda record: None  # no stderr, a closed pipe, a closed file
    if os.environ.get("RANK", "0") == "0":
        logger.addHandler(handler)
        logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)


@contextmanager
def stage(text: str | Callable[[], str]) -> Iterator[None]:
    """Name what the block does; the outermost block logs all names in progress every `EVERY` seconds."""
    ended, begun = threading.Event(), time.monotonic()

    def report() -> None:
        while not ended.wait(EVERY):
            line = "; ".join(part() if callable(part) else part for part in list(_open))
            logger.info(f"[{format_duration(time.monotonic() - begun)}] {line}")

    if not _open and logger.isEnabledFor(logging.INFO) and not draws_bars():
        threading.Thread(target=report, name="progress", daemon=True).start()
    _open.append(text)
    try:
        yield
    finally:
        ended.set()
        _open.remove(text)


def steps(text: str, items: Sequence) -> Iterator:
    """Yield the items, in a `stage` that counts them."""
    at = 0
    with stage(lambda: f"{text} {at:,} of {len(items):,}"):
        for at, item in enumerate(items, 1):  # noqa: B007 - read by the stage
            yield item


def progress_bar(items: Iterable | None = None, *, desc: str, enabled: bool | None, **options):
    """Return tqdm's bar for a ``with`` block or a loop; without a terminal or a notebook it is logged as a `stage`.

    Parameters are tqdm's, and `enabled`: True, False (show nothing), or None (a bar only in a terminal).
    """
    if enabled is False or draws_bars():
        from tqdm.auto import tqdm

        outer = [part() for part in _open if callable(part)]  # loops around this one
        disable = _in_notebook() if enabled is None else not enabled  # a widget in a page's output needs the network
        return tqdm(items, desc=escape_control(", ".join([*outer, desc])), disable=disable, **options)
    return _LoggedBar(items, desc=desc, **options)


class _LoggedBar(tqdm):
    def __init__(self, *args, **options):
        options |= {"file": io.StringIO(), "bar_format": LINE, "mininterval": 0, "miniters": 1}  # 0, 1: count each step
        super().__init__(*args, **options)
        self.stage = stage(self.__str__)
        self.stage.__enter__()

    def display(self, *_, **__) -> None:
        """Draw nothing."""

    def close(self) -> None:
        if not self.disable:
            super().close()
            self.stage.__exit__(None, None, None)


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
    minutes, seconds = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {seconds} s" if minutes else f"{seconds} s"
    return f"{minutes // 60} h {minutes % 60} min"
