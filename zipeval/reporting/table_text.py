"""Texts of a table's numbers and marks, and what explains them. All formats that people read take them from here."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import chain, groupby
from typing import TYPE_CHECKING

from zipeval.config.schema import UPPER_BOUND
from zipeval.reporting import remarks
from zipeval.reporting.remarks import LOWER, UNDEFINED
from zipeval.reporting.tables import DIFFERENCE, MEASURED, Row, Table, TableCell

if TYPE_CHECKING:
    from zipeval.reporting.stats import Comparison

NOTHING = "-"
SAME, TIED = "≈", "†"
# Behind these signs a name may be broken, and before a capital that follows small letters.
WORD_ENDS = re.compile(r"(?<=[_\-/ ])|(?<=[a-z]{2})(?=[A-Z])")
MEASURES = ("mean", "final", "flops")  # of a row, beside its benchmarks
DIRECTION = f"{LOWER.strip()}: lower is better, and the percentage is the upper bound's share of the score."


@dataclass(frozen=True)
class Wording:
    """Sentences that explain a table, in the words of one layout.

    Attributes:
        scores: what the cells hold; `{}` is the upper bound.
        measures: what mean, final and flops are; `{}` is the upper bound.
        statistics: where the interval stands, and what the marks of comparisons mean.
    """

    scores: str
    measures: str
    statistics: str


_MEASURES = (
    "mean, final: {}measured, entering the decoder's layers on average and its last one; flops: of reading the prompt, "
    "% of {{}}'s."
)
_STATISTICS = (
    "{} its 95% interval (paired bootstrap); {} not distinguishable from the upper bound, {} the best of its budget or "
    "not distinguishable from it."
)
ONE_LINE = Wording(
    scores="Score (% of the upper bound, {}).",
    measures="tokens: visual tokens asked for; " + _MEASURES.format(""),
    statistics=_STATISTICS.format("Behind the percentage", SAME, TIED),
)
TWO_LINES = Wording(
    scores="Below each score its percentage of the upper bound, {}.",
    measures=_MEASURES.format("visual tokens, "),
    statistics=_STATISTICS.format("With the percentage", SAME, TIED),
)


@dataclass(frozen=True)
class CellText:
    """The parts of what a cell shows.

    Attributes:
        score: empty for an average, which is a percentage alone.
        percent: with its `%`, or why there is none; empty where nothing is to be said of it.
        interval: of the percentage; empty without statistics.
        marks: of comparisons, then of remarks.
    """

    score: str = ""
    percent: str = ""
    interval: str = ""
    marks: str = ""

    @property
    def one_line(self) -> str:
        """Return `92.5 (93.1%, 91.2-94.9)†`."""
        share = ", ".join(filter(None, [self.percent, self.interval]))
        number = (
            f"{self.score} ({share})" if self.score and share else self.score + share
        )
        return number + self.marks

    def lines(self, interval_below: bool = False) -> list[str]:
        """Return the score and below it the percentage with its interval; the marks stand behind the last line.

        Args:
            interval_below: whether the interval has a line of its own.
        """
        shares = [self.percent, self.interval]
        if not interval_below:
            shares = [", ".join(filter(None, shares))]
        lines = list(filter(None, [self.score, *shares]))
        lines[-1] += self.marks
        return lines


@dataclass(frozen=True)
class Section:
    """Rows of one budget, under a line that names it.

    Attributes:
        title: `192 tokens`; of the upper bound `Upper bound, all tokens (576)`.
        is_bound: whether the row is the model without reduction.
    """

    title: str
    is_bound: bool
    rows: list[Row]


def legend(table: Table) -> list[str]:
    """Return what a table's numbers and marks are, and what has to be said about some of them."""
    paragraph = " ".join(explanations(table, ONE_LINE))
    return [*filter(None, [paragraph]), *table.notes]


def explanations(table: Table, wording: Wording) -> list[str]:
    """Return the sentences that a table's numbers and marks need."""
    cells = list(chain.from_iterable(row.cells.values() for row in table.rows))
    marked = remarks.key(chain.from_iterable(cell.remarks for cell in cells))
    has_percent = any(cell.percent is not None for cell in cells)
    has_errors = not all(cell.higher_is_better for cell in cells)
    has_statistics = any(cell.comparison for cell in cells)
    # Each sentence, and whether something in the table needs it.
    sentences = {
        wording.scores.format(table.bound): has_percent,
        wording.measures.format(table.bound): "mean" in measures(table),
        DIRECTION: has_errors,
        wording.statistics: has_statistics,
        f"Marks: {marked}.": bool(marked),
    }
    return [sentence for sentence, is_needed in sentences.items() if is_needed]


def measures(table: Table) -> list[str]:
    """Return those of mean, final and flops that some row has."""
    present = []
    for name in MEASURES:
        values = [getattr(row, name) for row in table.rows]
        # A plot's or a paper's rows may have none.
        if values.count(None) < len(values):
            present.append(name)
    return present


def has_average(table: Table) -> bool:
    """Return whether some row has one."""
    return any(row.average is not None for row in table.rows)


