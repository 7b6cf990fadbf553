"""The page: tables, plots and questions in one HTML text that asks no other server for anything. Imports no torch."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from typing import Any
from urllib.parse import urlencode

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from zipeval.reporting.html.browser import PAGE, Run
from zipeval.reporting.render import grid, legend
from zipeval.reporting.table_text import TIED
from zipeval.reporting.tables import Record, Row, Table

CELL = re.compile(r"([^ ,]*)(?: \(([^,)]*))?(?:, ([^)]*))?\)?(.*)")
LISTED = 100  # failures; more of them say no more
# What in JSON could end a script element, or begin a comment in it, and line ends that only JavaScript has.
UNSAFE = str.maketrans(
    {character: f"\\u{ord(character):04x}" for character in "<>&\u2028\u2029"}
)
SCRIPT = "browser.js"


@dataclass(frozen=True)
class Link:
    """A link from a number of a table to its questions, and what it says of them."""

    href: str
    title: str


@dataclass
class Failure:
    """A sample without an answer or a verdict, and the runs in which that is so."""

    task: str
    document: str
    what: str
    reason: str
    runs: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class TableSection:
    """Hold what a page shows of a table without reading its samples."""

    number: int
    table: Table

    @property
    def name(self) -> str:
        """Return the name of its model."""
        return self.table.about.partition(" (")[0]


@dataclass(frozen=True)
class Browser:
    """Say where a page's questions are.

    Attributes:
        data: all of them; None where the page asks a server, or has none.
        refusal: why there are none.
        command: shows them.
    """

    data: dict[str, Any] | None = None
    refusal: str = ""
    command: str = ""


def parts(text: str) -> tuple[str, ...]:
    """Number, percentage, interval and marks of a cell, `92.5 (93.1%, 91.2-94.9)†`; empty where it has none."""
    return CELL.fullmatch(text).groups(default="")


def identities(tables: Sequence[Table]) -> list[str]:
    """Return what links call some tables: the same whatever other tables there are, unless two are described alike."""
    names: list[str] = []
    for table in tables:
        name = hashlib.sha256(table.about.encode()).hexdigest()[:6]
        names.append(f"{name}-{names.count(name) + 1}" if name in names else name)
    return names


def render_page(
    sections: Sequence[Any],
    records: list[Record],
    browser: Browser,
    names: list[str],
    complete: bool = True,
    failures: Sequence[Failure] = (),
    budget_of=None,
    under_way: Sequence[str] = (),
    problem: str = "",
) -> str:
    """Return the page.

    Args:
        sections: each with `number`, `name` and `table`; of a complete page with plots, gallery and overlaps.
        names: what links call the tables of the sections.
        complete: whether plots, kept tokens, overlap and failures are on it.
        budget_of: returns the heading of a row's budget.
        under_way: what is being answered.
        problem: why there are no tables.
    """
    environment = Environment(
        loader=PackageLoader("zipeval.reporting.html", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    live, linked = browser.data is None and not browser.refusal, not browser.refusal
    common, varying = manifest(records)
    script = files(__package__).joinpath(SCRIPT).read_text(encoding="utf-8")
    return environment.get_template("report.html.jinja").render(
        sections=sections,
        records=records,
        links=[
            table_links(section.table, identity if len(sections) > 1 else "")
            if linked
            else None
            for section, identity in zip(sections, names, strict=True)
        ],
        browser=browser,
        data=embedded({"live": live, "page": PAGE, **(browser.data or {})}),
        script=Markup(script),  # our own file
        policy=policy(script, live),
        live=live,
        complete=complete,
        failures=failures,
        listed=LISTED,
        common=common,
        varying=varying,
        configurations=configurations(records),
        grid=grid,
        parts=parts,
        budget_of=budget_of,
        legend=legend,
        tied=TIED,
        under_way=under_way,
        problem=problem,
    )


def embedded(data: dict[str, Any]) -> Markup:
    """Return data as JSON that can stand in a script element, whatever texts it holds."""
    return Markup(
        json.dumps(
            data, ensure_ascii=False, separators=(",", ":"), allow_nan=False
        ).translate(UNSAFE)
    )


def policy(script: str, live: bool) -> str:
    """Return the Content-Security-Policy of a page: its own script runs and no other, and nothing foreign is loaded."""
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    server = " 'self'" if live else ""
    rules = [
        "default-src 'none'",
        f"img-src data:{server}",
        "style-src 'unsafe-inline'",
        f"script-src 'sha256-{digest}'",
    ]
    rules += ["connect-src 'self'"] if live else []
    return "; ".join([*rules, "base-uri 'none'", "form-action 'none'"])


def table_links(table: Table, identity: str) -> list[list[list[Link | None]]]:
    """Return a link for each cell of `grid(table)` behind the first of its line; None for a cell without questions.

    Args:
        identity: of the table, where there are several.
    """
    header, _ = grid(table)
    return [
        [
            [_cell_link(table, row, name, identity) for name in header[1:]]
            for row in rows
        ]
        for rows in table.groups()
    ]


def _cell_link(table: Table, row: Row, name: str, identity: str) -> Link | None:
    """Return the link to the questions that a run lost against the upper bound; of the bound to those it gets wrong."""
    run, is_bound = (
        Run(row.label, row.tokens, row is table.rows[0]),
        row is table.rows[0],
    )
    outcome = "wrong" if is_bound else "lost"
    query = {"table": identity} if identity else {}
    if name in row.cells:
        query |= {"benchmark": row.cells[name].record["task"], outcome: run.name}
        comparison = row.cells[name].comparison
    elif name == "average" and row.average is not None:
        query |= {outcome: run.name}
        comparison = None
    else:
        return None
    title = (
        f"Questions that {run.name} gets wrong"
        if is_bound
        else f"Questions that {run.name} lost"
    )
    if comparison is not None and comparison.lost is not None:
        title += f": {comparison.lost} (and {comparison.gained} gained)"
    return Link(f"#questions?{urlencode(query)}", title)


def manifest(records: Iterable[Record]) -> tuple[dict[str, str], list[dict[str, str]]]:
    """Return what all records have in common, and a line for each with the rest."""
    lines = [_provenance(record) for record in records]
    if not lines:
        return {}, []
    varying = [
        name
        for name in lines[0]
        if name == "run" or any(line[name] != lines[0][name] for line in lines)
    ]
    common = {name: value for name, value in lines[0].items() if name not in varying}
    return common, [{name: line[name] for name in varying} for line in lines]


def _provenance(record: Record) -> dict[str, str]:
    resolved, git = record["resolved"], record["git"]
    revision = (
        git["revision"] + " and changes" * git["dirty"]
        if git
        else "none, an installed package"
    )
    named = {
        "run": record["run_id"],
        "benchmark": record["task"],
        "status": record["status"],
        "samples": record["samples"]["count"],
        "started": record["started"],
        "ended": record.get("ended"),
        "seconds": record["seconds"],
        "device": resolved["device"],
        "precision": resolved["dtype"],
        "attention": resolved["attn_implementation"],
        "batch size": record["config"]["batch_size"],
        "weights": resolved["fingerprint"],
        "task": record["task_hash"],
        "data": record["data_hash"],
        "revision of the weights": record.get("model_revision"),
        "revision of zipeval": revision,
        **{
            ("device's name" if name == "device" else name): value
            for name, value in record.get("machine", {}).items()
        },
        **record["versions"],
    }
    return {name: "-" if value is None else str(value) for name, value in named.items()}


def configurations(records: Iterable[Record]) -> list[dict]:
    """Return the configuration of every run, once, with the benchmarks that it ran on."""
    tasks_by_run: dict[tuple[str, str], list[str]] = {}
    for record in records:
        text = json.dumps(
            {name: record[name] for name in ("config", "resolved")},
            indent=2,
            ensure_ascii=False,
        )
        tasks_by_run.setdefault((record["run_id"], text), []).append(record["task"])
    return [
        {"run": run, "tasks": tasks, "text": text}
        for (run, text), tasks in tasks_by_run.items()
    ]
