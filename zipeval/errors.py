"""Errors that end a run in a sentence or two, without a traceback."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class RunEndingError(Exception):
    """An error that ends a command in a sentence or two.

    Attributes:
        on_all_ranks: every process of a run raises it, and none has to tell the others.
    """

    on_all_ranks = False


class UsageError(RunEndingError):
    """A refused request; exit code 2. Its message names the argument, the value and the next command."""


class NotHereError(UsageError):
    """Weights or data that a run needs are not on this machine and cannot be fetched."""


class TaskLockedError(UsageError):
    """Another process answers this task."""


class RunError(RunEndingError):
    """A run that ended without its result; exit code 1."""


class Stopped(RunError):
    """A run that was asked to stop, and did so behind a batch; exit code 130. Of a sweep, no other run is begun."""


class BudgetError(RunError):
    """Says that what was measured contradicts what was asked for. The fault is the method's, not the user's."""


class IncompatibleError(RunError):
    """An installed package calls something by another name than zipeval knows. No answer is given."""


class MediaError(Exception):
    """An image or a video that cannot be decoded; its sample is recorded as failed, and the run goes on."""


def closest(word: str, known: Iterable[str]) -> str:
    """Return ' Did you mean x?', or nothing where nothing is close."""
    matches = difflib.get_close_matches(word, known, n=1)
    return f" Did you mean {matches[0]}?" if matches else ""


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Return ' Did you mean x? Available: x, y.', with the first part only where something is close."""
    known = sorted(known)
    return f"{closest(word, known)} Available: {', '.join(known)}."
