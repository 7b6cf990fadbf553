"""Questions as rows: what every run of a table answers to them, filtered, sorted and in pages. Pure data, no HTML.

Both pages show them: that of `zipeval view` asks for rows, and the file of `zipeval report` holds them in columns.
Imports no torch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from math import isqrt
from typing import Any

import numpy as np

from zipeval.benchmarks import videoqa
from zipeval.errors import UsageError
from zipeval.reporting.html import overlap
from zipeval.reporting.html.sample_columns import (
    SampleColumns,
    SampleFile,
    read_columns,
)
from zipeval.reporting.tables import Record, Table

# What is known of an answer, as bits of one number. LOST and GAINED are against the upper bound.
SCORED, FAILS, LOST, GAINED = 1, 2, 4, 8
OUTCOMES = ("lost", "gained", "wrong", "right")
MOST_FAIL, FEWEST_FAIL = "most-fail", "fewest-fail"
SORTS = ("", MOST_FAIL, FEWEST_FAIL)
ANY = "*"  # as a run: one of those that are shown
ALL_TOKENS = "all"  # as a budget
PAGE = 50  # rows
# How a picture of any shape lies on the square that a model sees, in SVG's words.
FITS = {"pad": "xMidYMid meet", "crop": "xMidYMid slice"}
READ_COLUMNS = Callable[[Record, SampleColumns | None], SampleColumns]


@dataclass(frozen=True)
class Run:
    """A row of a table: a method at a budget.

    Attributes:
        is_bound: whether it is the upper bound.
    """

    label: str
    tokens: int | None
    is_bound: bool

    @property
    def name(self) -> str:
        """Return what a filter calls it: `visionzip 16`."""
        return self.label if self.tokens is None else f"{self.label} {self.tokens}"

    @property
    def budget(self) -> str:
        """Return its visual tokens as text."""
        return ALL_TOKENS if self.tokens is None else str(self.tokens)


@dataclass(frozen=True)
class Answers:
    """A run's answers to a benchmark's questions, in the order of the questions.

    Attributes:
        verdicts: what each is worth, in a word or two.
        flags: of SCORED, FAILS, LOST and GAINED.
    """

    texts: list[str]
    verdicts: list[str]
    flags: np.ndarray
    file: SampleFile


@dataclass(frozen=True)
class Questions:
    """A benchmark's questions, and what runs answer to them.

    Attributes:
        column: the heading of the benchmark in tables.
        higher_is_better: whether a larger score is better.
        side: visual tokens in a row of a picture.
        fit: how a picture lies on the square of these tokens, as `preserveAspectRatio` of SVG.
        answers: by the number of the run; runs that lack the benchmark have none.
        records: of these runs, the upper bound's first.
    """

    task: str
    column: str
    higher_is_better: bool
    side: int
    fit: str
    documents: list[str]
    questions: list[str | None]
    choices: list[tuple[str, ...] | None]
    targets: list[str]
    kinds: list[str]
    answers: dict[int, Answers]
    records: list[Record]

    @cached_property
    def kind_array(self) -> np.ndarray:
        """Return the kinds of questions, to compare all at once."""
        return np.array(self.kinds)

    @cached_property
    def row_of(self) -> dict[str, int]:
        """Return the row of each document."""
        return {document: row for row, document in enumerate(self.documents)}


@dataclass(frozen=True)
class Section:
    """The questions of a table.

    Attributes:
        identity: what a link calls it, whatever other tables there are.
        benchmarks: by their tasks.
    """

    identity: str
    name: str
    about: str
    runs: list[Run]
    benchmarks: dict[str, Questions]

    @cached_property
    def run_numbers(self) -> dict[str, int]:
        """Return the number of each run by its name."""
        return {run.name: number for number, run in enumerate(self.runs)}


@dataclass(frozen=True)
class Query:
    """Say which questions are wanted; empty texts want all.

    Attributes:
        outcome: of OUTCOMES, of the answer of `run`.
        run: the name of a run, or ANY.
        method, budget: of the runs that are shown, beside the upper bound.
        text: what a question, a choice, a target or a shown answer holds; `#17` is a document.
        sort: of SORTS.
    """

    benchmark: str = ""
    kind: str = ""
    outcome: str = ""
    run: str = ""
    method: str = ""
    budget: str = ""
    text: str = ""
    sort: str = ""


@dataclass(frozen=True)
class Selection:
    """Questions in their order: the task and the row of each, and the runs whose answers are shown beside them."""

    places: list[tuple[str, int]] = field(default_factory=list)
    runs: list[int] = field(default_factory=list)


def read_section(
    table: Table, identity: str, read: READ_COLUMNS = read_columns
) -> Section:
    """Read the questions of a table.

    Args:
        identity: what links call it.
        read: returns the samples of a record, and is told those of its upper bound.

    Raises:
        UsageError: where samples are not those of their record, or those of two runs are about other questions.
    """
    runs, benchmarks = [], {}
    for number, row in enumerate(table.rows):
        runs.append(Run(row.label, row.tokens, is_bound=number == 0))
    for column in table.columns:
        cells = {
            number: row.cells[column]
            for number, row in enumerate(table.rows)
            if column in row.cells
        }
        records = {number: cell.record for number, cell in cells.items()}
        if 0 not in records:
            raise UsageError(
                f"{column}: the first row of its table, {runs[0].name}, has no record of it."
            )
        higher_is_better = all(cell.higher_is_better for cell in cells.values())
        benchmarks[records[0]["task"]] = _questions(
            column, records, higher_is_better, read
        )
    name = table.about.partition(" (")[0]
    return Section(identity, name, table.about, runs, benchmarks)


def _questions(
    column: str, records: dict[int, Record], higher_is_better: bool, read: READ_COLUMNS
) -> Questions:
    """Read the questions of a benchmark.

    Args:
        records: by the number of their run; 0 is the upper bound.
    """
    bound = read(records[0], None)
    columns = {0: bound}
    for number, record in records.items():
        if number:
            columns[number] = read(record, bound)
            _check_pairing(record, columns[number], records[0], bound)
    scores = np.stack([samples.scores for samples in columns.values()])
    known = scores[~np.isnan(scores)]
    worst = _worst_score(known, higher_is_better)
    # Scores of a judge go up to 10, and 1 is then the worst of them.
    in_words = higher_is_better and bool(np.all((known >= 0) & (known <= 1)))
    answers = {}
    for number, samples in columns.items():
        flags = _flags(samples.scores, bound.scores, higher_is_better, worst)
        answers[number] = Answers(
            samples.predictions, _verdicts(samples, in_words), flags, samples.file
        )
    return Questions(
        task=records[0]["task"],
        column=column,
        higher_is_better=higher_is_better,
        side=isqrt(
            records[0]["visual_tokens"]["patches"]
        ),  # CLS is one more in some models, without a place
        fit=_fit(records[0]),
        documents=bound.documents,
        questions=_first_known([samples.questions for samples in columns.values()]),
        choices=_first_known([samples.choices for samples in columns.values()]),
        targets=bound.targets,
        kinds=bound.kinds,
        answers=answers,
        records=list(records.values()),
    )


def _check_pairing(
    record: Record, samples: SampleColumns, bound_record: Record, bound: SampleColumns
) -> None:
    """Refuse a record whose samples are not about the questions of its upper bound.

    Raises:
        UsageError: names both.
    """
    if (samples.documents, samples.hashes) != (bound.documents, bound.hashes):
        raise UsageError(
            f"tasks=[{record['task']}]: {record['path']} and its upper bound {bound_record['path']} are not about the "
            "same questions. `zipeval run` both with the same limit= and the same data."
        )


def _first_known(columns: list[list]) -> list:
    """Return the first column that holds anything: records of before schema 6 do not hold questions."""
    for column in columns:
        if any(value is not None for value in column):
            return column
    return columns[0]


def _fit(record: Record) -> str:
    """Return how a data set's picture lies on the square that the model saw."""
    if record["task"] in videoqa.SETS:  # frames are cropped, whatever is done to images
        return FITS["crop"]
    return FITS.get(record["config"]["model"]["image_aspect"], "none")


