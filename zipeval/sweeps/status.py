"""Print how far runs and sweeps are, whoever works on them. Imports no torch."""

from __future__ import annotations

from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

from zipeval.config.schema import RunConfig
from zipeval.errors import UsageError, closest
from zipeval.results import records
from zipeval.results.samples import Pace, of_run, pace
from zipeval.sweeps.progress import (
    DIED,
    LEFT,
    UNREADABLE,
    Progress,
    SampleCounts,
    read_plan,
    read_progress,
    recorded_counts,
)
from zipeval.sweeps.state import (
    DONE,
    FAILED,
    REFUSED,
    RUNNING,
    STOPPED,
    lock_holders,
)
from zipeval.sweeps.sweep import FOLDER, PLAN
from zipeval.utils import console

ORDER = (DONE, RUNNING, FAILED, REFUSED, STOPPED, DIED, UNREADABLE, LEFT)
# Runs whose journals can be told apart: the others' may belong to an earlier command.
COUNTED = (DONE, RUNNING, LEFT)


def status(name: str | None, results: str) -> None:
    """Print how far a sweep is, or a line for every sweep and every run.

    Args:
        name: name of the sweep, or a beginning that only one has; None: all.
        results: directory of runs.

    Raises:
        UsageError: if there is no such sweep, or nothing at all.
    """
    place = Path(results).expanduser()
    sweeps = {
        path.parent.name: path.parent
        for path in sorted(place.glob(f"{FOLDER}/*/{PLAN}"))
    }
    written = records.read_all(results)
    holders = lock_holders(place)
    if name is not None:
        directory = _choose(name, results, sweeps)
        _show_sweep(directory, read_progress(directory, written, holders))
        return
    begun = {path.parent.name for path in place.glob("*/*.journal.jsonl")}
    if not (sweeps or written or holders or begun):
        raise UsageError(
            f"results={results}: nothing is there. `zipeval run` makes runs; results=DIR looks elsewhere."
        )
    out = console.console()
    if sweeps:
        out.print(_sweeps_table(sweeps, written, holders))
        out.print()
    out.print(_runs_table(begun, written, holders))


def _choose(name: str, results: str, sweeps: dict[str, Path]) -> Path:
    """Return the folder of the one sweep that has this name, or begins with it."""
    if name in sweeps:
        return sweeps[name]
    matching = [sweep for sweep in sweeps if sweep.startswith(name)]
    if not matching:
        raise UsageError(
            f"status {name}: no such sweep in results={results}.{closest(name, sweeps)} `zipeval status` lists all."
        )
    if len(matching) > 1:
        raise UsageError(
            f"status {name}: {len(matching)} sweeps begin like this: {', '.join(matching)}. Name one."
        )
    return sweeps[matching[0]]


def _sweeps_table(
    sweeps: dict[str, Path], written: list[dict], holders: dict[Path, dict]
):
    """Return a line for each sweep: how many of its runs have each status."""
    rows = console.table("sweep", "runs", *ORDER, left=("sweep",))
    for sweep, directory in sweeps.items():
        runs = read_progress(directory, written, holders)
        counts = Counter(run.status for run in runs)
        numbers = [counts[status] or None for status in ORDER]
        console.add(rows, sweep, len(runs), *numbers)
    return rows


def _runs_table(begun: set[str], written: list[dict], holders: dict[Path, dict]):
    """Return a line for each run: its tasks that are finished, that wait for a judge, and that are under way.

    Args:
        begun: names of runs with a journal, thus with a task that has no end.
    """
    rows = console.table(
        "run",
        "finished",
        "incomplete",
        "samples",
        "last",
        "now",
        left=("run", "last", "now"),
    )
    by_run: dict[str, list[dict]] = defaultdict(list)
    for record in written:
        by_run[Path(record["path"]).parent.name].append(record)
    processes = {path.parent.name: _process(by) for path, by in holders.items()}
    for run in sorted({*by_run, *begun, *processes}):
        run_records = by_run[run]
        waiting = sum(map(records.incomplete, run_records))
        samples = sum(record["samples"]["count"] for record in run_records)
        last = max((record["ended"] for record in run_records), default=None)
        activity = processes.get(run)
        if activity is None and run in begun:
            activity = "left unfinished, nobody is at it"
        finished = len(run_records) - waiting
        console.add(rows, run, finished, waiting or None, samples, last, activity)
    return rows


