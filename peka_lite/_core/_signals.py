"""Signals that end a command: like Ctrl-C, once, and never in the middle of what must not be broken off."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator

# Ctrl-C, the end of a cluster's job, and a terminal or an ssh connection that closed (which Windows does not have).
SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))


class Stopped(KeyboardInterrupt):
    """A signal of `SIGNALS` came; `number` is its number."""

    def __init__(self, number: int):
        super().__init__(signal.Signals(number).name)
        self.number = number


@contextlib.contextmanager
def exit_on_signals() -> Iterator[None]:
    """Raise `Stopped` inside where a signal of `SIGNALS` comes; further ones leave the clean-up after it alone.

    What is ignored (``nohup``) or handled by somebody else stays so, and a thread that is not the main one changes
    nothing. Of several processes of one run those after the first, which only wait for it or compute, end at once.
    """
    mine = {}
    if threading.current_thread() is threading.main_thread() and os.environ.get("RANK", "0") == "0":
        usual = (signal.SIG_DFL, signal.default_int_handler)
        mine = {number: before for number in SIGNALS if (before := signal.getsignal(number)) in usual}
    try:
        for number in mine:
            signal.signal(number, _stop)
        yield
    finally:
        for number, before in mine.items():
            signal.signal(number, before)


@contextlib.contextmanager
def defer_signals() -> Iterator[Callable[[], None]]:
    """Keep signals that would raise an exception until the block ends; gives a function that raises one earlier.

    An exception inside a call from HDF5 back to Python would leave its file in a state that ends the process later.
    """
    waiting, handlers = [], {}
    if threading.current_thread() is threading.main_thread():  # no other thread runs a handler
        handlers = {number: handler for number in SIGNALS if callable(handler := signal.getsignal(number))}

    def let_through() -> None:
        if waiting:
            number = waiting.pop()
            handlers[number](number, None)

    try:
        for number in handlers:
            signal.signal(number, lambda number, _: waiting.append(number))
        yield let_through
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        let_through()


def _stop(number: int, _) -> None:
    error = sys.exception()
    while error is not None:
        if isinstance(error, Stopped):  # its clean-up is under way
            return
        error = error.__context__
    raise Stopped(number)
