"""Stop a command on SIGINT, SIGTERM or SIGHUP: once, and not inside a critical section."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator

# Ctrl-C, the end of a cluster job, and a closed terminal or ssh connection (not on Windows).
SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))


class Stopped(KeyboardInterrupt):
    """Report a signal of `SIGNALS`; `number` is its number."""

    def __init__(self, number: int):
        super().__init__(signal.Signals(number).name)
        self.number = number


@contextlib.contextmanager
def exit_on_signals() -> Iterator[None]:
    """Raise `Stopped` on a signal of `SIGNALS`; later signals do not interrupt the clean-up.

    Ignored signals (``nohup``) and other handlers are unchanged, and threads other than the main one change nothing.
    Of several processes of a run, all but the first end at once: they only compute, or wait for the first.
    """
    replaced = {}
    if threading.current_thread() is threading.main_thread() and os.environ.get("RANK", "0") == "0":
        usual = (signal.SIG_DFL, signal.default_int_handler)
        replaced = {number: before for number in SIGNALS if (before := signal.getsignal(number)) in usual}
    try:
        for number in replaced:
            signal.signal(number, _stop)
        yield
    finally:
        for number, before in replaced.items():
            signal.signal(number, before)


@contextlib.contextmanager
def defer_signals() -> Iterator[Callable[[], None]]:
    """Defer signals until the block ends; yields a function that raises a deferred signal earlier.

    An exception in a callback from HDF5 to Python would leave its file in a state that crashes the process later.
    """
    waiting, handlers = [], {}
    if threading.current_thread() is threading.main_thread():  # no other thread runs a handler
        handlers = {number: handler for number in SIGNALS if callable(handler := signal.getsignal(number))}

    def raise_deferred() -> None:
        if waiting:
            number = waiting.pop()
            handlers[number](number, None)

    try:
        for number in handlers:
            signal.signal(number, lambda number, _: waiting.append(number))
        yield raise_deferred
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        raise_deferred()


def _stop(number: int, _) -> None:
    error = sys.exception()
    while error is not None:
        if isinstance(error, Stopped):  # its clean-up is running
            return
        error = error.__context__
    raise Stopped(number)
