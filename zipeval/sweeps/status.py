"""How far runs and sweeps are: read from their files, whoever works on them. Imports no torch."""

from __future__ import annotations

import json
import socket
from collections import Counter
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
from zipeval.errors import UsageError, closest
from zipeval.results import records
from zipeval.results.identity import CIRCUMSTANCES, judge_identity
from zipeval.results.journal import answered
from zipeval.results.samples import Pace, count, of_run, pace
from zipeval.sweeps.sweep import (
    DONE,
    FAILED,
    FOLDER,
    PLAN,
    REFUSED,
    RUNNING,
    STOPPED,
    alive,
    holders,
    locks,
    read_state,
)
from zipeval.utils import console

DIED, LEFT, UNREADABLE = "died", "left", "unreadable"
ORDER = (DONE, RUNNING, FAILED, REFUSED, STOPPED, DIED, UNREADABLE, LEFT)
STARTING = (
    120  # seconds in which a process on another machine may not hold its locks yet
)


@dataclass
class Progress:
    """A cell of a sweep.

    Attributes:
        status: as in its state; `died` where that says running and nobody is, `left` where it has none, `unreadable`
            where that is torn.
        group: number of its job; None if it was refused before anything started.
        config: of its run.
        state: what its job wrote; {} if none has begun it.
        found: its records, by task.
        answers: by task, those of a task that is being answered.
    """

    name: str
    status: str
    group: int | None
    config: RunConfig
    state: dict[str, Any]
    found: dict[str, dict] = field(default_factory=dict)
    answers: dict[str, int] = field(default_factory=dict)

    def samples(
        self, task: str, known: dict[tuple[str, int | None], int]
    ) -> int | None:
        """Of a task: as another record of this sweep has it, or counted."""
        try:
            return known.get((task, self.config.limit)) or count(task, self.config)
        except UsageError:  # what the run was refused for, most likely
            return None


def status(name: str | None, results: str) -> None:
    """Print how far a sweep is, or a line for every sweep and every run.

    Args:
        name: of the sweep, or as much of its beginning as no other has; None: all.
        results: directory of runs.

    Raises:
        UsageError: if there is no such sweep, or nothing at all.
    """
    place = Path(results).expanduser()
    sweeps = {
        path.parent.name: path.parent
        for path in sorted(place.glob(f"{FOLDER}/*/{PLAN}"))
    }
    found = records.read_all(results)
    held = holders(place)
    if name is not None:
        directory = _find(name, results, sweeps)
        return _show(directory, _progress(directory, found, held))
    if not sweeps and not found and not held:
        raise UsageError(
            f"results={results}: nothing is there. `zipeval run` makes runs; results=DIR looks elsewhere."
        )
    out = console.console()
    if sweeps:
        rows = console.table("sweep", "runs", *ORDER, left=("sweep",))
        for sweep, directory in sweeps.items():
            cells = _progress(directory, found, held)
            counts = Counter(cell.status for cell in cells)
            console.add(rows, sweep, len(cells), *(counts[s] or None for s in ORDER))
        out.print(rows)
        out.print()
    out.print(_runs(place, found, held))


def _find(name: str, results: str, sweeps: dict[str, Path]) -> Path:
    matching = (
        [name]
        if name in sweeps
        else [sweep for sweep in sweeps if sweep.startswith(name)]
    )
    if not matching:
        raise UsageError(
            f"status {name}: no such sweep in results={results}.{closest(name, sweeps)} `zipeval status` lists all."
        )
    if len(matching) > 1:
        raise UsageError(
            f"status {name}: {len(matching)} sweeps begin like this: {', '.join(matching)}. Name one."
        )
    return sweeps[matching[0]]


def _runs(place: Path, found: list[dict], held: dict[Path, dict]):
    """A line for each run: its tasks that are finished, that wait for a judge, and that are under way."""
    rows = console.table(
        "run",
        "finished",
        "incomplete",
        "samples",
        "last",
        "now",
        left=("run", "last", "now"),
    )
    of: dict[str, list[dict]] = {}
    for record in found:
        of.setdefault(Path(record["path"]).parent.name, []).append(record)
    begun = {path.parent.name for path in place.glob("*/*.journal.jsonl")}
    for run in sorted({*of, *begun, *(path.parent.name for path in held)}):
        its = of.get(run, [])
        waiting = sum(map(records.incomplete, its))
        samples = sum(record["samples"]["count"] for record in its)
        last = max((record["ended"] for record in its), default=None)
        by = [_who(who) for path, who in held.items() if path.parent.name == run]
        now = (
            by[0]
            if by
            else "left unfinished, nobody is at it"
            if run in begun
            else None
        )
        console.add(rows, run, len(its) - waiting, waiting or None, samples, last, now)
    return rows


def _progress(
    directory: Path, found: list[dict], held: dict[Path, dict]
) -> list[Progress]:
    """The cells of a sweep."""
    index = {(_identity(record["config"]), record["task"]): record for record in found}
    places = {
        Path(record["path"]).parts[-2:]: record for record in found
    }  # wherever the results were seen from
    cells = []
    for planned in _read(directory)["cells"]:
        state = _state(directory / f"{planned['name']}.json")
        config = _config(planned["config"])
        cell = Progress(
            planned["name"], _status(state, held), planned["group"], config, state
        )
        for task in config.tasks:
            record = index.get((_identity(planned["config"], task), task))
            if record:
                cell.found[task] = record
        if cell.status == DONE:
            own = (places.get(Path(path).parts[-2:]) for path in state["records"])
            cell.found |= {record["task"]: record for record in own if record}
        if cell.status == RUNNING:
            its = locks(state, held)
            cell.answers = {
                p.stem: answered(p.parent, p.stem)
                for p in its
                if p.stem not in cell.found
            }
        cells.append(cell)
    return cells


