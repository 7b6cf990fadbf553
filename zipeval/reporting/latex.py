"""Tables as papers print them, in LaTeX with booktabs: budgets as sections, percentages below their scores."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import zip_longest

from zipeval.reporting import remarks
from zipeval.reporting.proper_names import footnotes, proper_labels
from zipeval.reporting.remarks import LOWER
from zipeval.reporting.table_text import (
    SAME,
    TIED,
    TWO_LINES,
    CellText,
    Section,
    explanations,
    sections,
    stacked,
    texts,
    words,
)
from zipeval.reporting.tables import Table, TableCell

SPECIAL = str.maketrans(
    {character: rf"\{character}" for character in "&%$#_{}"}
    | {
        "\\": r"\textbackslash{}",
        "~": r"\textasciitilde{}",
        "^": r"\textasciicircum{}",
        "<": r"\textless{}",
        ">": r"\textgreater{}",
        LOWER.strip(): r"$\downarrow$",
        SAME: r"$\approx$",
        "‡": r"$^\ddagger$",
        "§": r"\S{}",
        "¶": r"\P{}",
        "‖": r"$\parallel$",
    }
)
MARKS = {"§": r"\S", "¶": r"\P", "‖": r"$\parallel$", "#": r"\#"}
PRINTED = replace(TWO_LINES, statistics=TWO_LINES.statistics.replace(TIED, "in bold"))
REQUIRED = r"% Needs \usepackage{booktabs} and a class of two columns."
SHRUNK = r"% Needs \usepackage{graphicx}: it is wider than the page and made smaller. `columns=A,B` chooses benchmarks."
# How many digits are as wide as one of these; of other capitals it is 1.5, and of other letters about one.
DIGITS_WIDE = {0.56: ".,:;'|il", 0.8: "-() frstjI", 1.7: "mw%≈", 2.0: "MW"}
BOLD = 1.15  # how much wider bold type is
FULL_WIDTH = 410.0  # points: of both columns of the article class, the narrowest of the usual classes


@dataclass(frozen=True)
class Size:
    """A size of type.

    Attributes:
        scores, shares: LaTeX's names of the sizes of scores and of percentages.
        score_digit, share_digit: width of a digit in points, of Computer Modern, which is wider than Times.
        gap: half of the blank between columns, in points.
        is_stacked: whether long headings stand on several lines.
    """

    scores: str
    shares: str
    score_digit: float
    share_digit: float
    gap: float
    is_stacked: bool = False


SIZES = (
    Size(r"\small", r"\footnotesize", 4.63, 4.25, 4),
    Size(r"\footnotesize", r"\scriptsize", 4.25, 3.99, 3),
    Size(r"\footnotesize", r"\scriptsize", 4.25, 3.99, 2, is_stacked=True),
    Size(r"\footnotesize", r"\scriptsize", 4.25, 3.99, 1.5, is_stacked=True),
    Size(r"\scriptsize", r"\tiny", 3.99, 3.40, 1.5, is_stacked=True),
    Size(r"\tiny", r"\tiny", 3.40, 3.40, 1, is_stacked=True),
)


@dataclass(frozen=True)
class Layout:
    """Say how a table is set.

    Attributes:
        size: of its type.
        interval_below: whether intervals have a line of their own.
        width: about its least width in points.
    """

    size: Size
    interval_below: bool
    width: float


def latex(tables: list[Table]) -> str:
    """Return a float over both columns for each table.

    The caption says what the numbers are. What is said of single rows is a comment below, but for remarks: those are
    printed, as their marks are.
    """
    written: list[str] = []
    labels: list[str] = []
    for table in tables:
        labels.append(_unused(_label(table), labels))
        written.append(_float(table, labels[-1]))
    return REQUIRED + "\n" + "\n\n".join(written)


def _float(table: Table, label: str) -> str:
    names = {label: _without_kind(name) for label, name in proper_labels(table).items()}
    layout = _fitting(table, names)
    lines = [
        f"% {_one_line(table.about)}",
        *([SHRUNK] if layout.width > FULL_WIDTH else []),
        r"\begin{table*}[t]",
        r"\centering",
        rf"\caption{{{_caption(table, names)}}}",
        rf"\label{{tab:{label}}}",
        r"\smallskip",
        layout.size.scores,
        rf"\setlength{{\tabcolsep}}{{{layout.size.gap:g}pt}}",
        *_tabular(table, names, layout),
        *_remarks(table, names),
        r"\end{table*}",
    ]
    return "\n".join([*lines, *(f"% {_one_line(note)}" for note in table.notes)])


def _tabular(table: Table, names: dict[str, str], layout: Layout) -> list[str]:
    """Return the lines of the table itself."""
    columns = texts(table)
    headings = ["method", *columns]
    begin, end = _environment(layout, len(columns))
    lines = [
        begin,
        r"\toprule",
        _line([_heading(name, layout.size) for name in headings]),
    ]
    for section in sections(table):
        lines += [r"\midrule", _section_line(section, len(headings)), r"\midrule"]
        for row in section.rows:
            cells = [text(row) for text in columns.values()]
            lines += _row_lines(names[row.label], cells, layout)
    return [*lines, r"\bottomrule", end]


def _environment(layout: Layout, count: int) -> tuple[str, str]:
    """Return the line that begins a table with so many columns of numbers, and the one that ends it."""
    columns = rf"l*{{{count}}}{{c}}@{{}}"
    if layout.width > FULL_WIDTH:
        return (
            rf"\resizebox{{\textwidth}}{{!}}{{\begin{{tabular}}{{@{{}}{columns}}}",
            r"\end{tabular}}",
        )
    # A table that takes most of the width takes all of it.
    if layout.width > FULL_WIDTH / 2:
        spread = rf"@{{\extracolsep{{\fill}}}}{columns}"
        return rf"\begin{{tabular*}}{{\textwidth}}{{{spread}}}", r"\end{tabular*}"
    return rf"\begin{{tabular}}{{@{{}}{columns}}}", r"\end{tabular}"


def _section_line(section: Section, width: int) -> str:
    """Return the line that names a budget, over all columns."""
    has_budget = not section.is_bound and section.rows[0].tokens is not None
    title = f"Retain {section.title}" if has_budget else section.title
    return rf"\multicolumn{{{width}}}{{c}}{{\textit{{{_escaped(title)}}}}} \\"


def _row_lines(label: str, cells: list[CellText], layout: Layout) -> list[str]:
    """Return a row's scores, and below them the line or lines of its percentages, in smaller type."""
    columns = [_cell_lines(cell, layout) for cell in cells]
    lines = [
        _line(cells_of_line)
        for cells_of_line in zip_longest([_escaped(label)], *columns, fillvalue="")
    ]
    # The lines of a method stand closer to each other than methods do.
    return [*(line + "[-1pt]" for line in lines[:-1]), lines[-1] + "[2pt]"]


