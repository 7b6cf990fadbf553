"""A sweep: the runs of one command, their plan, and how they ended.

Hydra launches the jobs of a sweep, in this process or on a cluster. The records of the
runs are where they would be without it.
"""

from __future__ import annotations

import hashlib
import json
import shlex
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from zipeval import __version__
from zipeval.config.schema import RunConfig, with_tasks
from zipeval.errors import RunError, Stopped, UsageError
from zipeval.inference.validation import check
from zipeval.results import records
from zipeval.results.identity import run_identity
from zipeval.sweeps.state import (
    DONE,
    FAILED,
    REFUSED,
    RUNNING,
    STOPPED,
    is_taken,
    new_state,
    read_if_intact,
    read_state,
    write_json,
)
from zipeval.utils.urls import public_url

FOLDER, PLAN = "sweeps", "plan.json"
GROUPINGS = ("model", "none")
ERRORS = {FAILED: RunError, REFUSED: UsageError, STOPPED: Stopped}


@dataclass(frozen=True)
class SweepRun:
    """A run of a sweep.

    Attributes:
        name: name of the file of its state.
        overrides: command line that would run it alone.
        config: configuration in its normal form, unless the run is refused.
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
    """The runs of one command.

    Attributes:
        name: name of its directory; the same for the same runs.
        command: the command that made it.
        results: directory of the records.
        cells: the runs, in the order in which they run.
    """

    name: str
    command: str
    results: str
    cells: list[SweepRun]

    @property
    def directory(self) -> Path:
        """Return the folder of the plan and the states."""
        return Path(self.results).expanduser().absolute() / FOLDER / self.name

    def state_path(self, run: SweepRun) -> Path:
        """Return the file of a run's state."""
        return self.directory / f"{run.name}.json"

    @property
    def groups(self) -> list[int]:
        """Return the numbers of the jobs."""
        return sorted({run.group for run in self.cells if run.group is not None})

    @property
    def status_command(self) -> str:
        """Return the command that shows how far the sweep is."""
        command = ["zipeval", "status", self.name]
        if self.results != RunConfig.results:
            command.append(f"results={self.results}")
        return shlex.join(command)


def plan(
    label: str | None,
    command: str,
    composed: list[tuple[list[str], RunConfig]],
    group_by: str,
) -> Sweep:
    """Return the sweep of some configurations.

    Those that are equal in their normal form, as vanilla at every budget, are one run.

    Args:
        label: beginning of its name; None: the names of its models.
        command: the command that made the configurations.
        composed: overrides and configuration of every run.
        group_by: what the runs of one job share: model or none.

    Raises:
        UsageError: for runs that no sweep can have, and if none of them can run at all.
    """
    places = sorted({config.results for _, config in composed})
    if len(places) > 1:
        raise UsageError(
            f"results={','.join(places)}: a sweep has one directory of results. Run it once for each."
        )
    runs: dict[str, SweepRun] = {}
    groups: dict[str, int] = {}
    for overrides, config in composed:
        run = _checked_run(overrides, config)
        identity = run_identity(run.config)
        if identity in runs:
            continue
        if run.refusal is None:
            shared = identity
            if group_by == "model":
                shared = json.dumps(asdict(run.config.model))
            run = replace(run, group=groups.setdefault(shared, len(groups)))
        runs[identity] = replace(run, name=f"{len(runs):03}-{run.name}")
    if not groups:
        _raise([UsageError(run.refusal) for run in runs.values()])
    return Sweep(_name(label, runs), command, places[0], [*runs.values()])


def _name(label: str | None, runs: dict[str, SweepRun]) -> str:
    """Return the name of a sweep: its label, and a digest of the identities of its runs."""
    if label is None:
        models = dict.fromkeys(run.config.model.name for run in runs.values())
        label = "-".join(models)
    digest = hashlib.sha256("\n".join(runs).encode()).hexdigest()[:10]
    # The name is a folder's, while the label may be a table in a folder of the user's.
    return f"{label}-{digest}".replace("/", "-")


