"""Read how far each run of a sweep is, from the files of its plan, states, records and journals."""

from __future__ import annotations

import json
import socket
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from zipeval.benchmarks.protocols import PROTOCOLS
from zipeval.config.schema import (
    DataConfig,
    JudgeConfig,
    ModelConfig,
    RunConfig,
    RunnerConfig,
)
from zipeval.errors import UsageError
from zipeval.results.identity import CIRCUMSTANCES, judge_identity
from zipeval.results.journal import answered
from zipeval.results.samples import count
from zipeval.sweeps.state import DONE, RUNNING, is_alive, locks_of, read_state
from zipeval.sweeps.sweep import PLAN

DIED = "died"
LEFT = "left"
UNREADABLE = "unreadable"

# A job on another machine may not hold its locks yet in its first seconds.
STARTING = 120

SampleCounts = dict[tuple[str, int | None], int]


@dataclass
class Progress:
    """A run of a sweep, and how far it is.

    Attributes:
        name: name of the run.
        status: as in its state; DIED if that says running and no process is at it, LEFT
            if no job has begun it, UNREADABLE if its state was cut off.
        group: number of its job; None if it was refused before anything started.
        config: its configuration.
        state: what its job wrote; {} if none has begun it.
        records: its records, by task.
        answers: numbers of answers of tasks that are under way, by task.
    """

    name: str
    status: str
    group: int | None
    config: RunConfig
    state: dict[str, Any]
    records: dict[str, dict] = field(default_factory=dict)
    answers: dict[str, int] = field(default_factory=dict)

    def samples(self, task: str, counts: SampleCounts) -> int | None:
        """Return the number of samples of a task, or None if it is not known.

        Args:
            counts: numbers that records of this sweep have, by task and limit.
        """
        recorded = counts.get((task, self.config.limit))
        if recorded is not None:
            return recorded
        try:
            return count(task, self.config)
        except UsageError:
            # Most likely what the run was refused for.
            return None

    def total(self, counts: SampleCounts) -> int | None:
        """Return the number of samples of all tasks, or None if one is not known."""
        if self.group is None:
            return None
        numbers = [self.samples(task, counts) for task in self.config.tasks]
        return None if None in numbers else sum(numbers)

    @property
    def answered(self) -> int:
        """Return the number of answers in records and journals."""
        recorded = sum(recorded_counts(self).values())
        return recorded + sum(self.answers.values())

    @property
    def open_tasks(self) -> list[str]:
        """Return the tasks without a record."""
        return [task for task in self.config.tasks if task not in self.records]


def recorded_counts(run: Progress) -> SampleCounts:
    """Return the numbers of samples in a run's records, by task and limit."""
    limit = run.config.limit
    return {
        (task, limit): record["samples"]["count"]
        for task, record in run.records.items()
    }


def read_plan(directory: Path) -> dict:
    """Return the plan of a sweep.

    Raises:
        UsageError: if its file cannot be read.
    """
    try:
        return json.loads((directory / PLAN).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(
            f"{directory / PLAN}: not readable ({error}). Run the sweep's command again."
        ) from error


def read_progress(
    directory: Path, records: list[dict], holders: dict[Path, dict]
) -> list[Progress]:
    """Return how far each run of a sweep is.

    Args:
        directory: folder of the sweep.
        records: all records of the directory of results.
        holders: who holds the locks of tasks (`state.lock_holders`).

    Raises:
        UsageError: if the plan cannot be read.
    """
    by_identity = {}
    by_path = {}
    for record in records:
        task = record["task"]
        by_identity[_identity(record["config"]), task] = record
        by_path[_run_and_file(record["path"])] = record
    runs = []
    for cell in read_plan(directory)["cells"]:
        state = _read_state(directory / f"{cell['name']}.json")
        status = current_status(state, holders)
        config = _config(cell["config"])
        run = Progress(cell["name"], status, cell["group"], config, state)
        for task in config.tasks:
            record = by_identity.get((_identity(cell["config"], task), task))
            if record is not None:
                run.records[task] = record
        if status == DONE:
            for path in state["records"]:
                record = by_path.get(_run_and_file(path))
                if record is not None:
                    run.records[record["task"]] = record
        if status == RUNNING:
            run.answers = _journalled_answers(run, holders)
        runs.append(run)
    return runs


def _run_and_file(path: str) -> tuple[str, ...]:
    """Return the last two parts of a record's path: they are the same from every working directory."""
    return Path(path).parts[-2:]


def _journalled_answers(run: Progress, holders: dict[Path, dict]) -> dict[str, int]:
    """Return the numbers of answers in the journals of the tasks whose locks a run holds."""
    answers = {}
    for path in locks_of(run.state, holders):
        task = path.stem
        if task not in run.records:
            answers[task] = answered(path.parent, task)
    return answers


def _read_state(path: Path) -> dict[str, Any]:
    """Return the state of a run; {} if no job has begun it."""
    try:
        return read_state(path) or {}
    except UsageError as error:
        return {"status": UNREADABLE, "error": str(error)}


def _config(written: dict) -> RunConfig:
    """Return the configuration that a plan holds as JSON."""
    nodes = {
        "model": ModelConfig,
        "runner": RunnerConfig,
        "judge": JudgeConfig,
        "data": DataConfig,
    }
    values = dict(written)
    for name, node in nodes.items():
        if name in values:
            values[name] = node(**values[name])
    return RunConfig(**values)


def _identity(config: dict, task: str | None = None) -> str:
    """Return what makes a configuration the same as that of a record.

    Args:
        config: configuration of a record, or of a whole run.
        task: the task whose record a run's configuration would make.
    """
    skipped = {*CIRCUMSTANCES, "tasks", "projector"}
    # A record of a task without a judge does not name one, though its run may have one.
    if task and task not in PROTOCOLS:
        skipped.add("judge")
    identity = {name: value for name, value in config.items() if name not in skipped}
    if "judge" in identity:
        identity["judge"] = judge_identity(identity["judge"])
    return json.dumps(identity, sort_keys=True)


def current_status(state: dict[str, Any], holders: dict[Path, dict]) -> str:
    """Return the status of a run, which may have died without writing so."""
    if not state:
        return LEFT
    if state["status"] != RUNNING or is_alive(state, holders):
        return state["status"]
    if state["host"] == socket.gethostname():
        return DIED
    age = datetime.now(timezone.utc) - datetime.fromisoformat(state["started"])
    return RUNNING if age.total_seconds() < STARTING else DIED
