"""Ctrl-C, and a scheduler's SIGTERM: the first ends a run behind the batch at hand, the second at once."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

# A scheduler's own, as submitit's, stay: they know whether a job is to be queued again.
DEFAULTS = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL}


@contextmanager
def stoppable() -> Iterator[Callable[[], bool]]:
    """Let the first signal not interrupt the block; yield a function that tells whether one has come.

    Raises:
        KeyboardInterrupt: at the second.
    """
    came = []

    def on_signal(number, frame):
        if came:
            raise KeyboardInterrupt
        came.append(number)
        print(
            "zipeval: stopping behind this batch; once more stops at once.",
            file=sys.stderr,
            flush=True,
        )

    # Python lets no other thread set handlers.
    is_main = threading.current_thread() is threading.main_thread()
    taken = []
    for number, default in DEFAULTS.items():
        if is_main and signal.getsignal(number) == default:
            signal.signal(number, on_signal)
            taken.append(number)
    try:
        yield lambda: bool(came)
    finally:
        for number in taken:
            signal.signal(number, DEFAULTS[number])
