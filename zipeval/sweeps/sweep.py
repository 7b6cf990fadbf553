"""A sweep: the runs of one command. Its plan, the jobs that work it off, and what became of every run.

    RESULTS/sweeps/NAME/plan.json    its cells: the configuration of every run, and the job that it belongs to
    RESULTS/sweeps/NAME/CELL.json    the state of a cell, written by its job

Hydra launches the jobs, in this process or on a cluster. The records of the runs are where they would be without it.
"""

from __future__ import annotations

import hashlib
import json
import os
import shlex
import socket
import sys
import traceback
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil

from zipeval import __version__
from zipeval.config.schema import RunConfig, with_tasks
from zipeval.errors import RunError, Stopped, UsageError
from zipeval.inference.validation import check
from zipeval.results import records
from zipeval.results.identity import run_identity
from zipeval.results.lock import holder
from zipeval.utils import ranks
from zipeval.utils.urls import public_url

if TYPE_CHECKING:
    pass

FOLDER, PLAN = "sweeps", "plan.json"
GROUPINGS = ("model", "none")
RUNNING, DONE, FAILED, REFUSED, STOPPED = (
    "running",
    "done",
    "failed",
    "refused",
    "stopped",
)
RAISED = {FAILED: RunError, REFUSED: UsageError, STOPPED: Stopped}
ADJUSTED = 60  # seconds by which a clock that is set moves the birth of a process; no number is given again so soon


@dataclass(frozen=True)
class Cell:
    """A run of a sweep.

    Attributes:
        name: of its state's file.
        overrides: of the command line that would run it alone.
        config: in its normal form, unless it is refused.
        group: number of the job that runs it; None if it is refused.
        refusal: why it cannot run, as far as that shows before anything is loaded.
    """

    name: str
    overrides: list[str]
    config: RunConfig
    group: int | None = None
    refusal: str | None = None


@dataclass(frozen=True)
class Sweep:
    """Cells in the order in which they run.

    Attributes:
        name: of its directory; the same for the same cells.
        command: that made it.
        results: directory of the records.
    """

    name: str
    command: str
    results: str
    cells: list[Cell]

    @property
    def directory(self) -> Path:
        return Path(self.results).expanduser().absolute() / FOLDER / self.name

    @property
    def groups(self) -> list[int]:
        """Numbers of its jobs."""
        return sorted({cell.group for cell in self.cells if cell.group is not None})

    @property
    def status_command(self) -> str:
        """What shows how far it is."""
        elsewhere = (
            [f"results={self.results}"] if self.results != RunConfig.results else []
        )
        return shlex.join(["zipeval", "status", self.name, *elsewhere])


def plan(
    label: str | None,
    command: str,
    composed: list[tuple[list[str], RunConfig]],
    group_by: str,
) -> Sweep:
    """The sweep of some runs. Those that are equal in their normal form, as vanilla at every budget, are one cell.

    Args:
        label: beginning of its name; None: the names of its models.
        composed: overrides and configuration of every run.
        group_by: what cells of one job share: model or none.

    Raises:
        UsageError: for runs that no sweep can have, and if none of them can run at all.
    """
    places = sorted({config.results for _, config in composed})
    if len(places) > 1:
        raise UsageError(
            f"results={','.join(places)}: a sweep has one directory of results. Run it once for each."
        )
    cells: dict[str, Cell] = {}
    groups: dict[str, int] = {}
    for overrides, config in composed:
        cell = _cell(overrides, config)
        key = run_identity(cell.config)
        if key in cells:
            continue
        if cell.refusal is None:
            shared = (
                json.dumps(asdict(cell.config.model)) if group_by == "model" else key
            )
            cell = replace(cell, group=groups.setdefault(shared, len(groups)))
        cells[key] = replace(cell, name=f"{len(cells):03}-{cell.name}")
    if not groups:
        _raise([UsageError(cell.refusal) for cell in cells.values()])
    models = "-".join(dict.fromkeys(cell.config.model.name for cell in cells.values()))
    digest = hashlib.sha256("\n".join(cells).encode()).hexdigest()[:10]
    name = f"{label or models}-{digest}".replace(
        "/", "-"
    )  # a table may be in a folder of the user's
    return Sweep(name, command, places[0], [*cells.values()])


