"""The entry point: which command runs, and which exit code an error is. Commands import what is heavy themselves."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable

from zipeval import __version__, ranks
from zipeval.cli.measure import analyze, bench, visualize
from zipeval.cli.output import hush
from zipeval.cli.regression import baseline, check
from zipeval.cli.resources import convert, data, doctor, list_choices
from zipeval.cli.results import report, show, status, table
from zipeval.cli.run import plan, run
from zipeval.cli.tune import tune
from zipeval.errors import RunError, Stopped, UsageError, did_you_mean

HELP = f"""zipeval {__version__}: honest measurement of visual-token reduction

  zipeval run model=MODEL method=METHOD tokens=N   evaluate; -m sweeps, e.g. zipeval run -m tokens=48,32,16
  zipeval plan OVERRIDES                           what `zipeval run -m OVERRIDES` comes to: runs, samples,
                                                   tokens and, as far as measured, hours; +table=paper_table1
  zipeval status [SWEEP] [results=DIR]             how far runs and sweeps are, and how long they will still take
  zipeval table [results=DIR] [task=TASK]          scores and % of the upper bound; with task=, all its metrics
                [statistics=true] [format=latex]   with intervals; also csv, html, json
                [table=paper/table1 [source=paper]]  in the paper's layout, beside its numbers; or those alone
  zipeval bench model=MODEL method=METHOD,METHOD tokens=N [batch=1,8] [init=random]
                [new_tokens=N] [prompt_tokens=N] [repeats=N] [results=DIR]
                                                   speed and memory beside vanilla's; no data, with init=random no
                                                   weights either
  zipeval tune model=MODEL method=visionzip tokens=N data=FILE.json images=DIR [out=DIR] [fraction=0.1]
               [epochs=1] [lr=1e-3] [batch_size=16] [accumulate=N]
                                                   train the projector for so few tokens (VisionZip‡)
  zipeval show RUN_ID [results=DIR]                scores and provenance of a run; its first letters do
  zipeval report [results=DIR] [out=FILE.html]     all of it on one page, with plots and the tokens that are kept
                 [plots=DIR]                       and the plots as PDF and SVG files
  zipeval analyze redundancy [model=MODEL] [images=DIR] [limit=N] out=DIR
                                                   how concentrated the attention that visual tokens receive is, layer
                                                   by layer, as CSV and plots
  zipeval visualize IMAGE QUESTION [model=MODEL] [method=METHOD,METHOD] [tokens=N] [projector=FILE]
                                     [out=FILE.svg|pdf|png]
                                                   which tokens of an image methods keep, and what is then answered
  zipeval baseline [results=DIR] [out=FILE]        what records hold, as a small file to commit
  zipeval check --against FILE [--max-drop 1.0] [--allow-other-code] [--junit FILE] [--format text|github] [results=DIR]
                                                   records beside that file: 0 as good, 1 regression, 2 cannot compare;
                                                   of 20 samples one may have another answer, from 200 up one in 100
  zipeval convert mini_gemini SRC DST              an official checkpoint into the Hugging Face layout
  zipeval data check suite=SUITE [data.root=DIR]   which data sets are there, and how to get the others
  zipeval list models|methods|tasks|suites|tables|experiments|launchers
                                                   what there is to choose from
  zipeval doctor                                   what will work on this machine and what will not

zipeval run --help shows every setting.
"""
FAILED, USAGE_ERROR, INTERRUPTED = 1, 2, 130


def main() -> None:
    """Console entry point. Exit codes: 0 done, 1 failed, 2 refused, 130 stopped by Ctrl-C or a scheduler."""
    try:
        code = _execute()
    except KeyboardInterrupt:  # perhaps a second one, while it was told of the first
        code = INTERRUPTED
    if code == INTERRUPTED:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # one more has nothing left to stop but the exit
    if code:
        sys.exit(code)


def _execute() -> int:
    """Run the command that was asked for; returns the exit code."""
    command, arguments = (sys.argv[1:2] or ["--help"])[0], sys.argv[2:]
    if command in ("-h", "--help", "help"):
        print(HELP, end="")
        return 0
    if command == "--version":
        print(__version__)
        return 0
    try:
        if command not in COMMANDS:
            raise UsageError(f"{command}: no such command.{did_you_mean(command, COMMANDS)}")
        COMMANDS[command](arguments)
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


COMMANDS: dict[str, Callable[[list[str]], None]] = {
    "run": run,
    "plan": plan,
    "status": status,
    "bench": bench,
    "tune": tune,
    "table": table,
    "show": show,
    "report": report,
    "analyze": analyze,
    "visualize": visualize,
    "baseline": baseline,
    "check": check,
    "convert": convert,
    "list": list_choices,
    "data": data,
    "doctor": doctor,
}
