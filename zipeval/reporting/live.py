"""A results directory as it is now, for a page that is served while runs may still write to it. Imports no torch."""

from __future__ import annotations

import shlex
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from threading import Lock, Thread

from zipeval import journal
from zipeval.errors import UsageError
from zipeval.evaluation.pictures import read_picture
from zipeval.reporting import browser
from zipeval.reporting.browser import Query, Section, Selection
from zipeval.reporting.page import Browser, TableSection, identities, render_page
from zipeval.reporting.sample_columns import SampleColumns, read_columns
from zipeval.tables import Record, Table, tables

RESULTS = "results/runs"
PICTURES = 256  # that are kept in memory
SELECTIONS = 16  # likewise


@dataclass(frozen=True)
class State:
    """What a directory held when it was looked at.

    Attributes:
        files: its records with their sizes and times; None before it was looked at.
        tables: by what links call them.
        problem: why there are none.
    """

    files: tuple[tuple[str, int, int], ...] | None = None
    tables: dict[str, Table] = field(default_factory=dict)
    problem: str = ""


class LiveResults:
    """The questions of a results directory. Samples are read once, and those of new records when a page is loaded.

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
        self.state = State()
        self._sections: dict[str, Section] = {}
        self._columns: dict[tuple[str, str], SampleColumns] = {}
        self._report: tuple[object, str] | None = None
        # A browser asks for several things at a time.
        self._lock, self._picture_lock, self._report_lock = Lock(), Lock(), Lock()
        self.picture = lru_cache(PICTURES)(self._picture)
        self.select = lru_cache(SELECTIONS)(self._select)

    def refresh(self) -> State:
        """Look at the directory again; returns what is there now."""
        with self._lock:
            files = self._files()
            if files == self.state.files:
                return self.state
            try:
                made = tables(self.results, under_way=True)
                state = State(files, dict(zip(identities(made), made, strict=True)))
            except UsageError as error:
                state = State(files, problem=str(error))
            self.state, self._sections = state, {}
            present = {path for path, _, _ in files}
            self._columns = {key: columns for key, columns in self._columns.items() if key[0] in present}
            self.picture.cache_clear()
            self.select.cache_clear()
        return state

    def _files(self) -> tuple[tuple[str, int, int], ...]:
        """Return what changes when a record does."""
        files = []
        for path in sorted(self.directory.glob("*/*.json")):
            status = path.stat()
            files.append((str(path), status.st_size, status.st_mtime_ns))
        return tuple(files)

    def read_ahead(self) -> None:
        """Begin to read all samples, which the first filter needs; whoever asks for some waits for these only."""
        Thread(target=self._read_all, daemon=True).start()

    def _read_all(self) -> None:
        try:
            self.sections()
        except UsageError:
            return  # the page asks again, and is told

    def sections(self) -> list[Section]:
        """Return the questions of all tables.

        Raises:
            UsageError: where samples are not those of their records.
        """
        return [self.section(identity) for identity in self.state.tables]

    def section(self, identity: str) -> Section:
        """Return the questions of a table; without a name, those of the first one.

        Raises:
            KeyError: where there is no such table.
            UsageError: where samples are not those of their records.
        """
        with self._lock:
            identity = identity or next(iter(self.state.tables), "")
            table = self.state.tables[identity]
            if identity not in self._sections:
                self._sections[identity] = browser.read_section(table, identity, self._read_columns)
            return self._sections[identity]

    def _read_columns(self, record: Record, bound: SampleColumns | None) -> SampleColumns:
        key = (record["path"], record["samples"]["sha256"])
        if key not in self._columns:
            self._columns[key] = read_columns(record, bound)
        return self._columns[key]

    def _select(self, identity: str, query: Query) -> Selection:
        return browser.select(self.section(identity), query)

    def _picture(self, identity: str, task: str, document: str) -> bytes | None:
        """Return the JPEG of a question's picture; None where it is not on this machine.

        Raises:
            KeyError: for a question that is none of the directory's.
        """
        questions = self.section(identity).benchmarks[task]
        row = questions.row_of[document]
        (sample,) = questions.answers[0].file.read([row])
        with self._picture_lock:  # data sets are not made for several readers
            for record in questions.records:
                picture = read_picture(record, sample["doc_id"])
                if picture is not None:
                    return picture
        return None

    def under_way(self) -> list[str]:
        """Return what is being answered, and how far it is."""
        lines = []
        for path in sorted(self.directory.glob("*/*.journal.jsonl")):
            task = path.name.removesuffix(".journal.jsonl")
            if not path.with_name(f"{task}.json").exists():
                lines.append(f"{path.parent.name} {task}, {journal.answered(path.parent, task):,} answers so far")
        return lines

    def page(self, problem: str = "") -> str:
        """Return the page with the scores, without reading samples.

        Args:
            problem: to be said on it.
        """
        state = self.refresh()
        sections = [TableSection(number, table) for number, table in enumerate(state.tables.values(), 1)]
        cells = [cell for table in state.tables.values() for row in table.rows for cell in row.cells.values()]
        shown = {cell.record["path"]: cell.record for cell in cells}
        return render_page(
            sections,
            list(shown.values()),
            Browser(command=self.command),
            list(state.tables),
            complete=False,
            under_way=self.under_way(),
            problem=state.problem or problem,
        )

    def report(self) -> str:
        """Return the page with everything. It reads all samples, and is kept until a record is new.

        Raises:
            UsageError: where there are no tables.
        """
        from zipeval.report import render_report  # and matplotlib

        state = self.refresh()
        with self._report_lock:
            if self._report is None or self._report[0] != state.files:
                self._report = state.files, render_report(self.results, live=True)[0]
            return self._report[1]

    @property
    def command(self) -> str:
        """Return the command that shows this directory."""
        return shlex.join(["zipeval", "view", *([f"results={self.results}"] if self.results != RESULTS else [])])