def _checked_run(overrides: list[str], config: RunConfig) -> SweepRun:
    """Return a run that has no number and no group yet."""
    url = config.judge.url
    if url and public_url(url) != url:
        raise UsageError(
            f"judge.url={public_url(url)}: a sweep's plan is a file, and what is secret in the address would stand in "
            "it. Leave it out, or run one setting after another, without -m."
        )
    config = with_tasks(config)
    refusal = None
    try:
        config = check(config)
    except UsageError as error:
        refusal = str(error)
    name = f"{config.model.name}-{config.method['name']}"
    if config.tokens is not None:
        name += f"-{config.tokens}"
    return SweepRun(name, overrides, config, refusal=refusal)


def begin(sweep: Sweep) -> None:
    """Write the plan, and the states of refused runs.

    States of runs that are done or under way stay; those of other runs are deleted.

    Raises:
        UsageError: if nothing can be written there.
    """
    records.prepare(sweep.results)
    sweep.directory.mkdir(parents=True, exist_ok=True)
    write_json(sweep.directory / PLAN, _plan_file(sweep))
    for run in sweep.cells:
        path = sweep.state_path(run)
        if run.refusal is not None:
            ended = records.now()
            write_json(path, new_state(REFUSED, error=run.refusal, ended=ended))
            continue
        state = read_if_intact(path)
        done = state is not None and state["status"] == DONE
        if not done and not is_taken(path, state):
            path.unlink(missing_ok=True)


def _plan_file(sweep: Sweep) -> dict:
    """Return the content of plan.json."""
    cells = []
    for run in sweep.cells:
        cell = asdict(run)
        # A refusal is in the run's state.
        del cell["refusal"]
        cells.append(cell)
    return {
        "name": sweep.name,
        "command": sweep.command,
        "written": records.now(),
        "zipeval": __version__,
        "git": records.git_revision(),
        "cells": cells,
    }


def end(sweep: Sweep) -> None:
    """Raise the errors of the runs, once the jobs are over.

    Raises:
        Stopped: if a run was stopped.
        RunError: if a run failed, or has no end.
        UsageError: if a run was refused, or another process works on it.
    """
    errors: list[UsageError | RunError] = []
    open_ends = 0
    for run in sweep.cells:
        path = sweep.state_path(run)
        state = read_state(path)
        if is_taken(path, state):
            errors.append(UsageError(_taken_message(sweep, run, state)))
        elif state is None or state["status"] == RUNNING:
            open_ends += 1
        elif state["status"] != DONE:
            errors.append(ERRORS[state["status"]](state["error"]))
    # After a stop it is clear why runs have no end.
    stopped = any(isinstance(error, Stopped) for error in errors)
    if open_ends and not stopped:
        message = f"{open_ends} of {len(sweep.cells)} runs have no end"
        errors.append(lost(sweep, message))
    if errors:
        _raise(errors)


def evaluated(sweep: Sweep) -> list[str]:
    """Return the paths of the records of all runs that are done."""
    paths = []
    for run in sweep.cells:
        state = read_state(sweep.state_path(run))
        if state is not None:
            paths += state["records"]
    return paths


def _taken_message(sweep: Sweep, run: SweepRun, state: dict) -> str:
    return (
        f"{run.name}: process {state['pid']} on {state['host']} has been at it since {state['started']}. "
        f"`{sweep.status_command}` shows how far it is."
    )


def lost(sweep: Sweep, what: str) -> RunError:
    """Return the error of a job that died without a word, as one that was killed."""
    return RunError(
        f"sweep {sweep.name}: {what}. `{sweep.status_command}` shows which and why; the same command continues it."
    )


def _raise(errors: list[UsageError | RunError]) -> None:
    """Raise one error for all; a stop counts most, a failed run more than a refused one."""
    kinds = {type(error) for error in errors}
    kind = next(kind for kind in (Stopped, RunError, UsageError) if kind in kinds)
    messages = dict.fromkeys(str(error) for error in errors)
    raise kind("\nzipeval: ".join(messages))