def texts(table: Table) -> dict[str, Callable[[Row], CellText]]:
    """Return what makes a row's text in each column of numbers, by the headings of the columns.

    The columns are the measures, the benchmarks and the average, in this order.
    """
    makers: dict[str, Callable[[Row], CellText]] = {}
    for name in measures(table):
        makers[name] = partial(_measure, name)
    for name in table.columns:
        makers[name] = partial(_cell, name, _scale(table, name))
    if has_average(table):
        makers["average"] = _average
    return makers


def _measure(name: str, row: Row) -> CellText:
    value = getattr(row, name)
    if value is None:
        return CellText(NOTHING)
    # FLOPs are a share of the upper bound's, and the others are numbers of tokens.
    return CellText(f"{100 * value:.1f}%" if name == "flops" else f"{value:.1f}")


def _scale(table: Table, name: str) -> float:
    """Return the largest score of a column."""
    scores = [row.cells[name].score or 0 for row in table.rows if name in row.cells]
    return max(map(abs, scores), default=0)


def _cell(name: str, scale: float, row: Row) -> CellText:
    cell = row.cells.get(name)
    if cell is None:
        return CellText(NOTHING)
    if cell.score is None:
        return CellText(NOTHING, marks=_marks(cell))
    sign = "+" if row.kind == DIFFERENCE else ""
    # A score from 0 to 1 needs its digits.
    score = f"{cell.score:{sign}.1f}" if scale > 10 else f"{cell.score:{sign}.3g}"
    if cell.percent is None:
        return CellText(score, marks=_marks(cell))
    if math.isnan(cell.percent):
        # The upper bound's score is 0, or a remark says why else there is no percentage.
        is_undefined = UNDEFINED in {remark.kind for remark in cell.remarks}
        return CellText(score, "no %" if is_undefined else "of 0", marks=_marks(cell))
    return CellText(
        score, f"{cell.percent:{sign}.1f}%", _interval(cell.comparison), _marks(cell)
    )


def _average(row: Row) -> CellText:
    if row.average is None or math.isnan(row.average):
        return CellText(NOTHING)
    sign = "+" if row.kind == DIFFERENCE else ""
    interval = _interval(row.average_comparison)
    return CellText(
        "", f"{row.average:{sign}.1f}%", interval, remarks.marks(row.remarks)
    )


def _interval(comparison: Comparison | None) -> str:
    # Where all answers are the same, or there is one question only, there is no interval.
    if comparison is None or not comparison.low < comparison.high:
        return ""
    return f"{comparison.low:.1f}-{comparison.high:.1f}"


def _marks(cell: TableCell) -> str:
    """Return the marks of a cell's remarks, and before them what a comparison came to.

    Where there is no interval nothing is said of the upper bound.
    """
    comparison, after = cell.comparison, remarks.marks(cell.remarks)
    if comparison is None:
        return after
    is_same = comparison.low <= 100 <= comparison.high
    return SAME * is_same + TIED * cell.tied + after


def sections(table: Table) -> list[Section]:
    """Return the rows by their budgets; measured, published and differences apart."""
    is_mixed = any(row.kind != table.rows[0].kind for row in table.rows)
    parts = []
    for (_, kind, is_bound), group in groupby(
        table.rows, key=lambda row: (row.tokens, row.kind, _is_bound(table, row))
    ):
        rows = list(group)
        title = _bound_title(rows[0]) if is_bound else _budget_title(rows[0])
        # Beside each other, rows of the same budget may be measured and published.
        if is_mixed and kind != MEASURED:
            title += f", {kind}"
        parts.append(Section(title, is_bound, rows))
    return parts


def _is_bound(table: Table, row: Row) -> bool:
    """Return whether a row is the model without reduction, or what was published of it, or the difference."""
    # Labels end in ` (published)` and `: difference`.
    method = row.label.partition(" (")[0].partition(":")[0]
    return table.bound == method == UPPER_BOUND


def _bound_title(row: Row) -> str:
    """Return the line above the upper bound, with its number of tokens where it is the same for all pictures."""
    # Records of the upper bound ask for no number, and tell how many there were.
    count = row.mean if row.tokens is None else row.tokens
    is_whole = count is not None and float(count).is_integer()
    return "Upper bound, all tokens" + (f" ({count:.0f})" if is_whole else "")


def _budget_title(row: Row) -> str:
    return "No budget in tokens" if row.tokens is None else f"{row.tokens} tokens"


def stacked(text: str, width: int) -> list[str]:
    """Return a name on lines of at most this width: broken between its words, within a word only where one is longer.

    `TextVQA` is Text and VQA, `visionzip_tuned` is visionzip_ and tuned.
    """
    lines = [""]
    for word in words(text):
        # A blank at the end of a line takes no room.
        if len((lines[-1] + word).rstrip()) > width:
            lines.append("")
        # A word that is longer than a line fills as many as it needs.
        while len(word.rstrip()) > width:
            lines[-1:] = [word[:width], ""]
            word = word[width:]
        lines[-1] += word
    return [line.rstrip() for line in lines if line.strip()]


def words(text: str) -> list[str]:
    """Return the parts of a name, each with the sign that ends it."""
    return list(filter(None, WORD_ENDS.split(text)))
