"""Commands about results: `zipeval status`, `table`, `show` and `report`."""

from __future__ import annotations

from pathlib import Path

from zipeval.cli.arguments import RESULTS, SWITCH, Command, Operand, Setting, number, path, switch, text
from zipeval.cli.run_settings import task_names
from zipeval.errors import UsageError


def formats() -> list[str]:
    """Return the formats of a table."""
    from zipeval.render import FORMATS

    return [*FORMATS]


def layouts() -> list[str]:
    """Return the published tables."""
    from zipeval.paper import TABLES

    return [f"paper/{name}" for name in sorted(TABLES)]


def run_ids() -> list[str]:
    """Return the runs in the usual directory of results."""
    return sorted({record.parent.name for record in Path(RESULTS.default).glob("*/*.json")})


def sweep_names() -> list[str]:
    """Return the sweeps in the usual directory of results."""
    return sorted(plan.parent.name for plan in Path(RESULTS.default).glob("sweeps/*/plan.json"))


def tcp_port(name: str, value: str) -> int:
    """Return the value as the number of a port."""
    if not value.isdecimal() or int(value) > 65535:
        raise UsageError(f"{name}={value}: expected a number up to 65535, such as {name}=8000; 0 takes a free one.")
    return int(value)


STATUS = Command(
    "status",
    "[SWEEP] [results=DIR]",
    "Say how far runs and sweeps are, and how long they will still take.",
    "Without a sweep it lists all sweeps and runs.",
    operands=(Operand("SWEEP", "name of a sweep, or the beginning of it", suggestions=sweep_names, required=False),),
    misused="name one sweep, or none to list all.",
    settings=(RESULTS,),
)


def status(arguments: list[str]) -> None:
    """Run `zipeval status [SWEEP]`."""
    options = STATUS.parse(arguments)
    from zipeval.status import status as show

    show(options.operands[0] if options.operands else None, options.results)


TABLE = Command(
    "table",
    "[results=DIR] [task=TASK] [NAME=VALUE ...]",
    "Print scores and their percentages of the upper bound.",
    "All records of a directory, one table for each model and way to run it. The upper bound is method=vanilla.",
    settings=(
        Setting("results", "directory of the records", "DIR", default_text="results/runs"),
        Setting("task", "one benchmark, with all its metrics", "TASK", text, choices=task_names),
        Setting(
            "statistics",
            "add 95% intervals and which differences are significant",
            read=switch,
            default=False,
            choices=SWITCH,
        ),
        Setting("format", "how the table is written", default="markdown", choices=formats),
        Setting("table", "the layout of one of the paper's tables, beside its numbers", "NAME", text, choices=layouts),
        Setting(
            "source",
            "with table=: your records beside the paper's numbers, or the paper's alone",
            default="records",
            choices=("records", "paper"),
        ),
    ),
    examples=(
        ("zipeval table task=pope", "accuracy, F1 and the other metrics of POPE"),
        ("zipeval table statistics=true format=latex", "for a paper"),
        ("zipeval table table=paper/table1 source=paper", "what VisionZip's Table 1 printed"),
    ),
)


def table(arguments: list[str]) -> None:
    """Run `zipeval table`."""
    options = TABLE.parse(arguments)
    from zipeval import paper
    from zipeval.render import render
    from zipeval.tables import tables

    if options.source == "paper" and not options.table:
        raise UsageError("source=paper: say which of its tables, such as table=paper/table1.")
    name = (options.table or "").removeprefix("paper/")
    _check_idle(options, name in paper.SPEED)
    if not options.table:
        shown = tables(options.results or paper.RESULTS, options.task, statistics=options.statistics)
    elif options.source == "paper":
        shown = [paper.published(name)]
    else:
        shown = paper.measured(name, options.results, options.statistics)
    print(render(shown, options.format))


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
        raise UsageError(f"{setting}: table={options.table} source={options.source} has no use for it. Leave it out.")


SHOW = Command(
    "show",
    "RUN_ID [sample=N] [results=DIR]",
    "Print scores and provenance of a run, or one of its samples.",
    "Provenance is everything that its scores depend on: weights, data, code, versions, machine and configuration.",
    operands=(Operand("RUN_ID", "name of a run, or the beginning of it", suggestions=run_ids),),
    misused="name one run, `zipeval show RUN_ID`, or the beginning of its name.",
    settings=(
        RESULTS,
        Setting("sample", "one sample: its question, and the answers of this run and of the upper bound", "N", number),
        Setting("task", "the task of the sample, where the run has several", "TASK", text),
    ),
    examples=(("zipeval show tiny_llava-visionzip-16 sample=17", "one question"),),
)


def show(arguments: list[str]) -> None:
    """Run `zipeval show RUN_ID`."""
    options = SHOW.parse(arguments)
    from zipeval import show as shown

    if options.sample is not None:
        shown.show_sample(options.operands[0], options.results, options.sample, options.task)
    elif options.task:
        raise UsageError(f"task={options.task}: it needs sample=, the number of one of its samples.")
    else:
        shown.show(options.operands[0], options.results)


REPORT = Command(
    "report",
    "[results=DIR] [out=FILE.html] [plots=DIR]",
    "Write all results on one page, with plots and the tokens that are kept.",
    "The page is a single HTML file and needs no network.",
    settings=(
        RESULTS,
        Setting("out", "the page; its name ends in .html", "FILE.html", path, "report.html"),
        Setting("plots", "directory for the plots as PDF and SVG files; without it none are written", "DIR", path),
    ),
)


def report(arguments: list[str]) -> None:
    """Run `zipeval report`."""
    options = REPORT.parse(arguments)
    if options.out.suffix not in (".html", ".htm"):
        plots = ", or plots=DIR for PDF files" if options.out.suffix == ".pdf" else ""
        raise UsageError(f"out={options.out}: the report is a web page. Name a file that ends in .html{plots}.")
    from zipeval.report import report as make

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
        Setting("host", "which machines may read it; 127.0.0.1 is this one", "NAME", text, "127.0.0.1"),
    ),
)


def view(arguments: list[str]) -> None:
    """`zipeval view`."""
    options = VIEW.parse(arguments)
    from zipeval.reporting.server import serve

    serve(options.results, options.host, options.port)
