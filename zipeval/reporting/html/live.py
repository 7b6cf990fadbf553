"""A results directory as it is now, for a page that is served while runs may still write to it. Imports no torch."""

from __future__ import annotations

import shlex
from functools import lru_cache
from pathlib import Path
from threading import Lock, Thread

from zipeval.errors import UsageError
from zipeval.reporting.html import browser
from zipeval.reporting.html.browser import Query, Section, Selection
from zipeval.reporting.html.page import Browser, TableSection, identities, render_page
from zipeval.reporting.html.pictures import read_picture
from zipeval.reporting.html.sample_columns import SampleColumns, read_columns
from zipeval.reporting.tables import Record, Table, tables
from zipeval.results import journal

RESULTS = "results/runs"
PICTURES = 256  # that are kept in memory
SELECTIONS = 16  # likewise
RecordFiles = tuple[
    tuple[str, int, int], ...
]  # of each its path, its size and its time in nanoseconds


class ColumnCache:
    """The samples of records, read once."""

    def __init__(self) -> None:
        self._columns: dict[tuple[str, str], SampleColumns] = {}

    def read(self, record: Record, bound: SampleColumns | None) -> SampleColumns:
        """Return the samples of a record; see `read_columns`."""
        key = (record["path"], record["samples"]["sha256"])
        if key not in self._columns:
            self._columns[key] = read_columns(record, bound)
        return self._columns[key]

    def drop_all_but(self, paths: set[str]) -> None:
        """Forget the samples of records at other paths."""
        for key in list(self._columns):
            if key[0] not in paths:
                del self._columns[key]


class Snapshot:
    """The tables of a directory as they were at one time, and their questions, which are read when they are wanted.

    Attributes:
        files: the records that there were.
        tables: by what links call them.
        problem: why there are none.
    """

    def __init__(
        self, files: RecordFiles, made: list[Table], problem: str, cache: ColumnCache
    ):
        self.files, self.problem = files, problem
        self.tables: dict[str, Table] = dict(zip(identities(made), made, strict=True))
        self._cache = cache
        self._sections: dict[str, Section] = {}
        self._reading, self._looking = (
            Lock(),
            Lock(),
        )  # a browser asks for several things at a time
        self.select = lru_cache(SELECTIONS)(self._select)
        self.picture = lru_cache(PICTURES)(self._picture)

    def sections(self) -> list[Section]:
        """Return the questions of all tables.

        Raises:
            UsageError: where samples are not those of their records.
        """
        return [self.section(identity) for identity in self.tables]

    def section(self, identity: str) -> Section:
        """Return the questions of a table; without a name, those of the first one.

        Raises:
            KeyError: where there is no such table.
            UsageError: where samples are not those of their records.
        """
        identity = identity or next(iter(self.tables), "")
        table = self.tables[identity]
        with self._reading:
            if identity not in self._sections:
                self._sections[identity] = browser.read_section(
                    table, identity, self._cache.read
                )
            return self._sections[identity]

    def _select(self, identity: str, query: Query) -> Selection:
        return browser.select(self.section(identity), query)

    def _picture(self, identity: str, task: str, document: str) -> bytes | None:
        """Return the JPEG of a question's picture; None where it is not on this machine.

        Raises:
            KeyError: for a question that is none of the directory's.
        """
        questions = self.section(identity).benchmarks[task]
        (sample,) = questions.answers[0].file.read([questions.row_of[document]])
        with self._looking:  # data sets are not made for several readers
            for record in questions.records:
                picture = read_picture(record, sample)
                if picture is not None:
                    return picture
        return None


class LiveResults:
    """A results directory. Samples are read once, and those of new records after a page is loaded.

    Attributes:
        now: the directory when a page was last loaded.

    Args:
        results: directory of runs.

    Raises:
        UsageError: if there is no such directory.
    """

    def __init__(self, results: str):
        self.results, self.directory = results, Path(results).expanduser()
        if not self.directory.is_dir():
            raise UsageError(
                f"results={results}: no such directory. `zipeval run` makes it; results=DIR looks elsewhere."
            )
        self._cache = ColumnCache()
        self._refreshing, self._reporting = Lock(), Lock()
        self._report: tuple[RecordFiles, str] | None = None
        self.now = self._look(self._files())

    def refresh(self) -> Snapshot:
        """Look at the directory again; returns what is there now."""
        with self._refreshing:
            files = self._files()
            if files != self.now.files:
                self._cache.drop_all_but({path for path, _, _ in files})
                self.now = self._look(files)
            return self.now

    def _look(self, files: RecordFiles) -> Snapshot:
        try:
            return Snapshot(
                files, tables(self.results, under_way=True), "", self._cache
            )
        except UsageError as error:
            return Snapshot(files, [], str(error), self._cache)

    def _files(self) -> RecordFiles:
        """Return what changes when a record does."""
        files = []
        for path in sorted(self.directory.glob("*/*.json")):
            status = path.stat()
            files.append((str(path), status.st_size, status.st_mtime_ns))
        return tuple(files)

    def read_ahead(self) -> None:
        """Begin to read all samples; whoever asks for some meanwhile waits for these only."""
        Thread(target=self._read_all, daemon=True).start()

    def _read_all(self) -> None:
        try:
            self.now.sections()
        except UsageError:
            return  # the page asks again, and is told

    def under_way(self) -> list[str]:
        """Return what is being answered, and how far it is."""
        lines = []
        for path in sorted(self.directory.glob("*/*.journal.jsonl")):
            task = path.name.removesuffix(".journal.jsonl")
            if not path.with_name(f"{task}.json").exists():
                lines.append(
                    f"{path.parent.name} {task}, {journal.answered(path.parent, task):,} answers so far"
                )
        return lines

    def page(self, problem: str = "") -> str:
        """Return the page with the scores, without reading samples.

        Args:
            problem: to be said on it.
        """
        snapshot = self.refresh()
        sections, shown = [], {}
        for number, table in enumerate(snapshot.tables.values(), 1):
            sections.append(TableSection(number, table))
            for row in table.rows:
                shown |= {
                    cell.record["path"]: cell.record for cell in row.cells.values()
                }
        return render_page(
            sections,
            list(shown.values()),
            Browser(command=self.command),
            list(snapshot.tables),
            complete=False,
            under_way=self.under_way(),
            problem=snapshot.problem or problem,
        )

    def report(self) -> str:
        """Return the page with everything. It reads all samples, and is kept until a record is new.

        Raises:
            UsageError: where there are no tables.
        """
        from zipeval.reporting.html.report import render_report

        files = self.refresh().files
        with self._reporting:
            if self._report is None or self._report[0] != files:
                text, _ = render_report(self.results, live=True)
                self._report = files, text
            return self._report[1]

    @property
    def command(self) -> str:
        """Return the command that shows this directory."""
        return shlex.join(
            [
                "zipeval",
                "view",
                *([f"results={self.results}"] if self.results != RESULTS else []),
            ]
        )
