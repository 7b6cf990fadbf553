"""`zipeval baseline` and `zipeval check`."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path

from zipeval.cli.arguments import Command
from zipeval.cli.output import hush
from zipeval.cli.settings import RESULTS, SWITCH, Setting, path, switch
from zipeval.errors import UsageError

FILE = "results/baselines/shapes.json"


def _file_to_write(name: str, value: str) -> Path:
    if not value:
        raise UsageError(f"{name}=: name the file to write, such as {name}={FILE}.")
    return path(name, value)


BASELINE = Command(
    "baseline",
    "[results=DIR] [out=FILE]",
    "Write what records hold as a small file to commit, for `zipeval check`.",
    settings=(
        RESULTS,
        Setting("out", "the file to write", "FILE", _file_to_write, FILE),
    ),
)


def baseline(arguments: list[str]) -> None:
    """Run `zipeval baseline`."""
    options = BASELINE.parse(arguments)
    from zipeval.regression.baseline import write

    count = write(options.results, options.out)
    command = shlex.join(
        [
            "zipeval",
            "check",
            "--against",
            str(options.out),
            f"results={options.results}",
        ]
    )
    print(
        f"{options.out} holds {count} record{'s' if count > 1 else ''}: commit it. `{command}` compares."
    )


def _percent(name: str, value: str) -> float:
    """Return percent of a score.

    Raises:
        UsageError: for a number that is none.
    """
    try:
        number = float(value)
    except ValueError:
        number = -1.0
    if not 0 <= number <= 100:
        raise UsageError(
            f"{name}={value}: expected percent of a score, from 0 to 100, such as --max-drop 1.0."
        )
    return number


CHECK = Command(
    "check",
    "--against FILE [--max-drop 1.0] [--allow-other-code] [--junit FILE] [--format text|github] [results=DIR]",
    "Compare records with a baseline: exit code 0 as good, 1 regression, 2 cannot compare.",
    "Of 20 samples one may have another answer, from 200 up one in 100.",
    settings=(
        Setting(
            "against", "the baseline, as `zipeval baseline` wrote it", "FILE", path
        ),
        Setting(
            "max_drop",
            "by how many percent a score may be lower",
            "PERCENT",
            _percent,
            "1.0",
        ),
        Setting(
            "allow_other_code",
            "compare records that another version of zipeval made",
            read=switch,
            default=False,
            choices=SWITCH,
            flag=True,
        ),
        Setting("junit", "write the outcome as JUnit XML, too", "FILE", path),
        Setting(
            "format",
            "github adds annotations for GitHub Actions",
            default="text",
            choices=("text", "github"),
        ),
        RESULTS,
    ),
    examples=((f"zipeval check --against {FILE} --max-drop 0.5", ""),),
)


def check(arguments: list[str]) -> None:
    """Run `zipeval check`: exit code 1 for a regression, 2 for what cannot be compared."""
    options = CHECK.parse(arguments)
    if options.against is None:
        raise UsageError(f"check: name a baseline, `zipeval check --against {FILE}`.")
    from zipeval.regression import gate
    from zipeval.regression import verdicts as verdicts_report

    verdicts = gate.check(
        options.against, options.results, options.max_drop, options.allow_other_code
    )
    try:
        print(verdicts_report.text(verdicts))
        if options.format == "github":
            print(verdicts_report.annotations(verdicts))
        sys.stdout.flush()
    except BrokenPipeError:  # `zipeval check | head`: the exit code is what counts
        hush()
    if options.junit is not None:
        verdicts_report.write_junit(verdicts, options.junit)
    verdicts_report.conclude(verdicts, options.against, options.results)
