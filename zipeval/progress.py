"""Progress with an estimate of the time left: a live bar on a terminal, a plain line now and then elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from zipeval import ranks


@contextmanager
def progress(label: str, total: int, every: float = 10.0) -> Iterator[Callable[[int], None]]:
    """Yields a function that reports so many more samples as done; of several ranks only the first tells of its own.

    Args:
        every: seconds between two plain lines.
    """
    if not ranks.first():
        yield lambda count: None
        return
    with _bar(label, total) if sys.stderr.isatty() else _lines(label, total, every) as advance:
        yield advance


@contextmanager
def _bar(label, total):
    from rich import progress as rich
    from rich.console import Console

    columns = (
        rich.TextColumn("{task.description}"),
        rich.BarColumn(),
        rich.MofNCompleteColumn(),
        rich.TimeElapsedColumn(),
        rich.TimeRemainingColumn(),
    )
    with rich.Progress(*columns, console=Console(stderr=True)) as bars:
        task = bars.add_task(label, total=total)
        yield lambda count: bars.advance(task, count)


@contextmanager
def _lines(label, total, every):
    start = last = time.monotonic()
    done = 0

    def advance(count: int) -> None:
        nonlocal done, last
        done += count
        now = time.monotonic()
        if now - last >= every or done == total:
            last = now
            left = (now - start) * (total - done) / done
            print(f"{label}: {done}/{total}, {now - start:.0f} s, {left:.0f} s left", file=sys.stderr, flush=True)

    yield advance
