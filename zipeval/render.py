"""Tables in the formats that people paste, compile or read: Markdown, CSV, LaTeX, HTML, JSON."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Iterator

from zipeval.errors import UsageError, did_you_mean
from zipeval.tables import DIFFERENCE, Cell, Row, Table

SAME, TIED = "≈", "†"
SCORES = "Score (% of the upper bound, {})."
TOKENS = (
    "tokens: visual tokens asked for; mean, final: measured, entering the decoder's layers on average and its last "
    "one; flops: of reading the prompt, % of {}'s."
)
STATISTICS = (
    f"Behind the percentage its 95% interval (paired bootstrap); {SAME} not distinguishable from the upper bound, "
    f"{TIED} the best of its budget or not distinguishable from it."
)


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


def legend(table: Table) -> list[str]:
    """What its numbers are, and what has to be said about some of them."""
    cells = [cell for row in table.rows for cell in row.cells.values()]
    lines = [SCORES.format(table.bound)] if any(cell.percent is not None for cell in cells) else []
    lines += [TOKENS.format(table.bound)] if any(row.mean is not None for row in table.rows) else []
    lines += [STATISTICS] if any(cell.comparison for cell in cells) else []
    return [*([" ".join(lines)] if lines else []), *table.notes]


def grid(table: Table) -> tuple[list[str], list[list[list[str]]]]:
    """(headings, for each budget the lines of text cells)."""
    shown = [name for name in ("mean", "final", "flops") if any(getattr(r, name) is not None for r in table.rows)]
    average = any(row.average is not None for row in table.rows)
    header = ["method", "tokens", *shown, *table.columns, *(["average"] if average else [])]
    groups = []
    for group in table.groups():
        lines = []
        for row in group:
            line = [row.label, "all" if row.tokens is None else str(row.tokens)]
            line += [_number(getattr(row, name), share=name == "flops") for name in shown]
            line += [_text(table, row, name) for name in table.columns]
            lines.append(line + ([_average(row)] if average else []))
        groups.append(lines)
    return header, groups


def _number(value: float | None, share: bool = False) -> str:
    if value is None:
        return "-"
    return f"{100 * value:.1f}%" if share else f"{value:.1f}"


def _text(table: Table, row: Row, name: str) -> str:
    """`92.5 (93.1%, 91.2-94.9)†`."""
    cell = row.cells.get(name)
    if cell is None or cell.score is None:
        return "-"
    sign = "+" if row.kind == DIFFERENCE else ""
    scale = max(abs(r.cells[name].score or 0) for r in table.rows if name in r.cells)
    score = f"{cell.score:{sign}.1f}" if scale > 10 else f"{cell.score:{sign}.3g}"  # from 0 to 1 it needs its digits
    if cell.percent is None:
        return score
    if math.isnan(cell.percent):
        return f"{score} (of 0)"
    return f"{score} ({cell.percent:{sign}.1f}%{_interval(cell.comparison)}){marks(cell)}"


def _average(row: Row) -> str:
    if row.average is None or math.isnan(row.average):
        return "-"
    return f"{row.average:{'+' if row.kind == DIFFERENCE else ''}.1f}%{_interval(row.average_comparison)}"


def _interval(comparison) -> str:
    return f", {comparison.low:.1f}-{comparison.high:.1f}" if comparison and comparison.low < comparison.high else ""


def marks(cell: Cell) -> str:
    """Of a cell that was compared; where there is no interval nothing is said of the upper bound."""
    found = cell.comparison
    if found is None:
        return ""
    return SAME * (found.low <= 100 <= found.high) + TIED * cell.tied


def markdown(tables: list[Table]) -> str:
    """Columns line up, the first one to the left."""
    texts = []
    for table in tables:
        header, groups = grid(table)
        lines = aligned([header, *(line for group in groups for line in group)])
        texts.append("\n".join([f"{table.about}\n", *lines, "", *legend(table)]))
    return "\n\n".join(texts)


def aligned(lines: list[list[str]]) -> list[str]:
    """A Markdown table of cells, the first line its head."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    rows = []
    for line in lines:
        cells = [c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(line, widths, strict=True))]
        rows.append("| " + " | ".join(cells) + " |")
    rule = "|" + "|".join("-" * (w + 2) if i == 0 else "-" * (w + 1) + ":" for i, w in enumerate(widths)) + "|"
    return [rows[0], rule, *rows[1:]]


def latex(tables: list[Table]) -> str:
    """For the booktabs package; `%` and the like are escaped, and the best of a budget is bold."""
    texts = []
    for table in tables:
        header, groups = grid(table)
        lines = [f"% {table.about}", rf"\begin{{tabular}}{{l{'r' * (len(header) - 1)}}}", r"\toprule"]
        lines.append(_latex_line(header))
        for group in groups:
            lines += [r"\midrule", *map(_latex_line, group)]
        notes = [f"% {note}" for note in legend(table)]
        texts.append("\n".join([*lines, r"\bottomrule", r"\end{tabular}", *notes]))
    return "\n\n".join(texts)


LATEX = str.maketrans(
    {c: rf"\{c}" for c in "&%$#_{}"}
    | {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
)


def _latex_line(cells: list[str]) -> str:
    return " & ".join(map(_latex_cell, cells)) + r" \\"


def _latex_cell(text: str) -> str:
    plain = text.replace(SAME, "").replace(TIED, "").translate(LATEX)
    plain = rf"\textbf{{{plain}}}" if TIED in text else plain
    return plain + (r"$\approx$" if SAME in text else "")


def html(tables: list[Table]) -> str:
    """One table element with a caption for each, and no more."""
    from jinja2 import Environment

    template = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True).from_string(HTML)
    return "\n".join(template.render(table=table, grid=grid(table), legend=legend(table)) for table in tables)


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
    """A line for every cell, for pandas and the like."""
    text = io.StringIO()
    lines = [line for table in tables for line in _cells(table)]
    writer = csv.DictWriter(text, list(lines[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    return text.getvalue().rstrip("\n")


def as_json(tables: list[Table]) -> str:
    """As CSV, below the tables they belong to."""
    found = [{"about": table.about, "notes": table.notes, "cells": list(_cells(table))} for table in tables]
    return json.dumps(found, indent=2, ensure_ascii=False)


def _cells(table: Table) -> Iterator[dict]:
    """An average is a cell too; what is missing, or not a number, is None."""
    for row in table.rows:
        head = {"table": table.about, "kind": row.kind, "method": row.label, "tokens": row.tokens}
        head |= {name: getattr(row, name) for name in ("mean", "final", "flops")}
        cells = dict(row.cells)
        if row.average is not None:
            cells["average"] = Cell(None, row.average, comparison=row.average_comparison)
        for name, cell in cells.items():
            found = {"score": cell.score, "percent": cell.percent}
            for part in ("low", "high", "lost", "gained", "p"):
                found[part] = getattr(cell.comparison, part, None)
            found |= {"tied": cell.tied, "run_id": cell.record["run_id"] if cell.record else None}
            numbers = {k: None if isinstance(v, float) and math.isnan(v) else v for k, v in found.items()}
            yield {**head, "benchmark": name, **numbers}


FORMATS = {"markdown": markdown, "csv": as_csv, "latex": latex, "html": html, "json": as_json}
