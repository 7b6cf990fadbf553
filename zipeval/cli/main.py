"""The entry point: which command runs, and which exit code an error is. Commands import what is heavy themselves."""

from __future__ import annotations

import shutil
import signal
import sys
import textwrap
import traceback
from collections.abc import Callable

from zipeval import __version__
from zipeval.cli import (
    completion,
    contract,
    measure,
    regression,
    resources,
    results,
    run,
    tune,
)
from zipeval.cli.arguments import Command
from zipeval.cli.output import hush
from zipeval.errors import RunError, Stopped, UsageError, did_you_mean
from zipeval.utils import ranks

FAILED, USAGE_ERROR, INTERRUPTED = 1, 2, 130
USAGE_WIDTH = 48  # columns of a command's usage, with its summary to the right

COMMANDS: dict[str, tuple[Command, Callable[[list[str]], None]]] = {
    command.name: (command, function)
    for command, function in (
        (run.RUN, run.run),
        (run.PLAN, run.plan),
        (results.STATUS, results.status),
        (results.TABLE, results.table),
        (results.SHOW, results.show),
        (results.REPORT, results.report),
        (results.VIEW, results.view),
        (measure.BENCH, measure.bench),
        (tune.TUNE, tune.tune),
        (measure.ANALYZE, measure.analyze),
        (measure.VISUALIZE, measure.visualize),
        (regression.BASELINE, regression.baseline),
        (regression.CHECK, regression.check),
        (contract.TEST_METHOD, contract.test_method),
        (resources.LIST, resources.list_choices),
        (resources.DATA, resources.data),
        (resources.CONVERT, resources.convert),
        (resources.DOCTOR, resources.doctor),
        (completion.COMPLETION, completion.completion),
    )
}


def main() -> None:
    """Console entry point. Exit codes: 0 done, 1 failed, 2 refused, 130 stopped by Ctrl-C or a scheduler."""
    try:
        code = _execute()
    except KeyboardInterrupt:  # perhaps a second one, while it was told of the first
        code = INTERRUPTED
    except Exception:
        if ranks.here().count == 1:
            raise
        traceback.print_exc()
        code = FAILED
    if code == INTERRUPTED:
        signal.signal(
            signal.SIGINT, signal.SIG_IGN
        )  # one more has nothing left to stop but the exit
    ranks.end(code)


def _execute() -> int:
    """Run the command that was asked for; returns the exit code."""
    command, arguments = (sys.argv[1:2] or ["--help"])[0], sys.argv[2:]
    if command == "help" and arguments:
        command, arguments = arguments[0], ["--help"]
    if command in ("-h", "--help", "help"):
        print(overview(), end="")
        return 0
    if command == "--version":
        print(__version__)
        return 0
    if command == completion.CANDIDATES:
        completion.print_candidates(
            arguments, {name: declared for name, (declared, _) in COMMANDS.items()}
        )
        return 0
    try:
        if command not in COMMANDS:
            raise UsageError(
                f"{command}: no such command.{did_you_mean(command, COMMANDS)}"
            )
        _, function = COMMANDS[command]
        function(arguments)
        ranks.leave()
    except (UsageError, RunError) as error:
        if ranks.first():
            print(f"zipeval: {error}", file=sys.stderr, flush=True)
        ranks.leave()
        codes = {Stopped: INTERRUPTED, UsageError: USAGE_ERROR, RunError: FAILED}
        return next(code for kind, code in codes.items() if isinstance(error, kind))
    except BrokenPipeError:  # `zipeval table | head`
        hush()
    return 0


def overview() -> str:
    """Return the text of `zipeval --help`: each command with its usage and summary."""
    width = max(80, min(shutil.get_terminal_size().columns, 120)) - 1
    lines = [f"zipeval {__version__}: honest measurement of visual-token reduction", ""]
    for command, _ in COMMANDS.values():
        usage = f"zipeval {command.name} {command.usage}".rstrip()
        usage_lines = textwrap.wrap(
            usage, USAGE_WIDTH - 3, subsequent_indent="      ", break_on_hyphens=False
        )
        right = textwrap.wrap(command.summary, width - USAGE_WIDTH)
        for number in range(max(len(usage_lines), len(right))):
            usage_line = usage_lines[number] if number < len(usage_lines) else ""
            summary_line = right[number] if number < len(right) else ""
            lines.append(f"  {usage_line:<{USAGE_WIDTH - 2}}{summary_line}".rstrip())
    lines += [
        "",
        "`zipeval COMMAND --help` explains its settings, `zipeval run --help` all of a run.",
    ]
    return "\n".join(lines) + "\n"