def _show_sweep(directory: Path, runs: list[Progress]) -> None:
    """Print a sweep: a line for each run, the errors, and the time that is left."""
    plan = read_plan(directory)
    statuses = Counter(run.status for run in runs)
    counts: SampleCounts = {}
    for run in runs:
        counts |= recorded_counts(run)
    summary = [f"{statuses[name]} {name}" for name in ORDER if statuses[name]]
    out = console.console()
    out.print(f"{plan['name']}: {len(runs)} runs, {', '.join(summary)}", markup=False)
    out.print(plan["command"], markup=False)
    out.print()
    out.print(_sweep_table(runs, counts))
    out.print()
    for run in runs:
        if run.state.get("error"):
            out.print(f"{run.name}: {run.state['error']}", markup=False)
    out.print(_time_left(runs, counts), markup=False)
    if not statuses.keys() <= {*COUNTED, REFUSED}:
        out.print("The same command goes on with what has no end.")


def _sweep_table(runs: list[Progress], counts: SampleCounts):
    """Return a line for each run of a sweep."""
    rows = console.table(
        "run",
        "status",
        "answers",
        "of",
        "since",
        "by",
        left=("run", "status", "since", "by"),
    )
    for run in runs:
        # The journals of a failed run do not say whose they are, so that without a
        # record its number of answers is not known.
        known = run.status in COUNTED or run.answered
        answers = run.answered if known else None
        process = _process(run.state) if run.status in (RUNNING, DIED) else None
        total = run.total(counts)
        started = run.state.get("started")
        console.add(rows, run.name, run.status, answers, total, started, process)
    return rows


def _time_left(runs: list[Progress], counts: SampleCounts) -> str:
    """Return how long the rest takes, in words, from what the sweep's own records measured."""
    waiting = [run for run in runs if run.status != DONE and run.group is not None]
    unfinished = [run for run in waiting if run.open_tasks]
    if not unfinished:
        return "Nothing is left to be answered."
    measured = []
    for run in runs:
        measured += run.records.values()
    if not measured:
        return "Time left: nothing is measured yet, the first finished task will tell."
    seconds = 0.0
    uncounted = set()
    for run in unfinished:
        for task in run.open_tasks:
            samples = run.samples(task, counts)
            if samples is None:
                uncounted.add(task)
                continue
            remaining = max(0, samples - run.answers.get(task, 0))
            seconds += remaining * _pace(measured, run.config, task).seconds
    # Runs of one job follow one another; jobs work side by side.
    running = [run.state for run in waiting if run.status == RUNNING]
    jobs = len({(state["host"], state["pid"]) for state in running})
    sentence = f"Time left: about {_duration(seconds / max(1, jobs))}"
    if jobs > 1:
        sentence += f" with {jobs} jobs at it"
    if uncounted:
        tasks = ", ".join(sorted(uncounted))
        sentence += f", without {tasks}, whose samples are not counted"
    sentence += "."
    if {run.status for run in unfinished} - {RUNNING, LEFT}:
        sentence += (
            " What runs without an end had answered is kept, and not counted here."
        )
    return sentence


def _pace(measured: list[dict], config: RunConfig, task: str) -> Pace:
    """Return how long a sample takes, as the record measured it that is most alike.

    The run's own method counts before other methods, the same task before other tasks.
    """
    run = of_run(config.model.name, config.method, config.tokens, config.budget)
    method = {"method": run["method"]}
    same_task = {"task": task}
    return pace(measured, same_task | run, same_task | method, same_task, method, {})


def _duration(seconds: float) -> str:
    minutes = round(seconds / 60)
    if seconds < 90:
        return f"{seconds:.0f} s"
    if minutes < 90:
        return f"{minutes} min"
    return f"{minutes // 60} h {minutes % 60:02} min"


def _process(by: dict[str, Any]) -> str:
    """Return the name of a process, its machine, and its job on a cluster."""
    job = f", job {by['job']}" if by.get("job") else ""
    return f"process {by.get('pid', '?')} on {by.get('host', '?')}{job}"
