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
MOST_DATA = 10_000_000  # bytes of questions that a file holds: a browser opens it at once, and it can be sent by mail
PAGE_COLOURS = {INK: "var(--ink)", LINE: "var(--line)"} | {
    c: f"var(--c{i})" for i, c in enumerate(COLOURS)
}


@dataclass(frozen=True)
class Outcome:
    """What a report needs of a record's samples.

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
    """The runs of a budget, how many tokens each keeps of a sample, and what they share."""

    tokens: int
    labels: list[str]
    sizes: list[float]
    matrix: list[list[float | None]]
    samples: int


@dataclass(frozen=True)
class Section:
    """All about one table, whose runs can be compared."""

    number: int
    table: Table
    plots: list[Plot]
    gallery: list[Shown]
    overlaps: list[Overlap]
    batches: list[int]

    @property
    def name(self) -> str:
        """Of its model."""
        return self.table.about.partition(" (")[0]

    def inlined(self, plot: Plot) -> Markup:
        """A plot as SVG in the page's colours."""
        return Markup(
            inline(plot, f"s{self.number}-{self.plots.index(plot)}", PAGE_COLOURS)
        )


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
    found = tables(results, statistics=True, under_way=live)
    shown = {
        cell.record["path"]: cell.record
        for table in found
        for row in table.rows
        for cell in row.cells.values()
    }
    outcomes = {path: outcome(record) for path, record in shown.items()}
    sections = [
        _section(number, table, outcomes) for number, table in enumerate(found, 1)
    ]
    text = page.render_page(
        sections,
        list(shown.values()),
        Browser() if live else _browser(sections, results),
        page.identities(found),
        failures=_failures(list(shown.values()), outcomes),
        budget_of=budget,
    )
    return text, sections


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
    command = shlex.join(
        ["zipeval", "view", *([f"results={results}"] if results != RESULTS else [])]
    )
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
    return Outcome(
        seconds=seconds_per_sample(record, samples),
        batch=max((s["batch"] for s in samples if "latency" in s), default=None),
        kept={
            (record["task"], str(s["doc_id"])): [
                overlap.bits(positions) for positions in s["kept"]
            ]
            for s in samples
            if "kept" in s
        },
        failures=[
            (str(s["doc_id"]), what, str(s[key]))
            for s in samples
            for key, what in (("error", "not read"), ("unscored", "no verdict"))
            if key in s
        ],
        shown={doc: s for s in samples if (doc := str(s["doc_id"])) in images},
    )


def _section(number: int, table: Table, outcomes: dict[str, Outcome]) -> Section:
    shown = {path: found.shown for path, found in outcomes.items()}
    its = [
        outcomes[cell.record["path"]]
        for row in table.rows
        for cell in row.cells.values()
    ]
    return Section(
        number,
        table,
        plots(
            table,
            seconds_of_rows(
                table, {path: found.seconds for path, found in outcomes.items()}
            ),
        ),
        gallery(table, shown),
        list(_overlaps(table, outcomes)),
        sorted({found.batch for found in its if found.batch}),
    )


def _overlaps(table: Table, outcomes: dict[str, Outcome]) -> Iterator[Overlap]:
    """One for each budget at which two runs keep tokens."""
    for group in table.groups():
        kept = {}
        for row in group:
            of_row = [outcomes[cell.record["path"]].kept for cell in row.cells.values()]
            traced = {
                sample: sets for of_task in of_row for sample, sets in of_task.items()
            }
            if any(
                map(any, traced.values())
            ):  # a method that only merges keeps nothing as itself
                kept[row.label] = traced
        if group[0].tokens is not None and len(kept) > 1:
            sizes = [
                fmean(sum(s.bit_count() for s in sets) for sets in of.values())
                for of in kept.values()
            ]
            shared = set.intersection(*map(set, kept.values()))
            yield Overlap(
                group[0].tokens,
                list(kept),
                sizes,
                overlap.matrix(list(kept.values())),
                len(shared),
            )


def _failures(found: list[Record], outcomes: dict[str, Outcome]) -> list[Failure]:
    """The same failure of several runs once."""
    failures: dict[tuple, Failure] = {}
    for record in found:
        for of in outcomes[record["path"]].failures:
            key = (record["task"], *of)
            failures.setdefault(key, Failure(*key)).runs.append(record["run_id"])
    return list(failures.values())
