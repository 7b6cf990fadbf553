"""Tables on a terminal: as Markdown where that fits, else in a narrow form like the papers' two-line cells."""

from __future__ import annotations

import shutil
import sys
from dataclasses import dataclass, replace
from itertools import chain
from typing import TextIO

from rich.console import Console
from rich.table import Table as RichTable
from rich.text import Text

from zipeval.reporting.render import grid_lines, render
from zipeval.reporting.table_text import (
    MEASURES,
    TWO_LINES,
    explanations,
    has_average,
    measures,
    sections,
    stacked,
    texts,
    words,
)
from zipeval.reporting.tables import Table

GAP = 1  # blanks between columns
LEAST_LABEL = (
    8  # a label's column is at least as wide as this, and longer words are broken
)
DROPPED = "Not shown for lack of width: {}.{} `zipeval table columns=A,B` chooses benchmarks, out=FILE.csv has all of it."
OF_ALL = " The average is of all benchmarks."


def print_tables(tables: list[Table], form: str | None = None) -> None:
    """Print tables on standard output.

    Args:
        form: one of the FORMATS of zipeval/reporting/render.py; None: Markdown, or on a terminal that is too narrow
            for it the narrow form.
    """
    if form is not None or not sys.stdout.isatty():
        print(render(tables, form or "markdown"))
        return
    width = shutil.get_terminal_size().columns
    for number, table in enumerate(tables):
        if number:
            print()
        if max(map(len, grid_lines(table))) <= width:
            print(render([table]))
        else:
            print_narrow(table, width, sys.stdout)


def print_narrow(table: Table, width: int, file: TextIO) -> None:
    """Print a table with scores and percentages on two lines, and budgets as sections.

    What does not fit is named in a note: first measures are left out, then benchmarks, each from the right.

    Args:
        width: of the lines, in characters. They are longer only where not even one column of numbers fits.
    """
    layout = _fitting(table, width)
    console = Console(file=file, width=max(width, layout.width), highlight=False)
    console.print(Text(table.about), width=width)
    console.print()
    console.print(layout.head())
    # Each section is a table of its own with the same widths, as rich has no cells over several columns.
    lines = iter(layout.lines)
    for section in sections(layout.table):
        console.print(Text(section.title, style="bold"), width=width)
        console.print(layout.body([next(lines) for _ in section.rows]))
    console.print()
    legend = " ".join(explanations(layout.table, TWO_LINES))
    for note in filter(None, [legend, layout.dropped_note, *table.notes]):
        console.print(Text(note), width=width)


@dataclass(frozen=True)
class _Layout:
    """A table whose columns have a place on a terminal.

    Attributes:
        table: what is shown of the table.
        dropped: headings of the columns that are not shown.
        headings: the headings of the columns, each on one or more lines.
        lines: for each row its cells, each of one or more lines of text. The first cell is the label.
        widths: of the columns.
    """

    table: Table
    dropped: list[str]
    headings: list[list[str]]
    lines: list[list[list[str]]]
    widths: list[int]

    @property
    def width(self) -> int:
        """Return the length of a line."""
        return sum(self.widths) + GAP * (len(self.widths) - 1)

    @property
    def dropped_note(self) -> str:
        """Return what is said of the columns that are not shown; nothing where all are."""
        if not self.dropped:
            return ""
        # Without some benchmarks, a reader may take the average for that of those which are shown.
        is_partial = has_average(self.table) and not {*self.dropped} <= {*MEASURES}
        return DROPPED.format(", ".join(self.dropped), OF_ALL if is_partial else "")

    def head(self) -> RichTable:
        """Return the line of headings."""
        head = self.body([])
        for column, heading in zip(head.columns, self.headings, strict=True):
            # Of headings with several lines, the last ones stand on one line.
            column.header = Text("\n".join(heading), style="bold")
        head.show_header = True
        return head

    def body(self, rows: list[list[list[str]]]) -> RichTable:
        """Return some rows, as wide as all others."""
        body = RichTable(
            box=None, show_header=False, pad_edge=False, padding=(0, GAP, 0, 0)
        )
        for number, width in enumerate(self.widths):
            body.add_column(
                justify="right" if number else "left", width=width, no_wrap=True
            )
        for cells in rows:
            body.add_row(*(Text("\n".join(cell)) for cell in cells))
        return body


def _fitting(table: Table, width: int) -> _Layout:
    """Return the layout with the most columns that fits, or the smallest one where none does."""
    whole = _layout(table, [], width, interval_below=False)
    if whole.width <= width:
        return whole
    # Intervals on a line of their own leave room for more benchmarks.
    dropped: list[str] = []
    layout = _layout(table, dropped, width, interval_below=True)
    for name in _by_dispensability(table):
        if layout.width <= width:
            break
        dropped.append(name)
        layout = _layout(table, dropped, width, interval_below=True)
    return layout


def _by_dispensability(table: Table) -> list[str]:
    """Return the columns in the order in which they are left out: never the average, nor the only number."""
    benchmarks = table.columns if has_average(table) else table.columns[1:]
    return [*reversed(measures(table)), *reversed(benchmarks)]


def _layout(
    table: Table, dropped: list[str], width: int, interval_below: bool
) -> _Layout:
    """Return a layout without some columns; its labels are as wide as there is room, and folded where there is none."""
    shown = _without(table, dropped)
    headings, cells_by_column, widths = [["method"]], [], []
    for name, text in texts(shown).items():
        cells = [text(row).lines(interval_below) for row in shown.rows]
        title = "avg." if name == "average" else name
        # A heading is broken between its words, so that its column is no wider than its numbers.
        lengths = map(
            len, [*chain.from_iterable(cells), *map(str.rstrip, words(title))]
        )
        widths.append(max(lengths))
        headings.append(stacked(title, widths[-1]))
        cells_by_column.append(cells)
    available = width - sum(widths) - GAP * len(widths)
    label_width = _label_width([row.label for row in shown.rows], available, width)
    labels = [stacked(row.label, label_width) for row in shown.rows]
    lines = [list(cells) for cells in zip(labels, *cells_by_column, strict=True)]
    # The note names columns in the order of the table.
    in_order = [name for name in [*MEASURES, *table.columns] if name in dropped]
    return _Layout(shown, in_order, headings, lines, [label_width, *widths])


def _without(table: Table, dropped: list[str]) -> Table:
    """Return a table without some measures and benchmarks. Its average stays what it is, of all benchmarks."""
    nothing = dict.fromkeys({*MEASURES} & {*dropped})
    rows = [replace(row, **nothing) for row in table.rows]
    return replace(
        table,
        rows=rows,
        columns=[name for name in table.columns if name not in dropped],
    )


def _label_width(labels: list[str], left: int, width: int) -> int:
    """Return the width of the first column: what is left, as far as the labels need it and not less than their words.

    Args:
        left: what the numbers leave of a line.
        width: of a line; a word that takes more than a quarter of it is broken.
    """
    natural = max(map(len, [*labels, "method"]))
    longest_word = max(map(len, chain.from_iterable(map(words, labels))))
    least = max(LEAST_LABEL, min(longest_word, width // 4))
    return max(min(left, natural), min(least, natural))