def _cell_lines(cell: CellText, layout: Layout) -> list[str]:
    """Return the lines of a cell, bold where it is the best of its budget, with its marks behind the last one."""
    lines = []
    for text in replace(cell, marks="").lines(layout.interval_below):
        # An interval has a dash, and a number below 0 a minus.
        number = re.sub(r"(?<=\d)-(?=\d)", "--", text).translate(SPECIAL)
        number = re.sub(r"^-(?=\d)", "$-$", number)
        lines.append(rf"\textbf{{{number}}}" if TIED in cell.marks else number)
    if SAME in cell.marks:
        lines[-1] += r"$\approx$"
    # The marks of comparisons are the sign above and bold type; what is left are those of remarks.
    lines[-1] += "".join(map(_mark, cell.marks.lstrip(SAME + TIED)))
    return [lines[0], *(rf"{{{layout.size.shares} {line}}}" for line in lines[1:])]


def _caption(table: Table, names: dict[str, str]) -> str:
    """Return what the table is, of which model in which setting, and what its numbers and signs are."""
    bound = names.get(table.bound, table.bound)
    about = f"Visual-token reduction: {table.about}."
    return _escaped(
        " ".join(
            [
                about,
                *explanations(replace(table, bound=bound), PRINTED),
                *footnotes(table),
            ]
        )
    )


