"""Run all checks of a method on all models, and print the table of their outcomes."""

from __future__ import annotations

import traceback
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product

import torch

from zipeval.contract.checks import (
    CHECKS,
    BrokenError,
    Candidate,
    Check,
    NotApplicable,
)
from zipeval.contract.subjects import SUBJECTS, Subject
from zipeval.errors import BudgetError, UsageError
from zipeval.utils import console

PASSED, FAILED, NOT_APPLICABLE = "passed", "FAILED", "n/a"


@dataclass(frozen=True)
class Outcome:
    """The outcome of a check on a model.

    Attributes:
        why: what is broken, or why the check has nothing to say; empty where it passed.
    """

    check: str
    subject: str
    result: str
    why: str = ""


def run_checks(candidate: Candidate) -> Iterator[Outcome]:
    """Yield the outcome of each check on each model."""
    # On models so small, threads wait for each other.
    torch.set_num_threads(1)
    for subject, (name, check) in product(SUBJECTS, CHECKS.items()):
        result, why = _run_check(check, candidate, subject)
        yield Outcome(name, subject.name, result, why)


def _run_check(check: Check, candidate: Candidate, subject: Subject) -> tuple[str, str]:
    """Return the result of a check on a model, and the reason for it."""
    try:
        check(candidate, subject)
    # UsageError: settings that the method refuses on this model.
    except (NotApplicable, UsageError) as error:
        return NOT_APPLICABLE, str(error)
    # BudgetError: the engine counted.
    except (BrokenError, BudgetError) as error:
        return FAILED, str(error)
    # The method is somebody else's code, and may raise anything.
    except Exception as error:
        where = traceback.extract_tb(error.__traceback__)[-1]
        place = f"{where.filename}:{where.lineno}"
        return FAILED, f"{type(error).__name__}: {error} ({place})"
    return PASSED, ""


def show(name: str, outcomes: list[Outcome]) -> None:
    """Print a line for each check and a column for each model, and below it what was broken and what was left out."""
    subjects = [subject.name for subject in SUBJECTS]
    results = {(outcome.check, outcome.subject): outcome.result for outcome in outcomes}
    table = console.table(name, *subjects, left=(name, *subjects))
    for check in CHECKS:
        row = [results[check, subject] for subject in subjects]
        console.add(table, check, *row)
    out = console.console()
    out.print(table)
    out.print()
    for (result, why), places in _reasons(outcomes).items():
        out.print(f"{result}: {_describe(places)}: {why}.", markup=False)
    totals = Counter(outcome.result for outcome in outcomes)
    results_in_order = (PASSED, FAILED, NOT_APPLICABLE)
    counts = [f"{totals[result]} {result}" for result in results_in_order]
    out.print(", ".join(counts) + ".", markup=False)


def _reasons(outcomes: list[Outcome]) -> dict[tuple[str, str], list[Outcome]]:
    """Return the outcomes that are no pass by result and reason; failures first."""
    reasons: dict[tuple[str, str], list[Outcome]] = defaultdict(list)
    for result, outcome in product((FAILED, NOT_APPLICABLE), outcomes):
        if outcome.result == result:
            # The sentence that it becomes a part of has a full stop of its own.
            reasons[result, outcome.why.rstrip(".")].append(outcome)
    return dict(reasons)


def _describe(outcomes: list[Outcome]) -> str:
    """Name the checks and the models of some outcomes."""
    checks = list(dict.fromkeys(outcome.check for outcome in outcomes))
    subjects = list(dict.fromkeys(outcome.subject for outcome in outcomes))
    # Of many checks their number is enough.
    what = " and ".join(checks) if len(checks) < 3 else f"{len(checks)} checks"
    return f"{what}, on {', '.join(subjects)}"
