"""Tables in the formats that people paste, compile or read: Markdown, CSV, LaTeX, HTML, JSON."""

from __future__ import annotations

import json
import math

from zipeval.errors import UsageError, did_you_mean
from zipeval.reporting import remarks
from zipeval.reporting.remarks import LOWER, UNDEFINED
from zipeval.tables import DIFFERENCE, Cell, Row, Table

SAME, TIED = "≈", "†"
SCORES = "Score (% of the upper bound, {})."
TOKENS = (
    "tokens: visual tokens asked for; mean, final: measured, entering the decoder's layers on average and its last "
    "one; flops: of reading the prompt, % of {}'s."
)
DIRECTION = f"{LOWER.strip()}: lower is better, and the percentage is the upper bound's share of the score."
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
    """Return what its numbers and marks are, and what has to be said about some of them."""
    cells = [cell for row in table.rows for cell in row.cells.values()]
    marked = remarks.key(remark for cell in cells for remark in cell.remarks)
    lines = [SCORES.format(table.bound)] if any(cell.percent is not None for cell in cells) else []
    lines += [TOKENS.format(table.bound)] if any(row.mean is not None for row in table.rows) else []
    lines += [DIRECTION] if not all(cell.higher_is_better for cell in cells) else []
    lines += [STATISTICS] if any(cell.comparison for cell in cells) else []
    lines += [f"Marks: {marked}."] if marked else []
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
    return "-" if cell is None else _numbers(table, row, name, cell) + marks(cell)


def _numbers(table: Table, row: Row, name: str, cell: Cell) -> str:
    if cell.score is None:
        return "-"
    sign = "+" if row.kind == DIFFERENCE else ""
    scale = max(abs(r.cells[name].score or 0) for r in table.rows if name in r.cells)
    score = f"{cell.score:{sign}.1f}" if scale > 10 else f"{cell.score:{sign}.3g}"  # from 0 to 1 it needs its digits
    if cell.percent is None:
        return score
    if math.isnan(cell.percent):
        undefined = any(remark.kind == UNDEFINED for remark in cell.remarks)
        return f"{score} (no %)" if undefined else f"{score} (of 0)"
    return f"{score} ({cell.percent:{sign}.1f}%{_interval(cell.comparison)})"


def _average(row: Row) -> str:
    if row.average is None or math.isnan(row.average):
        return "-"
    sign = "+" if row.kind == DIFFERENCE else ""
    return f"{row.average:{sign}.1f}%{_interval(row.average_comparison)}{remarks.marks(row.remarks)}"


def _interval(comparison) -> str:
    return f", {comparison.low:.1f}-{comparison.high:.1f}" if comparison and comparison.low < comparison.high else ""


def marks(cell: Cell) -> str:
    """Return the marks of its remarks, and before them what a comparison came to.

    Where there is no interval nothing is said of the upper bound.
    """
    comparison, after = cell.comparison, remarks.marks(cell.remarks)
    if comparison is None:
        return after
    return SAME * (comparison.low <= 100 <= comparison.high) + TIED * cell.tied + after


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
    """Return tables for the booktabs package; `%` and the like are escaped, and the best of a budget is bold.

    What is said of its numbers is a comment below, but for remarks: those are printed, as their marks are.
    """
    texts = []
    for table in tables:
        header, groups = grid(table)
        lines = [f"% {table.about}", rf"\begin{{tabular}}{{l{'r' * (len(header) - 1)}}}", r"\toprule"]
        lines.append(_latex_line(header))
        for group in groups:
            lines += [r"\midrule", *map(_latex_line, group)]
        notes = [f"% {note}" for note in legend(table)]
        texts.append("\n".join([*lines, r"\bottomrule", r"\end{tabular}", *_latex_remarks(table), *notes]))
    return "\n\n".join(texts)


LATEX = str.maketrans(
    {c: rf"\{c}" for c in "&%$#_{}"}
    | {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
)


LATEX |= {ord(LOWER.strip()): r"$\downarrow$"}
LATEX_MARKS = {"§": r"\S", "¶": r"\P", "‖": r"$\parallel$", "#": r"\#"}


def _latex_remarks(table: Table) -> list[str]:
    """Return a printed paragraph with what the marks of a table mean and where they stand."""
    sentences = []
    for row in table.rows:
        label = " ".join(str(part) for part in (row.label, row.tokens) if part is not None)
        for column, cell in row.cells.items():
            for kind, mark in remarks.MARKS.items():
                about = [remark for remark in cell.remarks if remark.kind == kind]
                if about:
                    text = f"{label}, {column}: {remarks.status(about)}.".translate(LATEX)
                    sentences.append(f"{_latex_mark(mark)} {text}")
    if not sentences:
        return []
    return ["", r"\smallskip\noindent{\footnotesize " + "\n".join(sentences) + r"\par}"]


def _latex_mark(mark: str) -> str:
    return rf"\textsuperscript{{{LATEX_MARKS[mark]}}}"


def _latex_line(cells: list[str]) -> str:
    return " & ".join(map(_latex_cell, cells)) + r" \\"


def _latex_cell(text: str) -> str:
    plain = text.rstrip("".join(LATEX_MARKS))
    after = "".join(map(_latex_mark, text.removeprefix(plain)))
    plain = plain.replace(SAME, "").replace(TIED, "").translate(LATEX)
    plain = rf"\textbf{{{plain}}}" if TIED in text else plain
    return plain + (r"$\approx$" if SAME in text else "") + after


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


FORMATS = {"markdown": markdown, "csv": as_csv, "latex": latex, "html": html, "json": as_json}
