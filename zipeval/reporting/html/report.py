"""A report: records become one HTML file that holds all it shows and asks nobody for anything. Imports no torch."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

from markupsafe import Markup

from zipeval.errors import UsageError
from zipeval.reporting.html import overlap, page
from zipeval.reporting.html.browser import file_data, read_section
from zipeval.reporting.html.gallery import Shown, gallery, pictures
from zipeval.reporting.html.page import Browser, Failure
from zipeval.reporting.method_styles import COLOURS, INK
from zipeval.reporting.plots import (
    LINE,
    Plot,
    budget,
    inline,
    plots,
    seconds_of_rows,
    write,
)
from zipeval.reporting.scored_samples import read_scored, seconds_per_sample
from zipeval.reporting.tables import Record, Table, tables
from zipeval.results import records

RESULTS = "results/runs"
# Bytes of questions that a file holds: a browser opens it at once, and it can be sent
# by mail.
MOST_DATA = 10_000_000
METHOD_COLOURS = {colour: f"var(--c{i})" for i, colour in enumerate(COLOURS)}
PAGE_COLOURS = {INK: "var(--ink)", LINE: "var(--line)"} | METHOD_COLOURS


@dataclass(frozen=True)
class Outcome:
    """Hold what a report needs of a record's samples.

    Attributes:
        seconds: per sample, each its share of its batch's; None where nothing was read.
        batch: samples of its largest batch; the last one of a task may be smaller.
        kept: document -> the positions kept of each of its pictures, as bits; only of samples that have them.
        failures: (document, what, reason).
        shown: document -> sample, of those with a picture.
    """

    seconds: float | None
    batch: int | None
    kept: dict[tuple[str, str], list[int]]
    failures: list[tuple[str, str, str]]
    shown: dict[str, dict]


@dataclass(frozen=True)
class Overlap:
    """Hold the runs of a budget, how many tokens each keeps of a sample, and what they share."""

    tokens: int
    labels: list[str]
    sizes: list[float]
    matrix: list[list[float | None]]
    samples: int


@dataclass(frozen=True)
class Section:
    """Hold all about one table, whose runs can be compared."""

    number: int
    table: Table
    plots: list[Plot]
    gallery: list[Shown]
    overlaps: list[Overlap]
    batches: list[int]

    @property
    def name(self) -> str:
        """Return the name of its model."""
        return self.table.about.partition(" (")[0]

    def inlined(self, plot: Plot) -> Markup:
        """Return a plot as SVG in the page's colours."""
        prefix = f"s{self.number}-{self.plots.index(plot)}"
        return Markup(inline(plot, prefix, PAGE_COLOURS))


def report(results: str, out: Path, figures: Path | None = None) -> list[Path]:
    """Write a report and, if there is a directory for them, the plots as files; returns what was written.

    Args:
        results: directory of runs.
        out: the HTML file.

    Raises:
        UsageError: for records that make no table, and where nothing can be written.
    """
    text, sections = render_report(results)
    written = [out]
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        records.atomic_write(out, text)
        for section in sections if figures else []:
            written += write(section.plots, figures, f"{section.number}-{section.name}")
    except OSError as error:
        where = f"out={out}" + (f" plots={figures}" if figures else "")
        raise UsageError(
            f"{where}: cannot write there ({error.strerror}). Choose another place."
        ) from error
    return written


def render_report(results: str, live: bool = False) -> tuple[str, list[Section]]:
    """Return the page and its sections.

    Args:
        live: whether the page asks a server for its questions; otherwise it holds them.

    Raises:
        UsageError: for records that make no table.
    """
    built = tables(results, statistics=True, under_way=live)
    shown: dict[str, Record] = {}
    for table in built:
        shown |= _records_of(table)
    outcomes = {path: outcome(record) for path, record in shown.items()}
    sections = [
        _section(number, table, outcomes) for number, table in enumerate(built, 1)
    ]
    text = page.render_page(
        sections,
        list(shown.values()),
        Browser() if live else _browser(sections, results),
        page.identities(built),
        failures=_failures(list(shown.values()), outcomes),
        budget_of=budget,
    )
    return text, sections