def _cell(overrides: list[str], config: RunConfig) -> Cell:
    """One without number and group."""
    url, refusal = config.judge.url, None
    if url and public_url(url) != url:
        raise UsageError(
            f"judge.url={public_url(url)}: a sweep's plan is a file, and what is secret in the address would stand in "
            "it. Leave it out, or run one setting after another, without -m."
        )
    config = with_tasks(config)
    try:
        config = check(config)
    except UsageError as error:
        refusal = str(error)
    parts = (config.model.name, config.method["name"], config.tokens)
    name = "-".join(str(part) for part in parts if part is not None)
    return Cell(name, overrides, config, refusal=refusal)


def begin(sweep: Sweep) -> None:
    """Write the plan and the states of what is refused; of others', only those of what is done or under way stay.

    Raises:
        UsageError: if nothing can be written there.
    """
    records.prepare(sweep.results)
    sweep.directory.mkdir(parents=True, exist_ok=True)
    written = {
        "name": sweep.name,
        "command": sweep.command,
        "written": records.now(),
        "zipeval": __version__,
        "git": records.git_revision(),
        "cells": [
            {k: v for k, v in asdict(cell).items() if k != "refusal"}
            for cell in sweep.cells
        ],
    }
    _write(sweep.directory / PLAN, written)
    for cell in sweep.cells:
        path = sweep.directory / f"{cell.name}.json"
        if cell.refusal is not None:
            _write(path, _state(REFUSED, error=cell.refusal, ended=records.now()))
            continue
        state = _readable(path)
        if not _taken(path, state) and not (state and state["status"] == DONE):
            path.unlink(missing_ok=True)


def _readable(path: Path) -> dict[str, Any] | None:
    """A cell's state; None without one, or if it is torn, as its writer's machine died: then it says nothing."""
    with suppress(UsageError):
        return read_state(path)


def _taken(path: Path, state: dict[str, Any] | None) -> bool:
    """Whether another process is at the cell of a state."""
    return (
        state is not None
        and state["status"] == RUNNING
        and alive(state, holders(path.parents[2]))
    )


def holders(results: Path) -> dict[Path, dict]:
    """By lock of a run's task, who holds it now; not to be asked by a process that holds one."""
    found = {path: holder(path) for path in results.glob("*/*.lock")}
    return {path: by for path, by in found.items() if by is not None}


def locks(state: dict[str, Any], held: dict[Path, dict]) -> set[Path]:
    """Those that the process of a state holds."""
    names = ("host", "pid")
    return {
        path
        for path, by in held.items()
        if [by.get(n) for n in names] == [state.get(n) for n in names]
    }


def alive(state: dict[str, Any], held: dict[Path, dict]) -> bool:
    """Whether the process of a state is there and is not this one; of other machines' only the locks are seen."""
    if state["host"] != socket.gethostname():
        return bool(locks(state, held))
    if state["pid"] == os.getpid():
        return False
    try:
        process = psutil.Process(state["pid"])
        return (
            process.status() != psutil.STATUS_ZOMBIE
            and abs(process.create_time() - state.get("born", 0)) < ADJUSTED
        )
    except psutil.NoSuchProcess:
        return False


def end(sweep: Sweep) -> None:
    """Raises RunError or UsageError for what became of the cells, once the jobs are over."""
    errors, open_ends = [], 0
    for cell in sweep.cells:
        path = sweep.directory / f"{cell.name}.json"
        state = read_state(path)
        if _taken(path, state):
            errors.append(UsageError(_elsewhere(sweep, cell, state)))
        elif state is None or state["status"] == RUNNING:
            open_ends += 1
        elif state["status"] != DONE:
            errors.append(RAISED[state["status"]](state["error"]))
    if open_ends and not any(isinstance(error, Stopped) for error in errors):
        errors.append(
            lost(sweep, f"{open_ends} of {len(sweep.cells)} runs have no end")
        )
    if errors:
        _raise(errors)


