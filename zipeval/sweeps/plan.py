"""What a sweep will come to, before anything starts: samples, visual tokens, and hours as far as they are measured."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean

from zipeval import models
from zipeval.benchmarks import BENCHMARKS, check_limit, task_folder
from zipeval.benchmarks.protocols import PROTOCOLS
from zipeval.benchmarks.videoqa import SETS
from zipeval.config.schema import RunConfig
from zipeval.errors import BudgetError, UsageError
from zipeval.inference.session import Session
from zipeval.results import records
from zipeval.results.samples import Pace, count, of_run, pace
from zipeval.sweeps.sweep import Cell, Sweep
from zipeval.utils import console

# In place of what a run needs and a plan does not.
STAND_INS = {
    "judge.url": "http://judge/v1",
    "judge.model": "judge",
    "data.videos": "/dev/null",
}
ENOUGH = 128  # samples of each task, to measure how long they take


@dataclass(frozen=True)
class Estimate:
    """A run before it starts.

    Attributes:
        cell: of its sweep.
        samples: by task; None where only the run can tell.
        mean, final: visual tokens of the model's largest picture that will enter the decoder's layers; None: not known.
        paces: by task, what was measured.
        refusal: why it will not run.
        lacks: what has to be made first.
    """

    cell: Cell
    samples: dict[str, int | None]
    mean: float | None
    final: int | None
    paces: dict[str, Pace | None]
    refusal: str | None
    lacks: str | None

    @property
    def hours(self) -> float | None:
        """Of a device's time, where every task was measured and counted."""
        parts = [(self.samples[task], self.paces[task]) for task in self.samples]
        if self.refusal or any(None in part for part in parts):
            return None
        return sum(number * its.seconds for number, its in parts) / 3600


def show(sweep: Sweep, missing: list[str]) -> None:
    """Print the plan of a sweep; nothing is started.

    Args:
        missing: settings among STAND_INS that the command did not give.
    """
    found = (
        records.read_all(sweep.results)
        if Path(sweep.results).expanduser().is_dir()
        else []
    )
    estimates = [_estimate(cell, found) for cell in sweep.cells]
    out = console.console()
    rows = console.table(
        "run", "tasks", "samples", "mean", "final", "hours", left=("run",)
    )
    for its in estimates:
        mean = None if its.mean is None else f"{its.mean:.1f}"
        hours = None if its.hours is None else f"{its.hours:.3g}"
        tasks, samples = (
            len(its.cell.config.tasks),
            its.samples and _total(its.samples.values()),
        )
        console.add(rows, its.cell.name, tasks, samples or None, mean, its.final, hours)
    out.print(rows)
    out.print()
    for line in _notes(sweep, estimates, missing):
        out.print(line, markup=False)


def _estimate(cell: Cell, found: list[dict]) -> Estimate:
    config = cell.config
    refusal, session, entering = cell.refusal, None, None
    try:
        for task in config.tasks:
            task_folder(task)
            check_limit(task, config.limit)
        session = _session(config)
        entering = session and session.entering([session.shape.picture])
    except (UsageError, BudgetError) as error:
        refusal = refusal or str(error)
    run = of_run(config.model.name, config.method, config.tokens, config.budget)
    alike = {name: run[name] for name in ("model", "method")}
    return Estimate(
        cell=cell,
        samples={task: count(task, config) for task in config.tasks}
        if refusal is None
        else {},
        mean=fmean(entering) if entering else None,
        final=entering[-1] if entering else None,
        paces={
            task: pace(found, {"task": task, **run}, {"task": task, **alike})
            for task in config.tasks
        },
        refusal=refusal,
        lacks=session and _lacks(session),
    )


def _lacks(session: Session) -> str | None:
    """What is said of a tuned projector that is not there; whether one is of the model, only weights can tell."""
    path = session.config.projector
    if path is None or Path(path).expanduser().is_file():
        return None
    try:
        _ = session.projector
    except UsageError as error:
        return str(error)


def _session(config: RunConfig) -> Session | None:
    """Of a model of known size, which may have no weights here."""
    model = config.model
    if not (model.path or model.embedded or model.name in models.family(model).SIZES):
        return None
    sized = replace(
        config, tasks=["zipeval_shapes"]
    )  # on which they do not depend: questions may not be there yet
    return Session(sized, models.sketch(model))


def _total(numbers: Iterable[int | None]) -> str:
    """'1,234', with '+ ?' behind where some are not known."""
    numbers = [*numbers]
    known = sum(number for number in numbers if number is not None)
    return " + ".join([f"{known:,}"] * bool(known) + ["?"] * (None in numbers))


def _column(task: str) -> str:
    return BENCHMARKS[task].column if task in BENCHMARKS else task


def _notes(
    sweep: Sweep, estimates: list[Estimate], missing: list[str]
) -> Iterator[str]:
    samples = {
        task: number for its in estimates for task, number in its.samples.items()
    }
    if samples:
        yield "Samples: " + ", ".join(
            f"{_column(task)} {_total([number])}" for task, number in samples.items()
        )
    yield "Tokens are those of the model's largest picture: mean over the decoder's layers, and in the last one."
    planned = [its for its in estimates if its.refusal is None]
    measured = [its for its in planned if its.hours is not None]
    if measured:
        devices = sorted(
            {its.device for estimate in measured for its in estimate.paces.values()}
        )
        hours = sum(its.hours for its in measured)
        yield f"{len(measured)} of {len(planned)} runs: {hours:.3g} hours, as measured on {', '.join(devices)}."
    unmeasured = [its for its in planned if its.hours is None and its.lacks is None]
    if unmeasured:
        command = re.sub(r" limit=\S+", "", sweep.command) + f" limit={ENOUGH}"
        yield f"{len(unmeasured)} of {len(planned)} runs are not measured. `{command}` measures them."
    needed = [name for name in missing if any(_needs(task, name) for task in samples)]
    if needed:
        yield f"To run it, add {' '.join(f'{name}=' for name in needed)}."
    yield from dict.fromkeys(f"Missing: {its.lacks}" for its in planned if its.lacks)
    yield from dict.fromkeys(
        f"Refused: {its.refusal}" for its in estimates if its.refusal
    )


def _needs(task: str, setting: str) -> bool:
    return task in (SETS if setting == "data.videos" else PROTOCOLS)
