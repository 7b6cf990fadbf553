"""Print one run as a person reads it: the scores of its tasks, and what they came of. Imports no torch."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from zipeval.config.schema import UPPER_BOUND
from zipeval.errors import UsageError, closest, did_you_mean
from zipeval.reporting.remarks import LOWER
from zipeval.reporting.scored_samples import read_scored
from zipeval.reporting.tables import upper_bound_of
from zipeval.results import records
from zipeval.utils.console import NOTHING
from zipeval.utils.console import add as add_row
from zipeval.utils.console import console as new_console
from zipeval.utils.console import table as new_table

PROVENANCE = (
    "run_id",
    "model_revision",
    "git",
    "code",
    "machine",
    "versions",
    "resolved",
    "config",
)
SCORE_HEADINGS = ("task", "score", "metric", "value")
SAMPLE_HEADINGS = ("samples", "failed", "unscored")
TOKEN_HEADINGS = ("tokens", "mean", "final")
# Fields of a record that each task has its own of.
TASK_FIELDS = (
    "status",
    "started",
    "ended",
    "seconds",
    "task_hash",
    "data_hash",
    "data_revision",
)
SAMPLE_FIELDS = (
    "question",
    "choices",
    "target",
    "prediction",
    "score",
    "error",
    "unscored",
)


def show(name: str, results: str) -> None:
    """Print a run: coloured on a terminal, elsewhere plain and never folded.

    Args:
        name: name of the run, or a beginning that only one has.
        results: directory of runs.

    Raises:
        UsageError: if no run, or more than one, begins like this, or if a score is not what its samples come to.
    """
    directory = find(name, results)
    run_records = [records.read(path) for path in sorted(directory.glob("*.json"))]
    # Reading its samples refuses a score that does not follow from them.
    for record in run_records:
        read_scored(record)
    console = new_console()
    console.print(Text(directory.name, "bold"))
    for table in (_scores(run_records), _tasks(run_records), _provenance(run_records)):
        console.print()
        console.print(table)


def show_sample(name: str, results: str, doc_id: int, task: str | None = None) -> None:
    """Print one sample of a run, and what the upper bound answers to it.

    Args:
        name: name of the run, or a beginning that only one has.
        results: directory of runs.
        doc_id: number of the sample.
        task: of the sample, where the run has several.

    Raises:
        UsageError: if there is no such run, task or sample.
    """
    directory = find(name, results)
    record = _record_of_task(directory, task)
    sample = _sample(record, doc_id)
    lines = [("run", directory.name), ("task", record["task"]), ("sample", doc_id)]
    lines += _fields(sample, SAMPLE_FIELDS)
    bound = upper_bound_of(record, results)
    if bound and bound["run_id"] != record["run_id"]:
        bound_sample = _sample(bound, doc_id)
        for field in ("prediction", "score"):
            lines.append((f"{UPPER_BOUND}'s {field}", _plain(bound_sample.get(field))))
    if "visual_tokens" in sample:
        lines.append(("visual tokens", _layer_ranges(sample["visual_tokens"])))
    lines += _fields(sample, ("prompt_tokens", "output_tokens"))
    picture = directory / f"{record['task']}.images" / f"{doc_id}.jpg"
    lines.append(("pictures", ", ".join(sample.get("pictures", [])) or None))
    lines.append(("picture file", picture if picture.exists() else None))
    table = new_table("sample", "", left=("sample", ""))
    for field, text in lines:
        add_row(table, field, text)
    new_console().print(table)


def _record_of_task(directory: Path, task: str | None) -> dict:
    """Return the record of a run's task; of its only one, if none is named."""
    paths = {path.stem: path for path in sorted(directory.glob("*.json"))}
    if task is None and len(paths) > 1:
        raise UsageError(
            f"show {directory.name}: it has {len(paths)} tasks. Add task=, one of {', '.join(paths)}."
        )
    if task is not None and task not in paths:
        raise UsageError(
            f"task={task}: {directory.name} has no record of it.{did_you_mean(task, paths)}"
        )
    return records.read(paths[task] if task else next(iter(paths.values())))


def _sample(record: dict, doc_id: int) -> dict:
    """Return a sample by its number."""
    samples = {sample["doc_id"]: sample for sample in read_scored(record)}
    if doc_id not in samples:
        numbers = f"from {min(samples)} to {max(samples)}"
        raise UsageError(
            f"sample={doc_id}: {record['path']} has no such sample. Its numbers go {numbers}."
        )
    return samples[doc_id]


