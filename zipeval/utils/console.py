"""Tables on a terminal: coloured and folded there, elsewhere plain lines that are never folded."""

from __future__ import annotations

import sys
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

NOTHING = "-"


def console() -> Console:
    """Return a console on standard output."""
    return Console(width=None if sys.stdout.isatty() else 10_000, highlight=False)


def table(*headings: str, left: tuple[str, ...]) -> Table:
    """Return a table without rows.

    Args:
        left: headings of columns that hold text; the others hold numbers.
    """
    grid = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for heading in headings:
        grid.add_column(
            heading, justify="left" if heading in left else "right", overflow="fold"
        )
    return grid


def add(rows: Table, *cells: Any) -> None:
    """Add a row. What is in a file is text, not rich's markup: `[red]` stays as it is."""
    rows.add_row(*(Text(NOTHING if cell is None else str(cell)) for cell in cells))
