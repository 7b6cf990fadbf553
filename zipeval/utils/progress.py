"""Progress with an estimate of the time left: a live bar on a terminal and in a notebook, else plain lines."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from html import escape

from zipeval.utils import ranks

REDRAW = 0.5  # seconds between two updates of a notebook's bar


@contextmanager
def progress(
    label: str, total: int, every: float = 10.0
) -> Iterator[Callable[[int], None]]:
    """Yields a function that reports so many more samples as done; of several ranks only the first tells of its own.

    Args:
        every: seconds between two plain lines.
    """
    if not ranks.first():
        yield lambda count: None
        return
    with _shown(label, total, every) as advance:
        yield advance


def _shown(label: str, total: int, every: float):
    """Return how progress is shown here."""
    if _in_notebook():
        return _element(label, total)
    return _bar(label, total) if sys.stderr.isatty() else _lines(label, total, every)


def _in_notebook() -> bool:
    """Return whether a Jupyter kernel runs this, whose front end shows HTML."""
    shell = sys.modules.get("IPython")
    running = shell and shell.get_ipython()
    return running is not None and hasattr(running, "kernel")


@contextmanager
def _element(label: str, total: int):
    """A bar of a notebook's own: an element of HTML that is replaced."""
    from IPython.display import HTML, display

    shown = display(HTML(_html(label, 0, total, 0.0)), display_id=True)
    yield _redrawn(
        total,
        REDRAW,
        lambda done, seconds: shown.update(HTML(_html(label, done, total, seconds))),
    )


def _html(label: str, done: int, total: int, seconds: float) -> str:
    """Return a bar with what is done, and how long it took and will take."""
    left = f", {seconds * (total - done) / done:.0f} s left" if 0 < done < total else ""
    bar = f'<progress value="{done}" max="{total}" style="width: 16em"></progress>'
    return f"<div><code>{escape(label)}</code> {bar} {done}/{total}, {seconds:.0f} s{left}</div>"


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
    def show(done: int, seconds: float) -> None:
        left = seconds * (total - done) / done
        print(
            f"{label}: {done}/{total}, {seconds:.0f} s, {left:.0f} s left",
            file=sys.stderr,
            flush=True,
        )

    yield _redrawn(total, every, show)


def _redrawn(
    total: int, every: float, show: Callable[[int, float], None]
) -> Callable[[int], None]:
    """Return what counts samples, and shows their number and the seconds now and then and at the end.

    Args:
        every: seconds between two times.
    """
    start = last = time.monotonic()
    done = 0

    def advance(count: int) -> None:
        nonlocal done, last
        done += count
        now = time.monotonic()
        if now - last >= every or done == total:
            last = now
            show(done, now - start)

    return advance
