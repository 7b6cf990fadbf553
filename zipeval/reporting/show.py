"""One run as a person reads it: the scores of its tasks, and what they came of. Imports no torch."""

from __future__ import annotations

import json
from collections.abc import Iterator
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
from zipeval.utils.console import add as _add
from zipeval.utils.console import console as new_console
from zipeval.utils.console import table as _table

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
OF_SCORES = (
    "task",
    "score",
    "metric",
    "value",
    "samples",
    "failed",
    "unscored",
    "tokens",
    "mean",
    "final",
)
OF_TASKS = (
    "status",
    "started",
    "ended",
    "seconds",
    "task_hash",
    "data_hash",
    "data_revision",
)  # every task has its own


def show(name: str, results: str) -> None:
    """Print a run: coloured on a terminal, elsewhere plain and never folded.

    Args:
        name: of the run, or as much of its beginning as no other run has.
        results: directory of runs.

    Raises:
        UsageError: if no run, or more than one, begins like this, or if a score is not what its samples come to.
    """
    directory = find(name, results)
    found = [records.read(path) for path in sorted(directory.glob("*.json"))]
    for record in found:
        read_scored(record)  # a score that is not its samples' is not shown
    console = new_console()
    console.print(Text(directory.name, "bold"))
    for table in (_scores(found), _tasks(found), _provenance(found)):
        console.print()
        console.print(table)


def show_sample(name: str, results: str, doc_id: int, task: str | None = None) -> None:
    """Print one sample of a run, and what the upper bound answers to it.

    Args:
        name: of the run, or as much of its beginning as no other run has.
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
    for field in (
        "question",
        "choices",
        "target",
        "prediction",
        "score",
        "error",
        "unscored",
    ):
        if field in sample:
            lines.append((field, _plain(sample[field])))
    bound = upper_bound_of(record, results)
    if bound and bound["run_id"] != record["run_id"]:
        lines += [
            (f"{UPPER_BOUND}'s {field}", text)
            for field, text in _answer(_sample(bound, doc_id))
        ]
    if "visual_tokens" in sample:
        lines.append(("visual tokens", _runs_of_equal(sample["visual_tokens"])))
    lines += [
        (field, _plain(sample[field]))
        for field in ("prompt_tokens", "output_tokens")
        if field in sample
    ]
    picture = directory / f"{record['task']}.images" / f"{doc_id}.jpg"
    lines.append(("pictures", ", ".join(sample.get("pictures", [])) or None))
    lines.append(("picture file", picture if picture.exists() else None))
    table = _table("sample", "", left=("sample", ""))
    for field, text in lines:
        _add(table, field, text)
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


def _answer(sample: dict) -> list[tuple[str, str | None]]:
    """Return what was answered, and what it is worth."""
    return [
        ("prediction", _plain(sample["prediction"])),
        ("score", _plain(sample.get("score"))),
    ]


def _plain(value: Any) -> str | None:
    """Return a value as text: a string as it is, all else as JSON; None for nothing."""
    if value is None or isinstance(value, str):
        return value
    return json.dumps(value, ensure_ascii=False)


def _runs_of_equal(counts: list[int]) -> str:
    """Return the visual tokens of every layer in short: `144 in layers 0-2, 16 in layers 3-5`."""
    parts, first = [], 0
    for layer in range(1, len(counts) + 1):
        if layer == len(counts) or counts[layer] != counts[first]:
            layers = (
                f"layers {first}-{layer - 1}" if layer - 1 > first else f"layer {first}"
            )
            parts.append(f"{counts[first]} in {layers}")
            first = layer
    return ", ".join(parts)


def find(name: str, results: str) -> Path:
    """The directory of a run, by its name or a beginning of it."""
    runs = {
        path.parent.name: path.parent
        for path in sorted(Path(results).expanduser().glob("*/*.json"))
    }
    if not runs:
        raise UsageError(
            f"results={results}: no records. `zipeval run` makes them; results=DIR looks elsewhere."
        )
    matching = [name] if name in runs else [run for run in runs if run.startswith(name)]
    if not matching:
        raise UsageError(
            f"show {name}: no such run.{closest(name, runs)} `ls {results}` lists all {len(runs)}."
        )
    if len(matching) > 1:
        raise UsageError(
            f"show {name}: {len(matching)} runs begin like this: {', '.join(matching)}. Name one of them."
        )
    return runs[matching[0]]


def _scores(found: list[dict]) -> Table:
    """A line for every metric of every task, its value as the task has it, its score on the papers' scale."""
    overflowed = any(
        record.get("overflowed") for record in found
    )  # a column that is rarely needed
    headings = [*OF_SCORES]
    if overflowed:
        headings.insert(headings.index("tokens"), "overflowed")
    table = _table(*headings, left=("task", "metric"))
    for record in found:
        visual = record["visual_tokens"]
        counts = [
            record["samples"]["count"],
            record["failed"],
            record.get("unscored", 0),
        ]
        counts += [record.get("overflowed", 0)] if overflowed else []
        tokens = [
            visual["requested"],
            f"{visual['mean']:.1f}",
            f"{visual['final']:.1f}",
        ]
        main, others = record["metric"], dict(record["metrics"])
        value = _number(others.pop(main, None))
        shown = main if record.get("higher_is_better", True) else f"{main}{LOWER}"
        _add(
            table,
            record["task"],
            _number(record["score"]),
            shown,
            value,
            *counts,
            *tokens,
        )
        for metric, value in others.items():
            _add(table, "", "", metric, _number(value))
    return table


def _tasks(found: list[dict]) -> Table:
    table = _table("task", *OF_TASKS, left=("task", *OF_TASKS))
    for record in found:
        _add(table, record["task"], *(record.get(name) for name in OF_TASKS))
    return table


def _provenance(found: list[dict]) -> Table:
    """A line for each setting; where tasks do not agree on it, one for each task."""
    table = _table("provenance", "", left=("provenance", ""))
    flat = {
        r["task"]: dict(_flat({**{k: r.get(k) for k in PROVENANCE}, **_sessions(r)}))
        for r in found
    }
    for name in dict.fromkeys(name for settings in flat.values() for name in settings):
        held = {
            task: settings[name] for task, settings in flat.items() if name in settings
        }
        if len(held) == len(found) and len(set(held.values())) == 1:
            _add(table, name, next(iter(held.values())))
        else:
            for task, value in held.items():
                _add(table, f"{name} ({task})", value)
    return table


def _sessions(record: dict) -> dict[str, dict]:
    """Of the processes that answered a task, where there was more than one."""
    sessions = record.get("sessions", [])
    return (
        {f"session {i}": its for i, its in enumerate(sessions, 1)}
        if len(sessions) > 1
        else {}
    )


def _flat(value: Any, name: str = "") -> Iterator[tuple[str, str]]:
    """The leaves of nested dictionaries: `config.model.name`, its value as text."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _flat(inner, f"{name}.{key}" if name else key)
    elif value is None:
        yield name, NOTHING
    else:
        yield name, value if isinstance(value, str) else json.dumps(value)


def _number(value: float | None) -> str | None:
    return None if value is None else f"{value:.4g}"
