"""Commands about results: `zipeval status`, `table`, `show` and `report`."""

from __future__ import annotations

from pathlib import Path

from zipeval.cli.arguments import choice, settings
from zipeval.errors import UsageError


def status(arguments: list[str]) -> None:
    """`zipeval status [SWEEP]`."""
    from zipeval.status import status as show

    names = [a for a in arguments if "=" not in a]
    given = settings("status", [a for a in arguments if "=" in a], ("results",))
    if len(names) > 1:
        raise UsageError(f"status {' '.join(names)}: name one sweep, or none to list all.")
    show(names[0] if names else None, given.get("results", "results/runs"))


def table(arguments: list[str]) -> None:
    """`zipeval table`."""
    from zipeval import paper
    from zipeval.render import render
    from zipeval.tables import tables

    given = settings("table", arguments, ("results", "task", "table", "source", "format", "statistics"))
    results, source, layout = given.get("results"), given.get("source", "records"), given.get("table")
    statistics = choice(given, "statistics", ("false", "true")) == "true"
    if choice({"source": source}, "source", ("records", "paper")) == "paper" and not layout:
        raise UsageError("source=paper: say which of its tables, such as table=paper/table1.")
    name = (layout or "").removeprefix("paper/")
    idle = ["task"] * bool(layout) + ["results"] * (source == "paper")
    idle += ["statistics"] * (source == "paper" or name in paper.SPEED)
    for setting in given.keys() & set(idle):
        raise UsageError(f"{setting}={given[setting]}: table={layout} source={source} has no use for it. Leave it out.")
    if layout:
        found = [paper.published(name)] if source == "paper" else paper.measured(name, results, statistics)
    else:
        found = tables(results or paper.RESULTS, given.get("task"), statistics=statistics)
    print(render(found, given.get("format", "markdown")))


def show(arguments: list[str]) -> None:
    """`zipeval show RUN_ID`."""
    from zipeval.show import show as print_run

    names = [a for a in arguments if "=" not in a]
    given = settings("show", [a for a in arguments if "=" in a], ("results",))
    if len(names) != 1:
        raise UsageError(
            f"{' '.join(['show', *names])}: name one run, `zipeval show RUN_ID`, or the beginning of its name."
        )
    print_run(names[0], given.get("results", "results/runs"))


def report(arguments: list[str]) -> None:
    """`zipeval report`."""
    from zipeval.report import report as make

    given = settings("report", arguments, ("results", "out", "plots"))
    out, plots = given.get("out", "report.html"), given.get("plots")
    written = make(
        given.get("results", "results/runs"), Path(out).expanduser(), Path(plots).expanduser() if plots else None
    )
    print("\n".join(map(str, written)))
