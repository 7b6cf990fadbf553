"""Cells of a table: which number of a record stands in which column."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from zipeval.benchmarks import BENCHMARKS
from zipeval.reporting.percentages import percent_of_bound
from zipeval.reporting.remarks import (
    LOWER,
    OVERFLOWED,
    Remark,
    bound_remarks,
    record_remarks,
    undefined_remarks,
)
from zipeval.reporting.tables.model import Record, TableCell
from zipeval.results import records

# Returns the cell of a column, from the records of a row and of the upper bound by task.
Pick = Callable[[dict[str, Record], dict[str, Record]], TableCell | None]


def is_higher_better(*records: Record) -> bool:
    """Return whether more is better of the score of some records of a task; those of before schema 5 do not say."""
    return all(record.get("higher_is_better", True) for record in records)


def column_order(task: str) -> tuple:
    """Return a key for sorting: columns stand in the papers' order, and others behind them."""
    known = list(BENCHMARKS)
    return known.index(task) if task in known else len(known), task


def heading(record: Record) -> str:
    """Return the papers' name of a benchmark.

    Any other task has its own name, with its metric, which is lmms-eval's first one.
    """
    benchmark = BENCHMARKS.get(record["task"])
    if benchmark:
        return benchmark.column
    arrow = "" if is_higher_better(record) else LOWER
    return f"{record['task']} ({record['metric']}{arrow})"


def headings(results: str) -> list[str]:
    """Return the headings of all records of a directory; of broken ones, which `tables` refuses, none."""
    tasks = {}
    for record in records.read_all(results):
        if {"task", "metric"} <= record.keys():
            tasks[record["task"]] = heading(record)
    return [tasks[task] for task in sorted(tasks, key=column_order)]


def main_columns(bounds: dict[str, Record]) -> dict[str, Pick]:
    """Return a column for each task, with its main number.

    Args:
        bounds: the record of the upper bound for each task.
    """
    columns = {}
    for task in sorted(bounds, key=column_order):
        columns[heading(bounds[task])] = _main_number(task)
    return columns


def _main_number(task: str) -> Pick:
    def pick(row, bounds):
        if task not in row:
            return None
        record, bound = row[task], bounds[task]
        higher = is_higher_better(record, bound)
        return _cell(record, record["score"], bound, bound["score"], higher)

    return pick


def metric_columns(task_records: list[Record]) -> dict[str, Pick]:
    """Return a column for each metric of a task, on the scale of its main one, which comes first.

    Args:
        task_records: records of one task.
    """
    main = task_records[0]["metric"]
    metrics = set()
    for record in task_records:
        metrics |= record["metrics"].keys()
    columns = {}
    for name in sorted(metrics, key=lambda name: (name != main, name)):
        higher = _is_higher_better_of(name, task_records)
        columns[name if higher else name + LOWER] = _metric(name, higher)
    return columns


def _metric(name: str, higher_is_better: bool) -> Pick:
    # A difference of two metrics is no share of another difference.
    is_share = not name.startswith("change_")

    def pick(row, bounds):
        (record,), (bound,) = row.values(), bounds.values()
        score = _on_main_scale(record, name)
        bound_score = _on_main_scale(bound, name) if is_share else None
        return _cell(record, score, bound, bound_score, higher_is_better)

    return pick


def _is_higher_better_of(metric: str, task_records: list[Record]) -> bool:
    # lmms-eval writes a metric as `name,filter`.
    name = metric.partition(",")[0]
    return all(record.get("directions", {}).get(name, True) for record in task_records)


def _on_main_scale(record: Record, name: str) -> float | None:
    """Return a metric of a record on the scale of its score; None while no answer is judged."""
    value = record["metrics"].get(name)
    if not value:
        return value
    benchmark = BENCHMARKS.get(record["task"])
    if benchmark:
        return value * benchmark.scale
    main = record["metrics"].get(record["metric"])
    return value * (record["score"] / main) if main else value


def _cell(
    record: Record,
    score: float | None,
    bound: Record,
    bound_score: float | None,
    higher_is_better: bool,
) -> TableCell:
    """Return a score with its percentage of the upper bound's.

    Args:
        record: the record of the score.
        score: None while no answer is judged.
        bound: the record of the upper bound.
        bound_score: None for a number that is no share of another one.
        higher_is_better: whether a larger score is better.
    """
    remarks = record_remarks(record)
    cell = TableCell(
        score, None, record, remarks=remarks, higher_is_better=higher_is_better
    )
    if score is None or bound_score is None:
        return cell
    if record is not bound:
        remarks += bound_remarks(bound)
    if bound.get("overflowed"):
        nothing = Remark(
            OVERFLOWED,
            "no percentage: the upper bound's prompts are longer than the model's positions",
        )
        return replace(cell, remarks=(*remarks, nothing))
    percent = percent_of_bound(score, bound_score, higher_is_better)
    remarks += undefined_remarks(percent, higher_is_better, bound_score)
    return replace(cell, percent=percent, remarks=remarks)