def evaluated(sweep: Sweep) -> list[str]:
    """Return the paths of a sweep's records, of those of its cells that are done."""
    states = [read_state(sweep.directory / f"{cell.name}.json") for cell in sweep.cells]
    return [path for state in states if state for path in state["records"]]


def _elsewhere(sweep: Sweep, cell: Cell, state: dict[str, Any]) -> str:
    return (
        f"{cell.name}: process {state['pid']} on {state['host']} has been at it since {state['started']}. "
        f"`{sweep.status_command}` shows how far it is."
    )


def lost(sweep: Sweep, what: str) -> RunError:
    """The error of a job that died without a word, as one that was killed."""
    return RunError(
        f"sweep {sweep.name}: {what}. `{sweep.status_command}` shows which and why; the same command continues it."
    )


def _raise(errors: list[UsageError | RunError]) -> None:
    kinds = {type(error) for error in errors}
    kind = next(kind for kind in (Stopped, RunError, UsageError) if kind in kinds)
    raise kind("\nzipeval: ".join(dict.fromkeys(map(str, errors))))


@dataclass
class Job:
    """What Hydra launches for a group: its cells one after another, in a process that keeps the weights.

    Attributes:
        over: whether this process begins no other cell.
    """

    sweep: Sweep
    over: bool = False

    def __call__(self, config) -> None:
        """Run the cells of `config.group`; what became of each is in its state."""
        for cell in self.sweep.cells:
            if cell.group == config.group and not self.over:
                self._run(cell)

    def _run(self, cell: Cell) -> None:
        # Where the same command was given twice, the cell is the other's, and so is its state.
        path = self.sweep.directory / f"{cell.name}.json"
        if ranks.exchange(ranks.first() and _taken(path, _readable(path)))[0]:
            return
        started = _state(RUNNING)
        self._record(cell, started)
        try:
            from zipeval.evaluation import runner

            ended = {"status": DONE, "records": runner.evaluate_run(cell.config)}
        except (
            UsageError,
            RunError,
        ) as error:  # without its traceback, which would keep the model
            self.over = isinstance(error, Stopped)
            status = (
                STOPPED
                if self.over
                else REFUSED
                if isinstance(error, UsageError)
                else FAILED
            )
            ended = {"status": status, "error": str(error)}
        except Exception as error:  # a fault in one method is not to keep the others from being measured
            if (
                ranks.here().count > 1
            ):  # which know nothing of it, and are somewhere within this run
                self.over = True
                raise
            traceback.print_exc()
            ended = {
                "status": FAILED,
                "error": f"{cell.name}: {type(error).__name__}: {error}. This is a bug.",
            }
        self._record(cell, started | ended | {"ended": records.now()})

    def _record(self, cell: Cell, state: dict[str, Any]) -> None:
        if not ranks.first():
            return
        try:
            _write(self.sweep.directory / f"{cell.name}.json", state)
        except RunError as error:  # where a state has no room, a record may have some
            print(
                f"zipeval: {error} What it was to say: {state['error'] or state['status']}",
                file=sys.stderr,
            )


def _state(
    status: str, error: str | None = None, ended: str | None = None
) -> dict[str, Any]:
    return {
        "status": status,
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "born": psutil.Process().create_time(),  # the number may be another process's later
        "job": os.environ.get("SLURM_JOB_ID"),
        "started": records.now(),
        "ended": ended,
        "error": error,
        "records": [],
    }


def _write(path: Path, content: dict[str, Any]) -> None:
    try:
        records.atomic_write(
            path, json.dumps(content, indent=2, ensure_ascii=False) + "\n"
        )
    except OSError as error:
        raise RunError(
            f"{path}: cannot be written ({error.strerror}). Make room and run this again."
        ) from error


def read_state(path: Path) -> dict[str, Any] | None:
    """The state of a cell; None of one that no job has begun.

    Raises:
        UsageError: if it cannot be read.
    """
    try:
        state = json.loads(path.read_text(encoding="utf-8"))
        state[
            "status"
        ]  # of a state that was cut off, there may be nothing but `{}` or `0`
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(
            f"{path}: not a readable state ({error}). Delete it and run the sweep's command again."
        ) from error
    return state