def _state(path: Path) -> dict[str, Any]:
    """Of a cell; {} if none has begun it."""
    try:
        return read_state(path) or {}
    except UsageError as error:
        return {"status": UNREADABLE, "error": str(error)}


def _read(directory: Path) -> dict:
    try:
        return json.loads((directory / PLAN).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(
            f"{directory / PLAN}: not readable ({error}). Run the sweep's command again."
        ) from error


def _config(written: dict) -> RunConfig:
    nodes = {
        "model": ModelConfig,
        "runner": RunnerConfig,
        "judge": JudgeConfig,
        "data": DataConfig,
    }
    return RunConfig(
        **{
            name: nodes[name](**value) if name in nodes else value
            for name, value in written.items()
        }
    )


def _identity(config: dict, task: str | None = None) -> str:
    """Of a record's configuration; with `task`, what that of its record would be."""
    skipped = {*CIRCUMSTANCES, "tasks", "projector"} | (
        {"judge"} if task and task not in PROTOCOLS else set()
    )
    identity = {name: value for name, value in config.items() if name not in skipped}
    if "judge" in identity:
        identity["judge"] = judge_identity(identity["judge"])
    return json.dumps(identity, sort_keys=True)


def _status(state: dict[str, Any], held: dict[Path, dict]) -> str:
    if not state:
        return LEFT
    if state["status"] != RUNNING or alive(state, held):
        return state["status"]
    if state["host"] == socket.gethostname():
        return DIED
    age = datetime.now(timezone.utc) - datetime.fromisoformat(state["started"])
    return RUNNING if age.total_seconds() < STARTING else DIED


def _show(directory: Path, cells: list[Progress]) -> None:
    out = console.console()
    written = _read(directory)
    counts = Counter(cell.status for cell in cells)
    known = {
        (task, cell.config.limit): r["samples"]["count"]
        for cell in cells
        for task, r in cell.found.items()
    }
    said = ", ".join(f"{counts[status]} {status}" for status in ORDER if counts[status])
    out.print(f"{written['name']}: {len(cells)} runs, {said}", markup=False)
    out.print(written["command"], markup=False)
    out.print()
    rows = console.table(
        "run",
        "status",
        "answers",
        "of",
        "since",
        "by",
        left=("run", "status", "since", "by"),
    )
    for cell in cells:
        numbers = (
            [cell.samples(task, known) for task in cell.config.tasks]
            if cell.group is not None
            else [None]
        )
        done = sum(r["samples"]["count"] for r in cell.found.values()) + sum(
            cell.answers.values()
        )
        total = None if None in numbers else sum(numbers)
        unseen = (
            cell.status not in (DONE, RUNNING, LEFT) and not done
        )  # their journals do not say whose they are
        by = _who(cell.state) if cell.status in (RUNNING, DIED) else None
        console.add(
            rows,
            cell.name,
            cell.status,
            None if unseen else done,
            total,
            cell.state.get("started"),
            by,
        )
    out.print(rows)
    out.print()
    for cell in cells:
        if cell.state.get("error"):
            out.print(f"{cell.name}: {cell.state['error']}", markup=False)
    out.print(_time_left(cells, known), markup=False)
    if any(cell.status not in (DONE, RUNNING, LEFT, REFUSED) for cell in cells):
        out.print("The same command goes on with what has no end.")


def _time_left(cells: list[Progress], known: dict[tuple[str, int | None], int]) -> str:
    """In words, from what the sweep's own records measured."""
    waiting = [cell for cell in cells if cell.status != DONE and cell.group is not None]
    open_tasks = [
        (cell, task)
        for cell in waiting
        for task in cell.config.tasks
        if task not in cell.found
    ]
    if not open_tasks:
        return "Nothing is left to be answered."
    measured = [record for cell in cells for record in cell.found.values()]
    if not measured:
        return "Time left: nothing is measured yet, the first finished task will tell."
    seconds, unknown = 0.0, set()
    for cell, task in open_tasks:
        number = cell.samples(task, known)
        if number is None:
            unknown.add(task)
        else:
            seconds += (
                max(0, number - cell.answers.get(task, 0))
                * _pace(measured, cell.config, task).seconds
            )
    jobs = len(
        {
            (cell.state["host"], cell.state["pid"])
            for cell in waiting
            if cell.status == RUNNING
        }
    )
    shared = f" with {jobs} jobs at it" if jobs > 1 else ""
    without = (
        f", without {', '.join(sorted(unknown))}, whose samples are not counted"
        if unknown
        else ""
    )
    ended = any(cell.status not in (RUNNING, LEFT) for cell, _ in open_tasks)
    kept = (
        " What runs without an end had answered is kept, and not counted here."
        if ended
        else ""
    )
    return (
        f"Time left: about {_duration(seconds / max(1, jobs))}{shared}{without}.{kept}"
    )


def _pace(measured: list[dict], config: RunConfig, task: str) -> Pace:
    """Of the run's own method if it has a record, of this task if there is one."""
    run = of_run(config.model.name, config.method, config.tokens, config.budget)
    method = {"method": run["method"]}
    return pace(
        measured,
        {"task": task, **run},
        {"task": task, **method},
        {"task": task},
        method,
        {},
    )


def _duration(seconds: float) -> str:
    minutes = round(seconds / 60)
    if seconds < 90:
        return f"{seconds:.0f} s"
    return (
        f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60:02} min"
    )


def _who(by: dict[str, Any]) -> str:
    """A process, and the job that it is of."""
    job = f", job {by['job']}" if by.get("job") else ""
    return f"process {by.get('pid', '?')} on {by.get('host', '?')}{job}"
