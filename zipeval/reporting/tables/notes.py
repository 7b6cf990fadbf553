"""Notes below a table: what a reader has to know of some of its rows."""

from __future__ import annotations

from collections.abc import Iterator
from math import isfinite

from zipeval.benchmarks import BENCHMARKS
from zipeval.reporting.tables.cells import heading, is_higher_better
from zipeval.reporting.tables.model import Record, Row
from zipeval.reporting.tables.settings import row_name
from zipeval.results.records import incomplete

OF_TURNS = "Conversations: visual tokens and FLOPs are of the first question."


def table_notes(
    table_records: list[Record], bounds: dict[str, Record], several: bool
) -> list[str]:
    """Return the notes of a table.

    Args:
        table_records: its records.
        bounds: the record of the upper bound for each task.
        several: whether it has more rows than the upper bound.
    """
    # Records of the same model and task would say the same.
    notes = list(dict.fromkeys(filter(None, map(_misfit_note, table_records))))
    for record in table_records:
        notes += _record_notes(record)
    if several:
        for task, bound in bounds.items():
            notes += _overflow_notes(task, bound)
    if any(is_conversation(task) for task in bounds):
        notes.append(OF_TURNS)
    return notes


def is_conversation(task: str) -> bool:
    """Return whether a task asks several questions about each picture, one after another."""
    return task in BENCHMARKS and bool(BENCHMARKS[task].turns)


def _record_notes(record: Record) -> Iterator[str]:
    """Yield what is special about the samples of a record."""
    row = row_name(record)
    total = f"of the {record['samples']['count']} samples of {record['task']}"
    if record["failed"]:
        rule = "are left out, as no error is the worst one"
        if is_higher_better(record):
            rule = "count as unanswered"
        yield f"{row}: {record['failed']} {total} could not be read and {rule}."
    if record.get("overflowed"):
        yield f"{row}: {record['overflowed']} {total} have a prompt that is longer than the model's positions."
    if incomplete(record):
        yield (
            f"{row}: INCOMPLETE, {record['unscored']} {total} have no verdict and do not count. The command that "
            "made it asks the judge for those."
        )


def _misfit_note(record: Record) -> str:
    """Return a note where a model was asked about pictures that are not made for it; nothing elsewhere."""
    model, task = record["config"]["model"], record["task"]
    embedded = model.get("embedded")
    if task.startswith("zipeval_shapes"):
        if embedded:
            return ""
        return (
            f"{task}: drawn shapes, made for the embedded checkpoints. Its scores say little about {model['name']}; "
            "suite=quick is of real pictures."
        )
    # With a path, the weights are the user's own.
    is_trained_on_shapes = embedded and not model.get("path")
    if task in BENCHMARKS and is_trained_on_shapes:
        return (
            f"{BENCHMARKS[task].column}: {model['name']} was trained on drawn shapes only. Its scores on real pictures "
            "say nothing about a method."
        )
    return ""


def _overflow_notes(task: str, bound: Record) -> Iterator[str]:
    """Yield why a column has no percentages: a model beyond its positions is no upper bound."""
    if bound.get("overflowed"):
        yield (
            f"{heading(bound)}: no percentages. {bound['overflowed']} of the {bound['samples']['count']} prompts of "
            f"{task} are longer than the model's positions under the upper bound."
        )


def change_note(row: Row, task: str, samples: list[dict]) -> str:
    """Return what a table cannot show: two accuracies of one run of conversations, paired."""
    from zipeval.reporting import stats

    value, low, high = stats.change(task, samples)
    label = row.label if row.tokens is None else f"{row.label} {row.tokens}"
    interval, how = "", ""
    if isfinite(low):
        interval = f" [{low:+.1f}, {high:+.1f}]"
        how = " (95%, paired, images drawn)"
    return (
        f"{label}: later turns of {task} change by {value:+.1f} points{interval} where the first one's visual tokens "
        f"serve them, against a fresh selection for each{how}."
    )
