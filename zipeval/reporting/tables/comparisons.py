"""Compare the rows of a table with its upper bound, sample by sample."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from zipeval.config.schema import UPPER_BOUND
from zipeval.reporting.scored_samples import follows_from_samples, read_scored
from zipeval.reporting.tables.model import Row, Table, TableCell
from zipeval.reporting.tables.notes import change_note, is_conversation

SamplesOf = Callable[[Row, str], list[dict]]


def with_comparisons(table: Table, columns: list[str]) -> Table:
    """Return a table with intervals of the percentages, and with what is as good as the best of its budget.

    The upper bound itself is compared with nothing. Nor is a column of which the upper bound's prompts did not fit, or
    whose metric is no function of its samples' scores.

    Args:
        table: the table.
        columns: headings of the columns that are compared.
    """
    samples = {}
    notes = [*table.notes]
    for row in table.rows:
        for name in columns:
            if name not in row.cells:
                continue
            record = row.cells[name].record
            row_samples = read_scored(record, positions=False)
            samples[row.label, row.tokens, name] = row_samples
            if is_conversation(record["task"]):
                notes.append(change_note(row, record["task"], row_samples))

    def samples_of(row: Row, name: str) -> list[dict]:
        return samples[row.label, row.tokens, name]

    silent = _columns_without_statistics(table, columns, samples_of)
    compared = [name for name in columns if name not in silent]
    bound, *others = table.rows
    rows = [bound]
    for group in replace(table, rows=others).groups():
        # A budget of one method has no best one, nor has one that is compared with a
        # method of its own budget.
        rivals = len(group) > 1 and table.bound == UPPER_BOUND
        best = {name: _best(group, name) if rivals else None for name in columns}
        for row in group:
            names = [name for name in compared if name in row.cells]
            rows.append(_compare_row(row, bound, best, names, samples_of))
    return replace(table, rows=rows, notes=[*notes, *silent.values()])


def _compare_row(
    row: Row,
    bound: Row,
    best: dict[str, Row | None],
    names: list[str],
    samples_of: SamplesOf,
) -> Row:
    """Return a row with statistics in the columns of these names.

    Args:
        row: the row.
        bound: the row of the upper bound.
        best: by column the best row of the budget, None where there are no others.
        names: headings of columns that the row has.
        samples_of: returns the samples of a row in a column.
    """
    from zipeval.reporting import stats

    cells = dict(row.cells)
    pairs = []
    for name in names:
        cell = cells[name]
        task, samples = cell.record["task"], samples_of(row, name)
        pair = (task, samples, samples_of(bound, name))
        pairs.append(pair)
        tied = False
        if best[name] is not None:
            tied = stats.tied(task, samples, samples_of(best[name], name))
        comparison = None
        if not bound.cells[name].record.get("overflowed"):
            comparison = stats.compare(*pair, higher_is_better=cell.higher_is_better)
        cells[name] = replace(cell, comparison=comparison, tied=tied)
    average = None
    if row.average is not None and len(names) == len(cells):
        directions = [cells[name].higher_is_better for name in names]
        average = stats.average(pairs, higher_is_better=directions)
    return replace(row, cells=cells, average_comparison=average)


def _best(group: list[Row], name: str) -> Row | None:
    """Return the row of a budget whose score in a column is the best; the first of several."""
    scored = []
    for row in group:
        cell = row.cells.get(name)
        if cell is not None and cell.score is not None:
            scored.append(row)
    if not scored:
        return None
    better = max if scored[0].cells[name].higher_is_better else min
    return better(scored, key=lambda row: row.cells[name].score)


def _columns_without_statistics(
    table: Table, columns: list[str], samples_of: SamplesOf
) -> dict[str, str]:
    """Return the columns whose score does not follow from samples, each with a note that says so."""
    notes = {}
    for name in columns:
        for row in table.rows:
            cell: TableCell | None = row.cells.get(name)
            if cell is None:
                continue
            if not follows_from_samples(cell.record, samples_of(row, name)):
                metric = cell.record["metric"]
                notes[name] = (
                    f"{name}: no intervals. Its samples have no scores of which {metric} is the mean."
                )
    return notes
