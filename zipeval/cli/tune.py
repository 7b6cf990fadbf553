"""`zipeval tune`."""

from __future__ import annotations

import shlex

from zipeval import ranks
from zipeval.cli.output import hide_bars
from zipeval.composition import compose
from zipeval.errors import UsageError

TUNED_BY = {"fraction": float, "lr": float, "epochs": int, "batch_size": int, "accumulate": int}
TAKEN = "`zipeval --help` shows what `zipeval tune` takes."
IDLE_IN_TUNE = ("suite", "tasks", "limit", "judge", "results", "projector")


def tune(arguments: list[str]) -> None:
    """`zipeval tune`: its own settings, and overrides of `zipeval run` for model and method."""
    from dataclasses import fields

    from zipeval.tune import Settings
    from zipeval.tune import tune as train

    own, overrides = {}, []
    for argument in arguments:
        name, assigned, value = argument.partition("=")
        if not assigned or name.startswith("-"):
            raise UsageError(f"{argument}: expected NAME=VALUE. {TAKEN}")
        idle = name.startswith(("data.", "runner.")) and name != "runner.workers"
        if name.partition(".")[0] in IDLE_IN_TUNE or idle:
            raise UsageError(f"{argument}: `zipeval tune` has no use for it, it answers no questions. Leave it out.")
        if name in (field.name for field in fields(Settings)):
            own[name] = _number(name, value) if name in TUNED_BY else value
        else:
            overrides.append(argument)
    settings = Settings(**own)
    named = any(override.startswith("method=") for override in overrides)
    config = compose([*["method=visionzip"] * (not named), *overrides])
    hide_bars()
    path = train(config, settings)
    if ranks.first():
        same = [o for o in overrides if not o.startswith(("method=", "logger=", "runner.", "seed="))]
        command = shlex.join(["zipeval", "run", "method=visionzip_tuned", *same, f"projector={path}"])
        print(f"{path} is tuned: `{command}` uses it.")


def _number(name: str, value: str) -> float | int:
    """A setting of `zipeval tune`.

    Raises:
        UsageError: for a number that is none.
    """
    try:
        return TUNED_BY[name](value)
    except ValueError:
        what = "a whole number" if TUNED_BY[name] is int else "a number"
        raise UsageError(f"{name}={value}: expected {what}. {TAKEN}") from None