def _worst_score(scores: np.ndarray, higher_is_better: bool) -> float | None:
    """Return the score of an answer that is plainly wrong; None where there is no such score."""
    if higher_is_better:
        return 0.0
    return 1.0 if np.isin(scores, (0, 1)).all() else None


def _flags(
    scores: np.ndarray, bound: np.ndarray, higher_is_better: bool, worst: float | None
) -> np.ndarray:
    """Return what is known of some answers. One fails that is wrong, or worth less than the upper bound's."""
    better, worse = (
        scores > bound,
        scores < bound,
    )  # neither holds where one of them is nan
    if not higher_is_better:
        better, worse = worse, better
    fails = worse | (scores == worst) if worst is not None else worse
    flags = SCORED * ~np.isnan(scores) + FAILS * fails + LOST * worse + GAINED * better
    return flags.astype(np.uint8)


def _verdicts(samples: SampleColumns, in_words: bool) -> list[str]:
    """Return what each answer is worth.

    Args:
        in_words: whether a score of 1 is right and one of 0 wrong.
    """
    words = {0.0: "wrong", 1.0: "right"} if in_words else {}
    verdicts = []
    for row, score in enumerate(samples.scores.tolist()):
        verdicts.append(
            samples.failures.get(row) or words.get(score) or f"score {score:.3g}"
        )
    return verdicts


