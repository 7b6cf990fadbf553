"""Choose which benchmarks of a table are shown: `columns=POPE,gqa`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import chain
from typing import Any

from zipeval.benchmarks import BENCHMARKS
from zipeval.errors import UsageError, did_you_mean
from zipeval.reporting.remarks import LOWER
from zipeval.reporting.table_text import has_average
from zipeval.reporting.tables import Table, headings, tables

# Headings of the benchmarks, by task.
KNOWN = {task: benchmark.column for task, benchmark in BENCHMARKS.items()}
NO_AVERAGE = "No average, which is of all {} columns of this table."


def choose(names: Sequence[str], headings: Iterable[str]) -> list[str]:
    """Return the headings that some names mean, in the order of the names.

    Args:
        names: headings as they are printed, or names of tasks. Case does not matter, nor what stands in a heading
            behind the name: `exact_match` means all columns of this metric, whatever their filters.
        headings: the headings that there are.

    Raises:
        UsageError: for a name that means none of the headings.
    """
    headings = list(dict.fromkeys(headings))
    names = [names] if isinstance(names, str) else names
    chosen: list[str] = []
    for name in names:
        matching = _matching(name, headings)
        if not matching:
            suggestion = did_you_mean(name, headings)
            raise UsageError(f"columns={name}: no such column.{suggestion}")
        chosen += matching
    return list(dict.fromkeys(chosen))


def _matching(name: str, headings: list[str]) -> list[str]:
    """Return the headings that match a name most exactly."""
    wanted = KNOWN.get(name, name)
    # `GQA` is the column of this name, even where there is `GQA (turns)` too: so exact
    # names come first.
    for simplify in (str, _without_case, _without_ending):
        simple = simplify(wanted)
        matching = [heading for heading in headings if simplify(heading) == simple]
        if matching:
            return matching
    return []


def _without_case(heading: str) -> str:
    return heading.removesuffix(LOWER).casefold()


def _without_ending(heading: str) -> str:
    """Return a heading without the metric or the filter behind its name.

    All of the heading of a known benchmark is its name.
    """
    name = heading
    if heading not in KNOWN.values():
        name = heading.partition(" (")[0].partition(",")[0]
    return name.casefold()


def with_columns(tables: list[Table], columns: list[str]) -> list[Table]:
    """Return tables with these columns only, without those that have none of them.

    An average is of all columns of its table, so that it is left out where some are.
    """
    narrow = []
    for table in tables:
        shown = [name for name in columns if name in table.columns]
        if shown:
            narrow.append(_with_columns(table, shown))
    return narrow


def _with_columns(table: Table, shown: list[str]) -> Table:
    """Return a table with some of its columns, in this order."""
    hidden = {*table.columns} - {*shown}
    if not hidden:
        return replace(table, columns=shown)
    rows = []
    for row in table.rows:
        cells = {name: row.cells[name] for name in shown if name in row.cells}
        # An average of fewer columns would be another number than the one that a paper
        # printed.
        rows.append(replace(row, cells=cells, average=None, average_comparison=None))
    # A note begins with its subject: the row and the column.
    endings = tuple(f" {name}" for name in (*hidden, "average"))
    notes = []
    for note in table.notes:
        subject = note.partition(":")[0]
        if not subject.endswith(endings):
            notes.append(note)
    if has_average(table):
        notes.append(NO_AVERAGE.format(len(table.columns)))
    return replace(table, columns=shown, rows=rows, notes=notes)


def chosen_tables(
    results: str,
    columns: Sequence[str] | None = None,
    task: str | None = None,
    **options: Any,
) -> list[Table]:
    """Return the tables of a directory of records, with the columns that are asked for.

    Args:
        results: directory of runs.
        columns: headings or names of tasks, with `task` of its metrics; None for all.
        task: show all metrics of this task.
        options: arguments of zipeval.reporting.tables.tables.

    Raises:
        UsageError: for a name that means no column, and as `tables` does.
    """
    if not columns:
        return tables(results, task, **options)
    if task:
        # Only the records tell which metrics a task has.
        built = tables(results, task, **options)
        metrics = chain.from_iterable(table.columns for table in built)
        return with_columns(built, choose(columns, metrics))
    known = headings(results)
    # Without any record, `tables` says how to make them.
    if not known:
        return tables(results, **options)
    chosen = choose(columns, known)
    narrow = tables(results, columns=chosen, **options)
    if {*chosen} == {*known}:
        return narrow
    # An average is then not of all benchmarks that there are.
    noted = []
    for table in narrow:
        if has_average(table):
            note = f"average: of {', '.join(table.columns)} only."
            table = replace(table, notes=[*table.notes, note])
        noted.append(table)
    return noted