def _fields(sample: dict, names: tuple[str, ...]) -> list[tuple[str, str | None]]:
    """Return those of some fields that a sample has, as text."""
    return [(name, _plain(sample[name])) for name in names if name in sample]


def _plain(value: Any) -> str | None:
    """Return a value as text: a string as it is, all else as JSON; None for nothing."""
    if value is None or isinstance(value, str):
        return value
    return json.dumps(value, ensure_ascii=False)


def _layer_ranges(counts: list[int]) -> str:
    """Return the visual tokens of every layer in short: `144 in layers 0-2, 16 in layers 3-5`."""
    parts = []
    first = 0
    for count, group in groupby(counts):
        last = first + len(list(group)) - 1
        layers = f"layer {first}" if first == last else f"layers {first}-{last}"
        parts.append(f"{count} in {layers}")
        first = last + 1
    return ", ".join(parts)


def find(name: str, results: str) -> Path:
    """Return the directory of a run, by its name or a beginning of it.

    Raises:
        UsageError: if no run, or more than one, begins like this.
    """
    paths = sorted(Path(results).expanduser().glob("*/*.json"))
    runs = {path.parent.name: path.parent for path in paths}
    if not runs:
        raise UsageError(
            f"results={results}: no records. `zipeval run` makes them; results=DIR looks elsewhere."
        )
    if name in runs:
        return runs[name]
    matching = [run for run in runs if run.startswith(name)]
    if not matching:
        raise UsageError(
            f"show {name}: no such run.{closest(name, runs)} `ls {results}` lists all {len(runs)}."
        )
    if len(matching) > 1:
        raise UsageError(
            f"show {name}: {len(matching)} runs begin like this: {', '.join(matching)}. Name one of them."
        )
    return runs[matching[0]]


def _scores(run_records: list[dict]) -> Table:
    """Return a line for every metric of every task: its value as the task has it, its score on the papers' scale."""
    headings = [*SCORE_HEADINGS, *SAMPLE_HEADINGS]
    # This column is rarely needed.
    overflowed = any(record.get("overflowed") for record in run_records)
    if overflowed:
        headings.append("overflowed")
    table = new_table(*headings, *TOKEN_HEADINGS, left=("task", "metric"))
    for record in run_records:
        counts = [
            record["samples"]["count"],
            record["failed"],
            record.get("unscored", 0),
        ]
        if overflowed:
            counts.append(record.get("overflowed", 0))
        visual = record["visual_tokens"]
        tokens = [visual["requested"], *(f"{visual[n]:.1f}" for n in ("mean", "final"))]
        main = record["metric"]
        metrics = dict(record["metrics"])
        value = _number(metrics.pop(main, None))
        metric = main if record.get("higher_is_better", True) else f"{main}{LOWER}"
        score = _number(record["score"])
        add_row(table, record["task"], score, metric, value, *counts, *tokens)
        for name, other in metrics.items():
            add_row(table, "", "", name, _number(other))
    return table


def _tasks(run_records: list[dict]) -> Table:
    """Return a line for every task: when it ran, and of what."""
    table = new_table("task", *TASK_FIELDS, left=("task", *TASK_FIELDS))
    for record in run_records:
        add_row(table, record["task"], *map(record.get, TASK_FIELDS))
    return table


def _provenance(run_records: list[dict]) -> Table:
    """Return a line for each setting; where tasks do not agree on it, one for each task."""
    table = new_table("provenance", "", left=("provenance", ""))
    # Values by setting, then by task.
    settings: dict[str, dict[str, str]] = defaultdict(dict)
    for record in run_records:
        nested = {name: record.get(name) for name in PROVENANCE} | _sessions(record)
        for name, value in _leaves(nested):
            settings[name][record["task"]] = value
    for name, by_task in settings.items():
        values = set(by_task.values())
        if len(by_task) == len(run_records) and len(values) == 1:
            add_row(table, name, *values)
        else:
            for task, value in by_task.items():
                add_row(table, f"{name} ({task})", value)
    return table


def _sessions(record: dict) -> dict[str, dict]:
    """Return the processes that answered a task, where there was more than one."""
    sessions = record.get("sessions", [])
    if len(sessions) < 2:
        return {}
    return {f"session {i}": session for i, session in enumerate(sessions, 1)}


def _leaves(value: Any, name: str = "") -> Iterator[tuple[str, str]]:
    """Yield the leaves of nested dictionaries: `config.model.name`, its value as text."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _leaves(inner, f"{name}.{key}" if name else key)
    else:
        text = _plain(value)
        yield name, NOTHING if text is None else text


def _number(value: float | None) -> str | None:
    return None if value is None else f"{value:.4g}"
