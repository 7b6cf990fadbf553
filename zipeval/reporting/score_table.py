"""A table as a DataFrame that a notebook shows. Imports no torch."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd

from zipeval.reporting.frames import OF_A_METHOD, cells_frame
from zipeval.reporting.render import render
from zipeval.reporting.tables import Table

# What a table has in a column: the numbers of a score, and with statistics those of its comparison.
NUMBERS, COMPARED = ("score", "percent"), ("low", "high", "lost", "gained", "p", "tied")


class ScoreTable(pd.DataFrame):
    """Scores and percentages of the upper bound: a row for each model, method and budget.

    Columns have two levels. The first one names a benchmark or `average`, or `visual tokens`: how many entered the
    decoder's layers on average (`mean`) and its last one (`final`), and the FLOPs of reading the prompt as a share of
    the upper bound's. A notebook shows it as `zipeval table` prints it, with what has to be said of its numbers.
    """

    _metadata = ("tables",)  # pandas hands these on to copies

    @property
    def _constructor(self):
        """Return what a part of it is: a plain DataFrame, of which nothing more is known."""
        return pd.DataFrame

    def _repr_html_(self) -> str:
        return self.render("html")

    def render(self, form: str = "markdown") -> str:
        """Return the table as text in one of the formats of `zipeval table`: markdown, csv, latex, html or json.

        Raises:
            UsageError: for a format that is none.
        """
        return render(self.tables, form)


def score_table(tables: Sequence[Table], statistics: bool = False) -> ScoreTable:
    """Return some tables as one DataFrame.

    Args:
        statistics: whether they have comparisons with the upper bound.
    """
    cells = cells_frame(tables)
    names = _model_names(tables)
    cells["model"] = cells["table"].map(names)
    index = ["model", "method", "tokens"]
    numbers = [*NUMBERS, *(COMPARED if statistics else ())]
    # Rows and columns stay in the order of the tables, which a pivot would sort.
    rows = list(dict.fromkeys(cells[index].itertuples(index=False, name=None)))
    wide: dict[tuple[str, str], pd.Series] = {}
    of_rows = cells.drop_duplicates(index).set_index(index)
    for name in OF_A_METHOD:
        wide["visual tokens" if name != "flops" else "prompt", name] = of_rows[name]
    for benchmark, of_benchmark in cells.groupby("benchmark", sort=False):
        of_benchmark = of_benchmark.set_index(index)
        for name in numbers:
            if not (benchmark == "average" and name == "score"):
                wide[benchmark, name] = of_benchmark[name]
    order = pd.MultiIndex.from_tuples(rows, names=index)
    table = ScoreTable(
        {column: values.reindex(order) for column, values in wide.items()}, index=order
    )
    table.columns = pd.MultiIndex.from_tuples(list(wide))
    table.tables = list(tables)
    return table


def _model_names(tables: Sequence[Table]) -> dict[str, str]:
    """Return what tables are called: by their model, or where two are of the same one by all that is known of them."""
    models = [table.about.partition(" (")[0] for table in tables]
    names = {}
    for table, model in zip(tables, models, strict=True):
        names[table.about] = model if models.count(model) == 1 else table.about
    return names
