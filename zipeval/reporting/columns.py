"""Which benchmarks of a table are shown: `columns=POPE,gqa`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

from zipeval.benchmarks import BENCHMARKS
from zipeval.errors import UsageError, did_you_mean
from zipeval.reporting.remarks import LOWER
from zipeval.tables import Table

NO_AVERAGE = "No average, which is of all {} columns of this table."


def choose(names: Sequence[str], headings: Iterable[str]) -> list[str]:
    """Return the headings that some names mean, in the order of the names.

    Args:
        names: headings as they are printed, or names of tasks. Case does not matter, nor what stands in a heading
            behind the name: `exact_match` means all columns of this metric, whatever their filters.

    Raises:
        UsageError: for a name that means none of the headings.
    """
    headings = list(dict.fromkeys(headings))
    chosen: list[str] = []
    for name in names:
        matching = _matching(name, headings)
        if not matching:
            raise UsageError(f"columns={name}: no such column.{did_you_mean(name, headings)}")
        chosen += matching
    return list(dict.fromkeys(chosen))


def _matching(name: str, headings: list[str]) -> list[str]:
    """Return the headings that a name means, those that it is most exactly."""
    task = BENCHMARKS[name].column if name in BENCHMARKS else name
    word = name.casefold()
    return (
        [heading for heading in headings if heading in (name, task)]
        or [heading for heading in headings if heading.removesuffix(LOWER).casefold() == word]
        or [heading for heading in headings if heading.partition(" (")[0].partition(",")[0].casefold() == word]
    )


def with_columns(tables: list[Table], columns: list[str]) -> list[Table]:
    """Return tables with these columns only, without those that have none of them.

    An average is of all columns of its table, so that it is left out where some are.
    """
    return [_with_columns(table, columns) for table in tables if not {*columns}.isdisjoint(table.columns)]


def _with_columns(table: Table, columns: list[str]) -> Table:
    hidden = [name for name in table.columns if name not in columns]
    rows = []
    for row in table.rows:
        cells = {name: cell for name, cell in row.cells.items() if name not in hidden}
        rows.append(replace(row, cells=cells))
    notes = table.notes
    if hidden:
        has_average = any(row.average is not None for row in rows)
        rows = [replace(row, average=None, average_comparison=None) for row in rows]
        about_hidden = tuple(f" {name}" for name in [*hidden, "average"])
        # A note begins with what it is about: the row and the column.
        notes = [note for note in notes if not note.partition(":")[0].endswith(about_hidden)]
        notes += [NO_AVERAGE.format(len(table.columns))] * has_average
    return replace(table, columns=[name for name in columns if name in table.columns], rows=rows, notes=notes)
