"""A job of a sweep: what Hydra launches, in this process or on a cluster."""

from __future__ import annotations

import sys
import traceback
from dataclasses import dataclass
from typing import Any

from zipeval.errors import RunError, Stopped, UsageError
from zipeval.results import records
from zipeval.sweeps.state import (
    DONE,
    FAILED,
    REFUSED,
    RUNNING,
    STOPPED,
    is_taken,
    new_state,
    read_if_intact,
    write_json,
)
from zipeval.sweeps.sweep import Sweep, SweepRun
from zipeval.utils import ranks


@dataclass
class Job:
    """Runs a group of a sweep, one run after another, in a process that keeps the weights.

    Attributes:
        sweep: the sweep of the group.
        over: whether this process begins no other run.
    """

    sweep: Sweep
    over: bool = False

    def __call__(self, config) -> None:
        """Run those of `config.group`, and write what became of each into its state."""
        for run in self.sweep.cells:
            if run.group == config.group and not self.over:
                self._run(run)

    def _run(self, run: SweepRun) -> None:
        # If the same command was given twice, the other process owns run and state.
        # The first rank looks, and all ranks do as it says.
        path = self.sweep.state_path(run)
        taken = ranks.first() and is_taken(path, read_if_intact(path))
        if ranks.exchange(taken)[0]:
            return
        started = new_state(RUNNING)
        self._record(run, started)
        outcome = self._outcome(run)
        self._record(run, started | outcome | {"ended": records.now()})

    def _outcome(self, run: SweepRun) -> dict[str, Any]:
        """Evaluate a run, and return the part of its state that says how it ended."""
        from zipeval.evaluation import runner

        # An error is turned into its sentence: its traceback would keep the model in
        # memory.
        try:
            paths = runner.evaluate_run(run.config)
        except Stopped as error:
            self.over = True
            return {"status": STOPPED, "error": str(error)}
        except UsageError as error:
            return {"status": REFUSED, "error": str(error)}
        except RunError as error:
            return {"status": FAILED, "error": str(error)}
        except Exception as error:
            return self._bug(run, error)
        return {"status": DONE, "records": paths}

    def _bug(self, run: SweepRun, error: Exception) -> dict[str, Any]:
        """Report a fault of ours or of a method, so that the other runs are still measured."""
        # Other ranks know nothing of the fault and are somewhere within this run:
        # going on would make them wait for ever.
        if ranks.here().count > 1:
            self.over = True
            raise error
        traceback.print_exc()
        sentence = f"{run.name}: {type(error).__name__}: {error}. This is a bug."
        return {"status": FAILED, "error": sentence}

    def _record(self, run: SweepRun, state: dict[str, Any]) -> None:
        if not ranks.first():
            return
        try:
            write_json(self.sweep.state_path(run), state)
        except RunError as error:
            # A disk without room for a state may still have room for a record.
            message = state["error"] or state["status"]
            print(f"zipeval: {error} What it was to say: {message}", file=sys.stderr)
