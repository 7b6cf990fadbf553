"""`zipeval baseline` and `zipeval check`."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path

from zipeval.cli.arguments import choice, settings
from zipeval.cli.output import hush
from zipeval.errors import UsageError


def baseline(arguments: list[str]) -> None:
    """`zipeval baseline`."""
    from zipeval.baseline import write

    given = settings("baseline", arguments, ("results", "out"))
    if given.get("out") == "":
        raise UsageError("out=: name the file to write, such as out=results/baselines/shapes.json.")
    out = Path(given.get("out", "results/baselines/shapes.json")).expanduser()
    results = given.get("results", "results/runs")
    count = write(results, out)
    command = shlex.join(["zipeval", "check", "--against", str(out), f"results={results}"])
    print(f"{out} holds {count} record{'s' if count > 1 else ''}: commit it. `{command}` compares.")


def check(arguments: list[str]) -> None:
    """`zipeval check`: exit code 1 for a regression, 2 for what cannot be compared."""
    from zipeval import gate

    known = ("against", "max_drop", "allow_other_code", "junit", "format", "results")
    given = settings("check", _without_dashes(arguments), known)
    for name, value in given.items():
        if not value:
            raise UsageError(f"--{name.replace('_', '-')}: needs a value. `zipeval --help` shows what there is.")
    if "against" not in given:
        raise UsageError("check: name a baseline, `zipeval check --against results/baselines/shapes.json`.")
    github = choice(given, "format", ("text", "github")) == "github"
    against, drop = Path(given["against"]).expanduser(), _percent(given.get("max_drop", "1.0"))
    results = given.get("results", "results/runs")
    allow = choice(given, "allow_other_code", ("false", "true")) == "true"
    verdicts = gate.check(against, results, drop, allow)
    try:
        print(gate.text(verdicts))
        if github:
            print(gate.annotations(verdicts))
        sys.stdout.flush()
    except BrokenPipeError:  # `zipeval check | head`: the exit code is what counts
        hush()
    if "junit" in given:
        gate.write_junit(verdicts, Path(given["junit"]).expanduser())
    gate.conclude(verdicts, against, results)


FLAGS = ("allow_other_code",)  # of `zipeval check`: they need no value


def _without_dashes(arguments: list[str]) -> list[str]:
    """Return `--max-drop 1.0` and `--max-drop=1.0` as the setting `max_drop=1.0`, a flag alone as `true`."""
    found, rest = [], iter(arguments)
    for argument in rest:
        if argument.startswith("--"):
            name, assigned, value = argument.removeprefix("--").partition("=")
            name = name.replace("-", "_")
            if not assigned:
                value = "true" if name in FLAGS else next(rest, "")
            argument = f"{name}={value}"
        found.append(argument)
    return found


def _percent(value: str) -> float:
    """What max_drop= says.

    Raises:
        UsageError: for a number that is none.
    """
    try:
        number = float(value)
    except ValueError:
        number = -1.0
    if not 0 <= number <= 100:
        raise UsageError(f"max_drop={value}: expected percent of a score, from 0 to 100, such as --max-drop 1.0.")
    return number
