"""Show what runs came to, as DataFrames and plots for notebooks. Imports no torch."""

from __future__ import annotations

from collections.abc import Collection
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from zipeval.errors import UsageError, did_you_mean
from zipeval.reporting.columns import chosen_tables
from zipeval.reporting.tables import Record, Table
from zipeval.results import records

if TYPE_CHECKING:
    import pandas as pd

    from zipeval.reporting.plots import Plot
    from zipeval.reporting.score_table import ScoreTable


class Results:
    """The records of a directory, or some of them.

    Attributes:
        directory: of the records.
        paths: of the records that it is about; None for all that are there now.
    """

    def __init__(self, directory: str, paths: Collection[str] | None = None):
        self.directory = directory
        self.paths = None if paths is None else [*dict.fromkeys(paths)]

    def __repr__(self) -> str:
        return f"<{len(self._records)} records of {self.directory}>"

    def _repr_html_(self) -> str:
        return self.table().render("html")

    @property
    def _records(self) -> list[Record]:
        """Return the records, as they are now."""
        present = records.read_all(self.directory)
        return [
            record
            for record in present
            if self.paths is None or record["path"] in self.paths
        ]

    @property
    def records(self) -> pd.DataFrame:
        """Return a row for each run and benchmark; zipeval/reporting/frames.py says what its columns are."""
        from zipeval.reporting.frames import records_frame

        return records_frame(self._records)

    @cached_property
    def samples(self) -> pd.DataFrame:
        """Return a row for each question of each run, beside the upper bound's answer.

        Columns are explained in zipeval/reporting/frames.py. They are read once: another `read_results` reads again.

        Raises:
            UsageError: if samples changed since their record was written.
        """
        from zipeval.reporting.frames import samples_frame

        return samples_frame(self._records, records.read_all(self.directory))

    def table(
        self,
        task: str | None = None,
        columns: list[str] | None = None,
        model: str | None = None,
        statistics: bool = False,
    ) -> ScoreTable:
        """Return scores and their percentages of the upper bound, as `zipeval table` prints them.

        Args:
            task: show all metrics of this task instead of the main one of every task.
            columns: benchmarks to show, by their headings or their tasks, in this order; None for all.
            model: of runs of this model only.
            statistics: add 95% intervals, and which differences are significant.

        Raises:
            UsageError: for names that are not there, and for records without an upper bound.
        """
        from zipeval.reporting.score_table import score_table

        return score_table(self._tables(task, columns, model, statistics), statistics)

    def _tables(
        self,
        task: str | None,
        columns: list[str] | None,
        model: str | None,
        statistics: bool,
    ) -> list[Table]:
        if self.paths is not None and not self._records:
            raise UsageError(
                f"results={self.directory}: the records of these runs are gone. Evaluate them again."
            )
        options = {"model": model, "statistics": statistics, "paths": self.paths}
        return chosen_tables(self.directory, columns, task, **options)

    def plot(
        self,
        name: str = "tokens",
        columns: list[str] | None = None,
        model: str | None = None,
    ) -> Plot:
        """Return a plot of percentages with 95% intervals, which a notebook shows; `.save("FILE.pdf")` writes it.

        Args:
            name: `tokens` or `time` for the average percentage against visual tokens or seconds per sample; `curves`
                for every benchmark's own metric against visual tokens; a benchmark's heading for bars by budget.
            columns, model: as in `table`.

        Raises:
            UsageError: if there is no such plot, and where several tables could be plotted.
        """
        from zipeval.reporting.plots import table_plots

        shown = self._tables(None, columns, model, statistics=True)
        if len(shown) > 1:
            models = ", ".join(dict.fromkeys(table.about for table in shown))
            raise UsageError(
                f"plot: there are {len(shown)} tables ({models}). Choose one with model=."
            )
        plots = {}
        for plot in table_plots(shown[0]):
            plots[plot.column or plot.name] = plot
        if name not in plots:
            raise UsageError(
                f"plot: no such plot as {name}.{did_you_mean(name, plots)}"
            )
        return plots[name]


def read_results(directory: str | Path = "results/runs") -> Results:
    """Return the records of a directory, as `zipeval run` and `zipeval.evaluate` write them.

    Raises:
        UsageError: if there are none.
    """
    results = Results(str(directory))
    if not results._records:
        raise UsageError(
            f"results={directory}: no records. `zipeval run` and zipeval.evaluate() make them; name their directory."
        )
    return results
