"""Read what a browser of samples shows of them, fast and small: a column for each field. Imports no torch."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from zipeval.reporting.scored_samples import (
    check_score,
    kind_of_question,
    parse_samples,
)
from zipeval.results import records
from zipeval.results.schema import Record

NEWLINE = ord("\n")


@dataclass(frozen=True)
class SampleFile:
    """A file with the samples of a record, of which single ones can be read.

    Attributes:
        path: of the file.
        starts: where each line starts, and where the last one ends.
    """

    path: Path
    starts: np.ndarray

    def read(self, rows: Iterable[int]) -> Iterator[dict[str, Any]]:
        """Yield the samples in some lines, whole."""
        with self.path.open("rb") as file:
            for row in rows:
                start, end = self.starts[row : row + 2].tolist()
                file.seek(start)
                yield json.loads(file.read(end - start))


@dataclass(frozen=True)
class SampleColumns:
    """The samples of a record, field by field.

    Attributes:
        documents: their ids, as text.
        hashes: of what was asked, and of the target.
        questions: what was asked; None in records of before schema 6.
        choices: of those that have some, else None.
        targets: the right answers.
        kinds: of questions, empty where they have none.
        predictions: the answers.
        scores: nan where there is none.
        failures: row -> whether it was not read or has no verdict, of samples where that is so.
        file: where all else is.
    """

    documents: list[str]
    hashes: list[str]
    questions: list[str | None]
    choices: list[tuple[str, ...] | None]
    targets: list[str]
    kinds: list[str]
    predictions: list[str] = field(default_factory=list)
    scores: np.ndarray = field(default_factory=lambda: np.zeros(0))
    failures: dict[int, str] = field(default_factory=dict)
    file: SampleFile | None = None


def read_columns(record: Record, bound: SampleColumns | None = None) -> SampleColumns:
    """Read the samples of a record whose score is theirs.

    Args:
        bound: the samples of the upper bound. What was asked is shared with them where it is the same.

    Raises:
        UsageError: if they changed since the record was written, are not there, or come to another score.
    """
    path = Path(record["path"])
    content = records.read_sample_lines(path.parent, record)
    samples = parse_samples(content, positions=False)
    check_score(record, samples)
    documents, hashes, predictions, scores, failures = [], [], [], [], {}
    for row, sample in enumerate(samples):
        documents.append(str(sample["doc_id"]))
        hashes.append(sample["question_hash"])
        predictions.append(_once(_text(sample["prediction"])))
        scores.append(np.nan if sample["score"] is None else sample["score"])
        failure = _failure(sample)
        if failure:
            failures[row] = failure
    if (
        bound
        and (bound.documents, bound.hashes) == (documents, hashes)
        and any(bound.questions)
    ):
        questions = bound
    else:
        questions = _read_questions(record, samples, documents, hashes)
    # The positions that were cut out are found again by their lines.
    ends = np.flatnonzero(np.frombuffer(content, np.uint8) == NEWLINE) + 1
    file = SampleFile(
        path.parent / record["samples"]["file"], np.concatenate([[0], ends])
    )
    return replace(
        questions,
        predictions=predictions,
        scores=np.array(scores, float),
        failures=failures,
        file=file,
    )


def _read_questions(
    record: Record,
    samples: list[dict[str, Any]],
    documents: list[str],
    hashes: list[str],
) -> SampleColumns:
    """Return what was asked, without answers."""
    questions, choices, targets, kinds = [], [], [], []
    for sample in samples:
        questions.append(_once(sample.get("question")))
        choices.append(_choices(sample))
        targets.append(_once(_text(sample["target"])))
        kinds.append(_once(kind_of_question(record, sample)))
    return SampleColumns(documents, hashes, questions, choices, targets, kinds)


def _once(text: str | None) -> str | None:
    """Return a text that is in memory once, however many samples have it: most answers of a benchmark are alike."""
    return text and sys.intern(text)


def _text(value: Any) -> str:
    """Return a target or an answer as text; a list of several is separated by semicolons."""
    if isinstance(value, list):
        return "; ".join(map(str, value))
    return "" if value is None else str(value)


def _choices(sample: dict[str, Any]) -> tuple[str, ...] | None:
    choices = sample.get("choices")
    return tuple(map(str, choices)) if choices else None


def _failure(sample: dict[str, Any]) -> str:
    """Return why an answer has no score of its own; nothing where it has one."""
    if "error" in sample:
        return "not read"
    return "no verdict" if sample["score"] is None else ""