def select(section: Section, query: Query) -> Selection:
    """Return the questions that a query wants.

    Raises:
        KeyError: for a run that the section has not.
    """
    shown = shown_runs(section, query)
    places, counts = [], [np.zeros(0, int)]
    for task, questions in section.benchmarks.items():
        if query.benchmark in ("", task):
            rows = _wanted_rows(section, questions, query, shown)
            places += [(task, row) for row in rows.tolist()]
            counts.append(fail_counts(questions, shown)[rows])
    if query.sort:
        order = np.concatenate(counts)
        order = np.argsort(-order if query.sort == MOST_FAIL else order, kind="stable")
        places = [places[i] for i in order.tolist()]
    return Selection(places, shown)


def _wanted_rows(
    section: Section, questions: Questions, query: Query, shown: list[int]
) -> np.ndarray:
    """Return the rows of a benchmark's questions that a query wants."""
    mask = _outcome_mask(section, questions, query, shown)
    if query.kind:
        mask &= questions.kind_array == query.kind
    rows = np.flatnonzero(mask)
    if not query.text:
        return rows
    # Last, as it takes longest: it looks at the texts of what is left.
    return np.array(
        [row for row in rows.tolist() if _holds(questions, row, query.text, shown)], int
    )


def shown_runs(section: Section, query: Query) -> list[int]:
    """Return the numbers of the runs of a method and of a budget, and always of the upper bound."""
    shown = []
    for number, run in enumerate(section.runs):
        is_wanted = query.method in ("", run.label) and query.budget in ("", run.budget)
        if run.is_bound or is_wanted:
            shown.append(number)
    return shown


def _outcome_mask(
    section: Section, questions: Questions, query: Query, shown: list[int]
) -> np.ndarray:
    """Tell of each question whether the run's answer, or one of those shown, has the outcome."""
    mask = np.zeros(len(questions.documents), bool)
    if not query.outcome:
        return ~mask
    runs = shown if query.run in ("", ANY) else [section.run_numbers[query.run]]
    for number in runs:
        if number in questions.answers:
            mask |= _has_outcome(questions.answers[number].flags, query.outcome)
    return mask


def _has_outcome(flags: np.ndarray, outcome: str) -> np.ndarray:
    if outcome == "right":
        return (flags & (SCORED | FAILS)) == SCORED
    bit = {"lost": LOST, "gained": GAINED, "wrong": FAILS}[outcome]
    return (flags & bit) > 0


def _holds(questions: Questions, row: int, text: str, shown: list[int]) -> bool:
    """Tell whether a text stands in a question, its choices, its target or a shown answer."""
    if text.startswith("#"):
        return questions.documents[row] == text[1:].strip()
    wanted = text.lower()
    texts = [
        questions.questions[row] or "",
        questions.targets[row],
        *(questions.choices[row] or ()),
    ]
    texts += [
        questions.answers[number].texts[row]
        for number in shown
        if number in questions.answers
    ]
    return any(wanted in candidate.lower() for candidate in texts)


def fail_counts(questions: Questions, shown: list[int]) -> np.ndarray:
    """Return of each question how many of the shown runs fail it."""
    counts = np.zeros(len(questions.documents), int)
    for number in shown:
        if number in questions.answers:
            counts += (questions.answers[number].flags & FAILS) > 0
    return counts


def row_data(questions: Questions, row: int, shown: list[int]) -> dict[str, Any]:
    """Return a row for a page, as JSON has it."""
    answers = []
    for number in shown:
        if number in questions.answers:
            of_run = questions.answers[number]
            flags = int(of_run.flags[row])
            answers.append(
                {
                    "run": number,
                    "text": of_run.texts[row],
                    "verdict": of_run.verdicts[row],
                    "flags": flags,
                }
            )
    return {
        "task": questions.task,
        "document": questions.documents[row],
        "question": questions.questions[row],
        "choices": questions.choices[row],
        "target": questions.targets[row],
        "kind": questions.kinds[row],
        "answers": answers,
    }


def token_data(questions: Questions, row: int) -> dict[int, dict[str, Any]]:
    """Return by run what became of a question's visual tokens, with the positions kept and merged in its first picture.

    Raises:
        OSError, ValueError: where the file changed since its columns were read.
    """
    tokens = {}
    for number, answers in questions.answers.items():
        (sample,) = answers.file.read([row])
        tokens[number] = sample_tokens(sample, questions.side)
    return tokens