def _remarks(table: Table, names: dict[str, str]) -> list[str]:
    """Return a printed paragraph with what the marks of a table mean and where they stand."""
    sentences: list[str] = []
    for row in table.rows:
        label = " ".join(
            str(part) for part in (names[row.label], row.tokens) if part is not None
        )
        for column, cell in row.cells.items():
            sentences += _remark_sentences(f"{label}, {column}", cell)
    if not sentences:
        return []
    # A difference has the remarks of the row that it is of.
    printed = "\n".join(dict.fromkeys(sentences))
    return [
        "",
        r"\smallskip\noindent\parbox{\textwidth}{\footnotesize\raggedright "
        + printed
        + "}",
    ]


def _remark_sentences(place: str, cell: TableCell) -> Iterator[str]:
    """Yield a sentence for each mark of a cell."""
    for kind, mark in remarks.MARKS.items():
        of_kind = [remark for remark in cell.remarks if remark.kind == kind]
        if of_kind:
            text = _escaped(f"{place}: {remarks.status(of_kind)}.")
            yield f"{_mark(mark)} {text}"


def _without_kind(label: str) -> str:
    """Return a label without `(published)` and `: difference`, which the line above its section says."""
    return label.removesuffix(" (published)").removesuffix(": difference")


def _mark(mark: str) -> str:
    return rf"\textsuperscript{{{MARKS[mark]}}}"


def _line(cells: list[str]) -> str:
    return " & ".join(cells) + r" \\"


def _escaped(text: str) -> str:
    return text.translate(SPECIAL)


def _one_line(text: str) -> str:
    """Return a text that is a comment to its end."""
    return " ".join(text.split())


def _heading_lines(name: str, size: Size) -> list[str]:
    """Return a heading on one line, or on as many as it has words that are not short."""
    title = {"method": "Method", "average": "Average"}.get(name, name)
    if not size.is_stacked:
        return [title]
    if name == "average":
        return ["Avg."]
    return stacked(title, max(len(word.rstrip()) for word in words(title)))


def _heading(name: str, size: Size) -> str:
    lines = [_escaped(line) for line in _heading_lines(name, size)]
    return (
        rf"\shortstack{{{(chr(92) * 2).join(lines)}}}" if len(lines) > 1 else lines[0]
    )


def _fitting(table: Table, names: dict[str, str]) -> Layout:
    """Return the layout with the largest type in which the table fits; the smallest where it fits in none."""
    # Larger type is worth a third line for the intervals.
    for size in SIZES:
        for interval_below in (False, True):
            width = _width(table, names, size, interval_below)
            if width <= FULL_WIDTH:
                return Layout(size, interval_below, width)
    return Layout(SIZES[-1], True, width)


def _width(
    table: Table, names: dict[str, str], size: Size, interval_below: bool
) -> float:
    """Return about how wide the table is, in points."""
    columns = texts(table)
    width = max(map(_digits, names.values())) * size.score_digit
    for name, text in columns.items():
        heading = max(map(_digits, _heading_lines(name, size))) * size.score_digit
        numbers = max(
            _cell_width(text(row), size, interval_below) for row in table.rows
        )
        width += max(heading, numbers)
    return width + 2 * size.gap * len(columns)


def _cell_width(cell: CellText, size: Size, interval_below: bool) -> float:
    score, *shares = map(_digits, cell.lines(interval_below))
    # The first line is in the type of scores, and all below it is smaller.
    width = max(
        score * size.score_digit, *(share * size.share_digit for share in shares), 0.0
    )
    return width * BOLD if TIED in cell.marks else width


def _digits(text: str) -> float:
    """Return how many digits of Computer Modern are about as wide as a text."""
    return sum(_digit(character) for character in text)


def _digit(character: str) -> float:
    for width, characters in DIGITS_WIDE.items():
        if character in characters:
            return width
    return 1.5 if character.isupper() else 1.0


def _label(table: Table) -> str:
    """Return the name of the table in the paper: its model."""
    model = re.split(r"[,(]", table.about, maxsplit=1)[0].lower()
    return re.sub(r"[^a-z0-9]+", "-", model).strip("-") or "scores"


def _unused(label: str, taken: list[str]) -> str:
    """Return a label that no other table has."""
    # A model may have several tables, of different settings.
    number = 2
    unused = label
    while unused in taken:
        unused = f"{label}-{number}"
        number += 1
    return unused
