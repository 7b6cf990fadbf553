"""Estimate what a sweep will come to before anything starts: samples, visual tokens, and hours."""

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
from zipeval.sweeps.sweep import Sweep, SweepRun
from zipeval.utils import console

# Settings that a run needs and a plan does not, with values that pass the checks.
STAND_INS = {
    "judge.url": "http://judge/v1",
    "judge.model": "judge",
    "data.videos": "/dev/null",
}
# Samples of each task that are enough to measure how long one takes.
ENOUGH = 128


@dataclass(frozen=True)
class Estimate:
    """A run before it starts.

    Attributes:
        run: the run of the sweep.
        samples: numbers of samples by task; None where only the run can tell.
        mean: visual tokens of the model's largest picture, mean over the decoder's
            layers; None: not known.
        final: visual tokens that enter the last layer; None: not known.
        paces: what a sample took in records, by task; None: not measured.
        refusal: why the run cannot start.
        lacks: what has to be made first.
    """

    run: SweepRun
    samples: dict[str, int | None]
    mean: float | None
    final: int | None
    paces: dict[str, Pace | None]
    refusal: str | None
    lacks: str | None

    @property
    def hours(self) -> float | None:
        """Return the hours on a device, or None if a task was not measured or counted."""
        if self.refusal:
            return None
        seconds = 0.0
        for task, samples in self.samples.items():
            measured = self.paces[task]
            if samples is None or measured is None:
                return None
            seconds += samples * measured.seconds
        return seconds / 3600


def show(sweep: Sweep, missing: list[str]) -> None:
    """Print the plan of a sweep; nothing is started.

    Args:
        sweep: the sweep.
        missing: settings among STAND_INS that the command did not give.
    """
    measured = []
    if Path(sweep.results).expanduser().is_dir():
        measured = records.read_all(sweep.results)
    estimates = [_estimate(run, measured) for run in sweep.cells]
    rows = console.table(
        "run", "tasks", "samples", "mean", "final", "hours", left=("run",)
    )
    for estimate in estimates:
        console.add(
            rows,
            estimate.run.name,
            len(estimate.run.config.tasks),
            _total(estimate.samples.values()) or None,
            _formatted(estimate.mean, ".1f"),
            estimate.final,
            _formatted(estimate.hours, ".3g"),
        )
    out = console.console()
    out.print(rows)
    out.print()
    for line in _notes(sweep, estimates, missing):
        out.print(line, markup=False)


def _formatted(number: float | None, form: str) -> str | None:
    return None if number is None else format(number, form)


def _estimate(run: SweepRun, measured: list[dict]) -> Estimate:
    """Return what a run will come to, as far as records measured it."""
    config = run.config
    refusal = run.refusal
    session = None
    mean, final = None, None
    try:
        for task in config.tasks:
            task_folder(task)
            check_limit(task, config.limit)
        session = _session(config)
        if session is not None:
            # [layers]
            entering = session.entering([session.shape.picture])
            mean, final = fmean(entering), entering[-1]
    except (UsageError, BudgetError) as error:
        refusal = refusal or str(error)
    samples = {}
    if refusal is None:
        samples = {task: count(task, config) for task in config.tasks}
    return Estimate(
        run=run,
        samples=samples,
        mean=mean,
        final=final,
        paces={task: _pace(measured, config, task) for task in config.tasks},
        refusal=refusal,
        lacks=_missing_projector(session) if session else None,
    )


def _pace(measured: list[dict], config: RunConfig, task: str) -> Pace | None:
    """Return how long a sample took: of this setting, or else of this method at any budget."""
    run = of_run(config.model.name, config.method, config.tokens, config.budget)
    setting = {"task": task, **run}
    any_budget = {"task": task, "model": run["model"], "method": run["method"]}
    return pace(measured, setting, any_budget)


def _missing_projector(session: Session) -> str | None:
    """Return the error of a tuned projector that is not there.

    Whether a projector that is there fits the model, only the weights can tell.
    """
    path = session.config.projector
    if path is None or Path(path).expanduser().is_file():
        return None
    try:
        _ = session.projector
    except UsageError as error:
        return str(error)


def _session(config: RunConfig) -> Session | None:
    """Return a session of a model whose size is known, with or without weights here."""
    model = config.model
    sizes = models.family(model).sizes
    if not (model.path or model.embedded or model.name in sizes):
        return None
    # Sizes do not depend on the tasks, whose questions may not be on this machine yet.
    without_data = replace(config, tasks=["zipeval_shapes"])
    return Session(without_data, models.sketch(model))


def _total(numbers: Iterable[int | None]) -> str:
    """Return the sum as '1,234', and '1,234 + ?' if one number is not known."""
    numbers = list(numbers)
    known = [number for number in numbers if number is not None]
    total = f"{sum(known):,}"
    if len(known) == len(numbers):
        return total if numbers else ""
    return f"{total} + ?" if sum(known) else "?"


def _column(task: str) -> str:
    return BENCHMARKS[task].column if task in BENCHMARKS else task


def _notes(
    sweep: Sweep, estimates: list[Estimate], missing: list[str]
) -> Iterator[str]:
    """Yield the lines below the table of a plan."""
    samples: dict[str, int | None] = {}
    for estimate in estimates:
        samples |= estimate.samples
    if samples:
        counts = [f"{_column(task)} {_total([n])}" for task, n in samples.items()]
        yield f"Samples: {', '.join(counts)}"
    yield "Tokens are those of the model's largest picture: mean over the decoder's layers, and in the last one."
    planned = [estimate for estimate in estimates if estimate.refusal is None]
    yield from _measurement_notes(sweep, planned)
    needed = [f"{setting}=" for setting in missing if _is_needed(setting, samples)]
    if needed:
        yield f"To run it, add {' '.join(needed)}."
    # Several runs may have the same reason, which is printed once.
    lacks = [estimate.lacks for estimate in planned]
    yield from dict.fromkeys(f"Missing: {reason}" for reason in filter(None, lacks))
    refusals = [estimate.refusal for estimate in estimates]
    yield from dict.fromkeys(f"Refused: {reason}" for reason in filter(None, refusals))


def _measurement_notes(sweep: Sweep, planned: list[Estimate]) -> Iterator[str]:
    """Yield the hours of the runs that were measured, and the command that measures the others."""
    measured = [estimate for estimate in planned if estimate.hours is not None]
    if measured:
        devices = set()
        for estimate in measured:
            devices |= {task_pace.device for task_pace in estimate.paces.values()}
        hours = sum(estimate.hours for estimate in measured)
        names = ", ".join(sorted(devices))
        yield f"{len(measured)} of {len(planned)} runs: {hours:.3g} hours, as measured on {names}."
    unmeasured = [
        estimate
        for estimate in planned
        if estimate.hours is None and estimate.lacks is None
    ]
    if unmeasured:
        command = re.sub(r" limit=\S+", "", sweep.command) + f" limit={ENOUGH}"
        yield f"{len(unmeasured)} of {len(planned)} runs are not measured. `{command}` measures them."


def _is_needed(setting: str, tasks: Iterable[str]) -> bool:
    """Return whether a task needs one of the settings in STAND_INS."""
    needing = SETS if setting == "data.videos" else PROTOCOLS
    return not set(tasks).isdisjoint(needing)