def _records_of(table: Table) -> dict[str, Record]:
    """Return the records of a table, by their paths."""
    table_records = {}
    for row in table.rows:
        for cell in row.cells.values():
            table_records[cell.record["path"]] = cell.record
    return table_records


def _browser(sections: list[Section], results: str) -> Browser:
    """Return the questions of all tables, or say that a file would be too large with them."""
    data = []
    identities = page.identities([section.table for section in sections])
    for section, identity in zip(sections, identities, strict=True):
        # The gallery has these pictures already: a picture is in the file once.
        pictures_shown = {
            (shown.task, shown.doc_id): f"s{section.number}-p{number}"
            for number, shown in enumerate(section.gallery, 1)
        }
        data.append(file_data(read_section(section.table, identity), pictures_shown))
    command = "zipeval view"
    if results != RESULTS:
        command = shlex.join(["zipeval", "view", f"results={results}"])
    size = len(page.embedded({"sections": data}).encode())
    if size > MOST_DATA:
        refusal = (
            f"The questions and answers would add {size / 1e6:.0f} MB to this file, which is more than the "
            f"{MOST_DATA / 1e6:.0f} MB that it may hold. None are in it."
        )
        return Browser(refusal=refusal, command=command)
    return Browser({"sections": data}, command=command)


def outcome(record: Record) -> Outcome:
    """Read the samples of a record once."""
    samples = read_scored(record)
    images = pictures(record)
    batches = [sample["batch"] for sample in samples if "latency" in sample]
    kept_positions, failures, shown = {}, [], {}
    for sample in samples:
        document = str(sample["doc_id"])
        if "kept" in sample:
            bits = [overlap.bits(positions) for positions in sample["kept"]]
            kept_positions[record["task"], document] = bits
        for key, words in (("error", "not read"), ("unscored", "no verdict")):
            if key in sample:
                failures.append((document, words, str(sample[key])))
        if document in images:
            shown[document] = sample
    return Outcome(
        seconds=seconds_per_sample(record, samples),
        batch=max(batches, default=None),
        kept=kept_positions,
        failures=failures,
        shown=shown,
    )


def _section(number: int, table: Table, outcomes: dict[str, Outcome]) -> Section:
    """Return all that a report shows of a table."""
    shown, seconds = {}, {}
    for path, record_outcome in outcomes.items():
        shown[path] = record_outcome.shown
        seconds[path] = record_outcome.seconds
    batches = {outcomes[path].batch for path in _records_of(table)}
    return Section(
        number,
        table,
        plots(table, seconds_of_rows(table, seconds)),
        gallery(table, shown),
        list(_overlaps(table, outcomes)),
        # Of a record that was not read, no batch is known.
        sorted(filter(None, batches)),
    )


def _overlaps(table: Table, outcomes: dict[str, Outcome]) -> Iterator[Overlap]:
    """Yield what runs share, for each budget at which two runs keep tokens."""
    for group in table.groups():
        by_run: dict[str, dict] = {}
        for row in group:
            traced: dict[tuple[str, str], list[int]] = {}
            for cell in row.cells.values():
                traced |= outcomes[cell.record["path"]].kept
            # A method that only merges keeps no token as it is.
            if any(map(any, traced.values())):
                by_run[row.label] = traced
        if group[0].tokens is None or len(by_run) < 2:
            continue
        shared = set.intersection(*map(set, by_run.values()))
        yield Overlap(
            group[0].tokens,
            list(by_run),
            [_mean_size(traced) for traced in by_run.values()],
            overlap.matrix(list(by_run.values())),
            len(shared),
        )


def _mean_size(traced: dict[tuple[str, str], list[int]]) -> float:
    """Return how many tokens a run keeps of a sample, on average."""
    sizes = []
    for bits in traced.values():
        sizes.append(sum(positions.bit_count() for positions in bits))
    return fmean(sizes)


def _failures(shown: list[Record], outcomes: dict[str, Outcome]) -> list[Failure]:
    """Return the failures of some records, each once for all runs that have it."""
    failures: dict[tuple, Failure] = {}
    for record in shown:
        for failure in outcomes[record["path"]].failures:
            key = (record["task"], *failure)
            failures.setdefault(key, Failure(*key)).runs.append(record["run_id"])
    return list(failures.values())
