"""Commands about results: `zipeval status`, `table`, `show` and `report`."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from zipeval.cli.arguments import Command
from zipeval.cli.run_settings import task_names
from zipeval.cli.settings import (
    RESULTS,
    SWITCH,
    Operand,
    Setting,
    number,
    path,
    switch,
    text,
)
from zipeval.errors import UsageError

if TYPE_CHECKING:
    from zipeval.reporting.tables import Table

# The format of a table's file.
SUFFIXES = {
    ".md": "markdown",
    ".csv": "csv",
    ".tex": "latex",
    ".html": "html",
    ".json": "json",
}


def formats() -> list[str]:
    """Return the formats of a table."""
    from zipeval.reporting.render import FORMATS

    return [*FORMATS]


def layouts() -> list[str]:
    """Return the published tables."""
    from zipeval.reporting.paper import TABLES

    return [f"paper/{name}" for name in sorted(TABLES)]


def run_ids() -> list[str]:
    """Return the runs in the usual directory of results."""
    return sorted(
        {record.parent.name for record in Path(RESULTS.default).glob("*/*.json")}
    )


def sweep_names() -> list[str]:
    """Return the sweeps in the usual directory of results."""
    return sorted(
        plan.parent.name for plan in Path(RESULTS.default).glob("sweeps/*/plan.json")
    )


def tcp_port(name: str, value: str) -> int:
    """Return the value as the number of a port."""
    if not value.isdecimal() or int(value) > 65535:
        raise UsageError(
            f"{name}={value}: expected a number up to 65535, such as {name}=8000; 0 takes a free one."
        )
    return int(value)


STATUS = Command(
    "status",
    "[SWEEP] [results=DIR]",
    "Say how far runs and sweeps are, and how long they will still take.",
    "Without a sweep it lists all sweeps and runs.",
    operands=(
        Operand(
            "SWEEP",
            "name of a sweep, or the beginning of it",
            suggestions=sweep_names,
            required=False,
        ),
    ),
    misused="name one sweep, or none to list all.",
    settings=(RESULTS,),
)


def status(arguments: list[str]) -> None:
    """Run `zipeval status [SWEEP]`."""
    options = STATUS.parse(arguments)
    from zipeval.sweeps.status import status as show

    show(options.operands[0] if options.operands else None, options.results)


def names(name: str, value: str) -> list[str]:
    """Return the values that commas join."""
    listed = [part.strip() for part in value.split(",") if part.strip()]
    if not listed:
        raise UsageError(
            f"{name}={value}: expected names of benchmarks, such as {name}=POPE,GQA."
        )
    return listed


TABLE = Command(
    "table",
    "[results=DIR] [task=TASK] [columns=NAMES] [out=FILE] [NAME=VALUE ...]",
    "Print scores and their percentages of the upper bound.",
    "All records of a directory, one table for each model and way to run it. The upper bound is method=vanilla.",
    settings=(
        Setting(
            "results", "directory of the records", "DIR", default_text="results/runs"
        ),
        Setting(
            "task",
            "one benchmark, with all its metrics",
            "TASK",
            text,
            choices=task_names,
        ),
        Setting(
            "statistics",
            "add 95% intervals and which differences are significant",
            read=switch,
            default=False,
            choices=SWITCH,
        ),
        Setting(
            "columns",
            "these benchmarks only, in this order",
            "NAMES",
            names,
            (),
            "all",
            several=True,
        ),
        Setting(
            "format",
            "how the table is written",
            default_text="markdown, or two lines a cell where a terminal is too narrow for it; of out=, by its suffix",
            choices=formats,
        ),
        Setting(
            "out", "write a file instead: .md, .csv, .tex, .html or .json", "FILE", path
        ),
        Setting(
            "table",
            "the layout of one of the paper's tables, beside its numbers",
            "NAME",
            text,
            choices=layouts,
        ),
        Setting(
            "source",
            "with table=: your records beside the paper's numbers, or the paper's alone",
            default="records",
            choices=("records", "paper"),
        ),
    ),
    examples=(
        ("zipeval table task=pope", "accuracy, F1 and the other metrics of POPE"),
        ("zipeval table columns=POPE,GQA statistics=true out=table.tex", "for a paper"),
        (
            "zipeval table table=paper/table1 source=paper",
            "what VisionZip's Table 1 printed",
        ),
    ),
)


def table(arguments: list[str]) -> None:
    """Run `zipeval table`."""
    options = TABLE.parse(arguments)
    from zipeval.reporting import paper
    from zipeval.reporting.columns import chosen_tables

    if options.source == "paper" and not options.table:
        raise UsageError(
            "source=paper: say which of its tables, such as table=paper/table1."
        )
    name = (options.table or "").removeprefix("paper/")
    _check_idle(options, name in paper.SPEED)
    form = _format(options)
    if not options.table:
        shown = chosen_tables(
            options.results or paper.RESULTS,
            options.columns,
            task=options.task,
            statistics=options.statistics,
        )
    elif options.source == "paper":
        shown = _published(name, options.columns)
    else:
        shown = paper.measured(
            name, options.results, options.statistics, options.columns
        )
    if options.out is None:
        from zipeval.reporting.terminal import print_tables

        print_tables(shown, form)
    else:
        _write(options.out, shown, form)


def _published(name: str, columns: Sequence[str]) -> list[Table]:
    """Return a published table, with the columns that are asked for."""
    from zipeval.reporting import paper
    from zipeval.reporting.columns import choose, with_columns

    table = paper.published(name)
    return with_columns([table], choose(columns, table.columns)) if columns else [table]


def _format(options) -> str | None:
    """Return the format that is asked for, by name or by the suffix of the file.

    Raises:
        UsageError: for a suffix of no format, and for a file that cannot be written.
    """
    if options.out is None:
        return options.format
    if options.format is None and options.out.suffix not in SUFFIXES:
        raise UsageError(
            f"out={options.out}: expected a file that ends in {', '.join(SUFFIXES)}, or format= beside it."
        )
    directory = options.out.parent
    if options.out.is_dir():
        raise UsageError(
            f"out={options.out}: is a directory. Name a file in it, such as {options.out / 'table.csv'}."
        )
    if not directory.is_dir():
        raise UsageError(
            f"out={options.out}: there is no directory {directory}. Make it with `mkdir -p {directory}`."
        )
    if not os.access(directory, os.W_OK):
        raise UsageError(
            f"out={options.out}: {directory} cannot be written to. Name a file elsewhere."
        )
    return options.format or SUFFIXES[options.out.suffix]


def _write(file: Path, tables: list[Table], form: str) -> None:
    """Write tables to a file, and print its path."""
    from zipeval.reporting.render import render
    from zipeval.results.records import atomic_write

    try:
        atomic_write(file, render(tables, form) + "\n")
    except OSError as error:
        raise UsageError(
            f"out={file}: cannot be written ({error.strerror}). Name a file elsewhere."
        ) from error
    print(file)


def _check_idle(options, is_speed: bool) -> None:
    """Raise UsageError for a setting that has no part in the layout that is asked for."""
    idle = []
    if options.table and options.task:
        idle.append(f"task={options.task}")
    if options.source == "paper" and options.results:
        idle.append(f"results={options.results}")
    if options.statistics and (options.source == "paper" or is_speed):
        idle.append("statistics=true")
    for setting in idle:
        raise UsageError(
            f"{setting}: table={options.table} source={options.source} has no use for it. Leave it out."
        )


SHOW = Command(
    "show",
    "RUN_ID [sample=N] [results=DIR]",
    "Print scores and provenance of a run, or one of its samples.",
    "Provenance is everything that its scores depend on: weights, data, code, versions, machine and configuration.",
    operands=(
        Operand("RUN_ID", "name of a run, or the beginning of it", suggestions=run_ids),
    ),
    misused="name one run, `zipeval show RUN_ID`, or the beginning of its name.",
    settings=(
        RESULTS,
        Setting(
            "sample",
            "one sample: its question, and the answers of this run and of the upper bound",
            "N",
            number,
        ),
        Setting(
            "task", "the task of the sample, where the run has several", "TASK", text
        ),
    ),
    examples=(("zipeval show tiny_llava-visionzip-16 sample=17", "one question"),),
)


def show(arguments: list[str]) -> None:
    """Run `zipeval show RUN_ID`."""
    options = SHOW.parse(arguments)
    from zipeval.reporting import show as shown

    if options.sample is not None:
        shown.show_sample(
            options.operands[0], options.results, options.sample, options.task
        )
    elif options.task:
        raise UsageError(
            f"task={options.task}: it needs sample=, the number of one of its samples."
        )
    else:
        shown.show(options.operands[0], options.results)


REPORT = Command(
    "report",
    "[results=DIR] [out=FILE.html] [plots=DIR]",
    "Write all results on one page, with plots and the tokens that are kept.",
    "The page is a single HTML file and needs no network.",
    settings=(
        RESULTS,
        Setting(
            "out", "the page; its name ends in .html", "FILE.html", path, "report.html"
        ),
        Setting(
            "plots",
            "directory for the plots as PDF and SVG files; without it none are written",
            "DIR",
            path,
        ),
    ),
)


def report(arguments: list[str]) -> None:
    """Run `zipeval report`."""
    options = REPORT.parse(arguments)
    if options.out.suffix not in (".html", ".htm"):
        plots = ", or plots=DIR for PDF files" if options.out.suffix == ".pdf" else ""
        raise UsageError(
            f"out={options.out}: the report is a web page. Name a file that ends in .html{plots}."
        )
    from zipeval.reporting.html.report import report as make

    written = make(options.results, options.out, options.plots)
    print("\n".join(map(str, written)))


VIEW = Command(
    "view",
    "[results=DIR] [port=N] [host=NAME]",
    "Serve the page of `zipeval report` live: every question, its picture and all answers; also while a sweep runs.",
    "It is served to this machine only, unless host= names another address. Ctrl-C ends it.",
    settings=(
        RESULTS,
        Setting("port", "where it listens; 0 takes a free port", "N", tcp_port, 0),
        Setting(
            "host",
            "which machines may read it; 127.0.0.1 is this one",
            "NAME",
            text,
            "127.0.0.1",
        ),
    ),
)


def view(arguments: list[str]) -> None:
    """`zipeval view`."""
    options = VIEW.parse(arguments)
    from zipeval.reporting.html.server import serve

    serve(options.results, options.host, options.port)
