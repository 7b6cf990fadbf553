"""Progress with an estimate of the time left: a live bar on a terminal and in a notebook, else plain lines."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from html import escape

from zipeval.utils import ranks

# Seconds between two updates of a notebook's bar.
REDRAW = 0.5


@contextmanager
def progress(
    label: str, total: int, every: float = 10.0
) -> Iterator[Callable[[int], None]]:
    """Yield a function that reports so many more samples as done; of several ranks only the first tells of its own.

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
    """Show a bar of a notebook's own: an element of HTML that is replaced."""
    from IPython.display import HTML, display

    shown = display(HTML(_html(label, 0, total, 0.0)), display_id=True)
    yield _redrawn(
        total,
        REDRAW,
        lambda done, seconds: shown.update(HTML(_html(label, done, total, seconds))),
    )


def _html(label: str, done: int, total: int, seconds: float) -> str:
    """Return a bar with what is done, and how long it took and will take."""
    # Before the first sample nothing tells how long one takes.
    remaining = ""
    if 0 < done < total:
        remaining = f", {seconds * (total - done) / done:.0f} s left"
    bar = f'<progress value="{done}" max="{total}" style="width: 16em"></progress>'
    return f"<div><code>{escape(label)}</code> {bar} {done}/{total}, {seconds:.0f} s{remaining}</div>"


@contextmanager
def _bar(label, total):
    """Show a live bar on a terminal."""
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
    """Print plain lines, for log files."""

    def show(done: int, seconds: float) -> None:
        # At an even pace, the rest takes as long for each sample.
        remaining = seconds * (total - done) / done
        print(
            f"{label}: {done}/{total}, {seconds:.0f} s, {remaining:.0f} s left",
            file=sys.stderr,
            flush=True,
        )

    yield _redrawn(total, every, show)


def _redrawn(
    total: int, every: float, show: Callable[[int, float], None]
) -> Callable[[int], None]:
    """Return a function that counts samples, and shows their number and the seconds now and then and at the end.

    Args:
        every: seconds between two times.
    """
    start = last = time.monotonic()
    done = 0

    def advance(count: int) -> None:
        nonlocal done, last
        done += count
        moment = time.monotonic()
        # The end is shown, however soon it comes.
        if moment - last >= every or done == total:
            last = moment
            show(done, moment - start)

    return advance
