"""The state of each run of a sweep: a file that its job writes, and the processes that are at work.

RESULTS/sweeps/NAME/plan.json    the plan: the configuration of every run
RESULTS/sweeps/NAME/RUN.json     the state of one run
"""

from __future__ import annotations

import json
import os
import socket
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil

from zipeval.errors import RunError, UsageError
from zipeval.results import records
from zipeval.results.lock import holder

RUNNING = "running"
DONE = "done"
FAILED = "failed"
REFUSED = "refused"
STOPPED = "stopped"

# Setting a machine's clock moves the start time of its processes, by less than these
# seconds. No system gives the number of a process again so soon.
CLOCK_TOLERANCE = 60


def new_state(
    status: str, error: str | None = None, ended: str | None = None
) -> dict[str, Any]:
    """Return the state of a run that this process works on.

    Args:
        status: one of RUNNING, DONE, FAILED, REFUSED, STOPPED.
        error: the sentence that says why the run failed or was refused.
        ended: time at which the run ended; None while it runs.
    """
    return {
        "status": status,
        "host": socket.gethostname(),
        "pid": os.getpid(),
        # A later process may get the same number, but not the same start time.
        "born": psutil.Process().create_time(),
        "job": os.environ.get("SLURM_JOB_ID"),
        "started": records.now(),
        "ended": ended,
        "error": error,
        "records": [],
    }


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write a plan or a state, whole or not at all.

    Raises:
        RunError: if there is no room, or no permission.
    """
    text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
    try:
        records.atomic_write(path, text)
    except OSError as error:
        raise RunError(
            f"{path}: cannot be written ({error.strerror}). Make room and run this again."
        ) from error


def read_state(path: Path) -> dict[str, Any] | None:
    """Return the state of a run, or None if no job has begun it.

    Raises:
        UsageError: if the file cannot be read.
    """
    try:
        state = json.loads(path.read_text(encoding="utf-8"))
        # A file that was cut off may hold no more than `{}` or `0`.
        state["status"]
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(
            f"{path}: not a readable state ({error}). Delete it and run the sweep's command again."
        ) from error
    return state


def read_if_intact(path: Path) -> dict[str, Any] | None:
    """Return the state of a run; None without one, or if its machine died while writing it."""
    with suppress(UsageError):
        return read_state(path)


def lock_holders(results: Path) -> dict[Path, dict]:
    """Return who holds the lock of each run's task now.

    A process that holds a lock itself must not ask.

    Args:
        results: directory of runs.
    """
    holders = {}
    for path in results.glob("*/*.lock"):
        process = holder(path)
        if process is not None:
            holders[path] = process
    return holders


def locks_of(state: dict[str, Any], holders: dict[Path, dict]) -> set[Path]:
    """Return the locks that the process of a state holds."""
    process = (state.get("host"), state.get("pid"))
    return {
        path
        for path, by in holders.items()
        if (by.get("host"), by.get("pid")) == process
    }


def is_alive(state: dict[str, Any], holders: dict[Path, dict]) -> bool:
    """Return whether another process works on the run of a state.

    Processes of other machines cannot be seen; the locks that they hold can.
    """
    if state["host"] != socket.gethostname():
        return bool(locks_of(state, holders))
    if state["pid"] == os.getpid():
        return False
    try:
        process = psutil.Process(state["pid"])
        zombie = process.status() == psutil.STATUS_ZOMBIE
        clock_difference = abs(process.create_time() - state.get("born", 0))
    except psutil.NoSuchProcess:
        return False
    return not zombie and clock_difference < CLOCK_TOLERANCE


def is_taken(path: Path, state: dict[str, Any] | None) -> bool:
    """Return whether another process works on the run whose state lies at this path."""
    if state is None or state["status"] != RUNNING:
        return False
    return is_alive(state, lock_holders(path.parents[2]))
