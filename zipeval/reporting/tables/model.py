"""A table as data: rows, and cells with a score and a percentage."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import groupby
from typing import TYPE_CHECKING

from zipeval.config.schema import UPPER_BOUND
from zipeval.reporting.remarks import Remark
from zipeval.results.schema import Record

if TYPE_CHECKING:
    from zipeval.reporting.stats import Comparison

MEASURED = "measured"
PUBLISHED = "published"
DIFFERENCE = "difference"


@dataclass(frozen=True)
class TableCell:
    """Hold a number of a benchmark.

    Attributes:
        score: on the papers' scale; None while no answer is judged.
        percent: of the upper bound's score; None where one of them is missing or the bound's prompts did not fit the
            model, nan where it is not defined (zipeval/reporting/percentages.py).
        record: where it comes from; None for a published one.
        comparison: with the upper bound, sample by sample.
        tied: with the best of the same budget, or the best itself, where several methods have one.
        remarks: what has to be said of it, and of the upper bound where it has a percentage.
        higher_is_better: whether a larger score is better.
    """

    score: float | None
    percent: float | None
    record: Record | None = None
    comparison: Comparison | None = None
    tied: bool = False
    remarks: tuple[Remark, ...] = ()
    higher_is_better: bool = True


@dataclass(frozen=True)
class Row:
    """Hold the numbers of a method at a budget.

    Attributes:
        label: the method and its options that are not at their default.
        tokens: visual tokens an image was to be left with; None for all.
        cells: by the headings of their columns.
        mean: visual tokens that entered the decoder's layers, mean over layers and prompts.
        final: visual tokens that entered the decoder's last layer, mean over prompts.
        flops: of reading the prompts, as a share of the upper bound's.
        average: of the percentages, where there is one for every column.
        average_comparison: its interval.
        kind: measured, published, or the difference of the two.
    """

    label: str
    tokens: int | None
    cells: dict[str, TableCell]
    mean: float | None = None
    final: float | None = None
    flops: float | None = None
    average: float | None = None
    average_comparison: Comparison | None = None
    kind: str = MEASURED

    @property
    def remarks(self) -> tuple[Remark, ...]:
        """Return the remarks on the average: all remarks on the numbers that it is made of."""
        remarks = []
        for column, cell in self.cells.items():
            for remark in cell.remarks:
                remarks.append(Remark(remark.kind, f"{column}: {remark.text}"))
        return tuple(remarks)


@dataclass(frozen=True)
class Table:
    """Hold rows with one upper bound, which is the first of them.

    Attributes:
        about: what its runs have in common.
        columns: headings, the benchmarks.
        rows: the upper bound, then the others from large budgets to small ones.
        notes: what has to be said about some rows.
        bound: the method that percentages are of.
    """

    about: str
    columns: list[str]
    rows: list[Row]
    notes: list[str] = field(default_factory=list)
    bound: str = UPPER_BOUND

    def groups(self) -> list[list[Row]]:
        """Return the rows of each budget."""
        by_budget = groupby(self.rows, key=lambda row: row.tokens)
        return [list(rows) for _, rows in by_budget]
