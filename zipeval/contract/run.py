"""All checks of a method on all models, and the table of what came out."""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from zipeval.contract.checks import CHECKS, BrokenError, Candidate, NotApplicable
from zipeval.contract.subjects import SUBJECTS
from zipeval.errors import BudgetError, UsageError
from zipeval.utils import console

PASSED, FAILED, NOT_APPLICABLE = "passed", "FAILED", "n/a"


@dataclass(frozen=True)
class Outcome:
    """What a check came to on a model.

    Attributes:
        why: what is broken, or why the check has nothing to say; empty where it passed.
    """

    check: str
    subject: str
    result: str
    why: str = ""


def run_checks(candidate: Candidate) -> Iterator[Outcome]:
    """Yield the outcome of each check on each model."""
    torch.set_num_threads(1)  # on models so small, threads wait for each other
    for subject in SUBJECTS:
        for name, check in CHECKS.items():
            try:
                check(candidate, subject)
                yield Outcome(name, subject.name, PASSED)
            except (
                NotApplicable,
                UsageError,
            ) as error:  # UsageError: settings that it refuses on this model
                yield Outcome(name, subject.name, NOT_APPLICABLE, str(error))
            except (
                BrokenError,
                BudgetError,
            ) as error:  # BudgetError: the engine counted
                yield Outcome(name, subject.name, FAILED, str(error))
            except (
                Exception
            ) as error:  # the method is somebody else's code, and may raise anything
                where = traceback.extract_tb(error.__traceback__)[-1]
                why = (
                    f"{type(error).__name__}: {error} ({where.filename}:{where.lineno})"
                )
                yield Outcome(name, subject.name, FAILED, why)


def show(name: str, outcomes: list[Outcome]) -> None:
    """Print a line for each check and a column for each model, and below it what was broken and what was left out."""
    subjects = [subject.name for subject in SUBJECTS]
    results = {(outcome.check, outcome.subject): outcome.result for outcome in outcomes}
    table = console.table(name, *subjects, left=(name, *subjects))
    for check in CHECKS:
        console.add(table, check, *(results[check, subject] for subject in subjects))
    out = console.console()
    out.print(table)
    out.print()
    for (result, why), places in _reasons(outcomes).items():
        out.print(f"{result}: {_described(places)}: {why}.", markup=False)
    counts = [
        f"{sum(o.result == result for o in outcomes)} {result}"
        for result in (PASSED, FAILED, NOT_APPLICABLE)
    ]
    out.print(", ".join(counts) + ".", markup=False)


def _reasons(outcomes: list[Outcome]) -> dict[tuple[str, str], list[Outcome]]:
    """Return the outcomes that are no pass by result and reason; failures first."""
    reasons: dict[tuple[str, str], list[Outcome]] = {}
    for result in (FAILED, NOT_APPLICABLE):
        for outcome in outcomes:
            if outcome.result == result:
                reasons.setdefault((result, outcome.why.rstrip(".")), []).append(
                    outcome
                )
    return reasons


def _described(outcomes: list[Outcome]) -> str:
    """Return which checks on which models some outcomes are of."""
    checks = list(dict.fromkeys(outcome.check for outcome in outcomes))
    subjects = list(dict.fromkeys(outcome.subject for outcome in outcomes))
    what = " and ".join(checks) if len(checks) < 3 else f"{len(checks)} checks"
    return f"{what}, on {', '.join(subjects)}"