def sample_tokens(
    sample: dict[str, Any], side: int, positions: bool = True
) -> dict[str, Any]:
    """Return what became of a sample's visual tokens.

    Args:
        side: visual tokens in a row of a picture.
        positions: whether to say which are kept and merged: of the first picture's first crop, bits in hexadecimal.
    """
    tokens: dict[str, Any] = {"layers": sample.get("visual_tokens") or []}
    if positions and sample.get("kept"):
        for name in ("kept", "merged"):
            places = sample[name]
            tokens[name] = (
                f"{overlap.bits(place for place in places[0] if place < side * side):x}"
            )
            tokens[f"{name}_count"] = sum(map(len, places))
    return tokens


def section_data(section: Section) -> dict[str, Any]:
    """Return what a page has to know of a section before it shows any question, as JSON has it."""
    runs = [
        {
            "name": run.name,
            "label": run.label,
            "budget": run.budget,
            "bound": run.is_bound,
        }
        for run in section.runs
    ]
    benchmarks = [
        {
            "task": questions.task,
            "column": questions.column,
            "count": len(questions.documents),
            "kinds": sorted({kind for kind in questions.kinds if kind}),
            "side": questions.side,
            "fit": questions.fit,
        }
        for questions in section.benchmarks.values()
    ]
    return {
        "id": section.identity,
        "name": section.name,
        "about": section.about,
        "runs": runs,
        "benchmarks": benchmarks,
    }


class Pool:
    """Values that are kept once, and known by their numbers."""

    def __init__(self) -> None:
        self.numbers: dict[Any, int] = {}

    def column(self, values: Iterator[Any] | list[Any]) -> list[int] | int:
        """Return the numbers of some values; of equal ones a single number."""
        column = [self.numbers.setdefault(value, len(self.numbers)) for value in values]
        return column[0] if column and len(set(column)) == 1 else column


def file_data(section: Section, pictures: dict[tuple[str, str], str]) -> dict[str, Any]:
    """Return a section with all of its questions in columns, as JSON in a file has it.

    Args:
        pictures: task and document -> the id of the element of the page that has the picture. The positions that
            methods keep are only of these.
    """
    data, pool = section_data(section), Pool()
    for entry, questions in zip(
        data["benchmarks"], section.benchmarks.values(), strict=True
    ):
        shown = {
            document: name
            for (task, document), name in pictures.items()
            if task == questions.task
        }
        entry |= {
            "documents": pool.column(questions.documents),
            "questions": pool.column(questions.questions),
            "choices": pool.column(questions.choices),
            "targets": pool.column(questions.targets),
            "kind_of": pool.column(questions.kinds),
            "pictures": {
                questions.row_of[document]: name for document, name in shown.items()
            },
            "answers": {
                number: _answer_data(questions, number, pool, shown)
                for number in questions.answers
            },
        }
    return {**data, "pool": list(pool.numbers)}


def _answer_data(
    questions: Questions, number: int, pool: Pool, shown: dict[str, str]
) -> dict[str, Any]:
    """Return a run's answers in columns, with the visual tokens that enter each layer of the decoder."""
    answers = questions.answers[number]
    layers, tokens = [], {}
    rows = range(len(questions.documents))
    for row, sample in zip(rows, answers.file.read(rows), strict=True):
        pictured = questions.documents[row] in shown
        of_sample = sample_tokens(sample, questions.side, pictured)
        layers.append(tuple(of_sample.pop("layers")))
        if of_sample:
            tokens[row] = of_sample
    return {
        "texts": pool.column(answers.texts),
        "verdicts": pool.column(answers.verdicts),
        "flags": "".join(f"{flag:x}" for flag in answers.flags.tolist()),
        "layers": pool.column(layers),
        "tokens": tokens,
    }


def checked_query(section: Section, given: dict[str, str]) -> Query:
    """Return a query from the texts of a link.

    Raises:
        ValueError: for a value that the section has not.
    """
    query = replace(
        Query(), **{name: given.get(name, "") for name in Query.__dataclass_fields__}
    )
    known = {
        "benchmark": {"", *section.benchmarks},
        "outcome": {"", *OUTCOMES},
        "run": {"", ANY, *section.run_numbers},
        "sort": {*SORTS},
    }
    for name, values in known.items():
        if getattr(query, name) not in values:
            raise ValueError(f"{name}={getattr(query, name)}")
    return query
