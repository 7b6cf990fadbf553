"""Tables in the formats that people paste, compile or read: Markdown, CSV, LaTeX, HTML, JSON."""

from __future__ import annotations

import json
from itertools import chain

from zipeval.errors import UsageError, did_you_mean
from zipeval.reporting.latex import latex
from zipeval.reporting.table_text import legend, texts
from zipeval.reporting.tables import Table


def render(tables: list[Table], form: str = "markdown") -> str:
    """All of the tables in one text.

    Args:
        form: of FORMATS.

    Raises:
        UsageError: for a format that is none.
    """
    if form not in FORMATS:
        raise UsageError(f"format={form}: no such format.{did_you_mean(form, FORMATS)}")
    return FORMATS[form](tables)


def grid(table: Table) -> tuple[list[str], list[list[list[str]]]]:
    """(headings, for each budget the lines of text cells)."""
    columns = texts(table)
    groups = []
    for group in table.groups():
        lines = []
        for row in group:
            tokens = "all" if row.tokens is None else str(row.tokens)
            lines.append(
                [row.label, tokens, *(text(row).one_line for text in columns.values())]
            )
        groups.append(lines)
    return ["method", "tokens", *columns], groups


def markdown(tables: list[Table]) -> str:
    """Return tables in Markdown: columns line up, the first one to the left."""
    return "\n\n".join(
        "\n".join([f"{table.about}\n", *grid_lines(table), "", *legend(table)])
        for table in tables
    )


def grid_lines(table: Table) -> list[str]:
    """Return the Markdown of a table's numbers."""
    header, groups = grid(table)
    return aligned([header, *chain.from_iterable(groups)])


def aligned(lines: list[list[str]]) -> list[str]:
    """Return a Markdown table of cells, the first line its head."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    rows = []
    for line in lines:
        cells = [
            c.ljust(w) if i == 0 else c.rjust(w)
            for i, (c, w) in enumerate(zip(line, widths, strict=True))
        ]
        rows.append("| " + " | ".join(cells) + " |")
    rule = (
        "|"
        + "|".join(
            "-" * (w + 2) if i == 0 else "-" * (w + 1) + ":"
            for i, w in enumerate(widths)
        )
        + "|"
    )
    return [rows[0], rule, *rows[1:]]


def html(tables: list[Table]) -> str:
    """One table element with a caption for each, and no more."""
    from jinja2 import Environment

    template = Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True
    ).from_string(HTML)
    return "\n".join(
        template.render(table=table, grid=grid(table), legend=legend(table))
        for table in tables
    )


HTML = """\
<table>
<caption>{{ table.about }}</caption>
<thead><tr>{% for name in grid[0] %}<th scope="col">{{ name }}</th>{% endfor %}</tr></thead>
{% for group in grid[1] %}
<tbody>
{% for line in group %}
<tr><th scope="row">{{ line[0] }}</th>{% for cell in line[1:] %}<td>{{ cell }}</td>{% endfor %}</tr>
{% endfor %}
</tbody>
{% endfor %}
</table>
{% for note in legend %}
<p>{{ note }}</p>
{% endfor %}
"""


def as_csv(tables: list[Table]) -> str:
    """Return a line for every number, for pandas and the like."""
    from zipeval.reporting.frames import cells_frame

    return cells_frame(tables).to_csv(index=False, lineterminator="\n").rstrip("\n")


def as_json(tables: list[Table]) -> str:
    """Return the numbers of as_csv, below the tables they belong to."""
    from zipeval.reporting.frames import cells_frame

    written = []
    for table in tables:
        cells = cells_frame([table]).astype(object)
        numbers = cells.where(cells.notna(), None).to_dict("records")
        written.append({"about": table.about, "notes": table.notes, "cells": numbers})
    return json.dumps(written, indent=2, ensure_ascii=False)


FORMATS = {
    "markdown": markdown,
    "csv": as_csv,
    "latex": latex,
    "html": html,
    "json": as_json,
}
