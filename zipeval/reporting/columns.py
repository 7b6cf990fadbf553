"""Which benchmarks of a table are shown: `columns=POPE,gqa`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

from zipeval.benchmarks import BENCHMARKS
from zipeval.errors import UsageError, did_you_mean
from zipeval.reporting.remarks import LOWER
from zipeval.reporting.table_text import has_average
from zipeval.reporting.tables import Table, headings, tables

KNOWN = {benchmark.column for benchmark in BENCHMARKS.values()}
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
    names = [names] if isinstance(names, str) else names
    chosen: list[str] = []
    for name in names:
        matching = _matching(name, headings)
        if not matching:
            raise UsageError(
                f"columns={name}: no such column.{did_you_mean(name, headings)}"
            )
        chosen += matching
    return list(dict.fromkeys(chosen))


def _matching(name: str, headings: list[str]) -> list[str]:
    """Return the headings that a name means, those that it is most exactly."""
    wanted = BENCHMARKS[name].column if name in BENCHMARKS else name
    # `GQA` is the column of this name, even where there is `GQA (turns)` too: so exact names come first.
    for comparable in (str, _without_case, _without_ending):
        matching = [
            heading for heading in headings if comparable(heading) == comparable(wanted)
        ]
        if matching:
            return matching
    return []


def _without_case(heading: str) -> str:
    return heading.removesuffix(LOWER).casefold()


def _without_ending(heading: str) -> str:
    """Return a heading without the metric or the filter behind its name; of a known benchmark all of it is its name."""
    if heading in KNOWN:
        return heading.casefold()
    return heading.partition(" (")[0].partition(",")[0].casefold()


def with_columns(tables: list[Table], columns: list[str]) -> list[Table]:
    """Return tables with these columns only, without those that have none of them.

    An average is of all columns of its table, so that it is left out where some are.
    """
    return [
        _with_columns(table, columns)
        for table in tables
        if not {*columns}.isdisjoint(table.columns)
    ]


def _with_columns(table: Table, columns: list[str]) -> Table:
    shown = [name for name in columns if name in table.columns]
    if len(shown) == len(table.columns):  # in another order, perhaps
        return replace(table, columns=shown)
    rows = []
    for row in table.rows:
        cells = {name: row.cells[name] for name in shown if name in row.cells}
        # What is left of it would be another number than the one that a paper printed.
        rows.append(replace(row, cells=cells, average=None, average_comparison=None))
    # A note begins with what it is about: the row and the column.
    hidden = tuple(f" {name}" for name in {*table.columns, "average"} - {*shown})
    notes = [
        note for note in table.notes if not note.partition(":")[0].endswith(hidden)
    ]
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
        columns: headings or names of tasks, with `task` of its metrics; None for all.
        options: of zipeval.reporting.tables.tables.

    Raises:
        UsageError: for a name that means no column, and as `tables` does.
    """
    if task or not columns:
        made = tables(results, task, **options)
        # The columns are the task's metrics, whose names its records tell.
        metrics = [name for table in made for name in table.columns]
        return with_columns(made, choose(columns, metrics)) if columns else made
    known = headings(results)
    # Without any record, `tables` says how to make them.
    chosen = choose(columns, known) if known else None
    made = tables(results, columns=chosen, **options)
    if chosen is None or {*chosen} == {*known}:
        return made
    return [
        replace(table, notes=[*table.notes, *_average_notes(table)]) for table in made
    ]


def _average_notes(table: Table) -> list[str]:
    """Say that an average is not of all benchmarks that there are."""
    return (
        [f"average: of {', '.join(table.columns)} only."] if has_average(table) else []
    )
