"""Read the samples of a record, and hold its score against theirs."""

from __future__ import annotations

import json
import re
from math import isfinite
from pathlib import Path
from statistics import fmean
from typing import Any

from zipeval.benchmarks import BENCHMARKS
from zipeval.errors import UsageError
from zipeval.results import records
from zipeval.results.schema import Record

NEWLINE = "\n"
# The positions that a method keeps are most of a file, and nothing that is counted depends on them. Cut out before the
# lines are parsed, they cost a tenth of the time. No text can hold such a name: its quotation marks are escaped. Lists
# of numbers hold no quotation marks, and end where the next name begins.
POSITIONS = re.compile(rb'"(?:kept|merged|visual_tokens|crops)": \[[^"]*\], (?=")')


def read_scored(record: Record, positions: bool = True) -> list[dict[str, Any]]:
    """Return the samples of a record whose score is theirs.

    Args:
        positions: whether with what says which visual tokens were left.

    Raises:
        UsageError: if they changed since the record was written, are not there, or come to another score.
    """
    content = records.read_sample_lines(Path(record["path"]).parent, record)
    samples = parse_samples(content, positions)
    check_score(record, samples)
    return samples


def parse_samples(content: bytes, positions: bool = True) -> list[dict[str, Any]]:
    """Return the samples in the content of a file, as `read_scored` does."""
    lines = content if positions else POSITIONS.sub(b"", content)
    # Within a text a line end is escaped. One long list is read in half the time of its lines.
    return json.loads(f"[{lines.decode().removesuffix(NEWLINE).replace(NEWLINE, ',')}]")


def check_score(record: Record, samples: list[dict[str, Any]]) -> None:
    """Refuse a record whose score, or number of samples, is not what its samples come to.

    Raises:
        UsageError: says both numbers, and what to do.
    """
    disagreement = score_disagreement(record, samples)
    if disagreement:
        raise UsageError(
            f"{disagreement}. Move both away and {records.again(Path(record['path']))}."
        )


def _count_disagreement(record: dict[str, Any], samples: list[dict[str, Any]]) -> str:
    """Return in words how a record counts other samples, or failed ones, than there are; nothing where it does not."""
    counts = {
        "samples": (record["samples"]["count"], len(samples)),
        "failed samples": (
            record.get("failed", 0),
            sum("error" in sample for sample in samples),
        ),
    }
    for what, (written, counted) in counts.items():
        if written != counted:
            return f"{record['path']}: it says {written} {what}, and its samples are {counted}"
    return ""


def score_disagreement(record: Record, samples: list[dict[str, Any]]) -> str:
    """Return in words how a record's score or counts are not what its samples come to; nothing where they are.

    Of some scores it cannot be told.
    """
    if counted := _count_disagreement(record, samples):
        return counted
    if (
        not is_checkable(record)
        or record["score"] is None
        or not isfinite(record["score"])
    ):
        return ""
    from zipeval.reporting import stats

    if stats.agrees(record["task"], samples, record["score"]):
        return ""
    number = stats.value(record["task"], samples)
    file = Path(record["path"]).parent / record["samples"]["file"]
    return f"{record['path']}: its score is {record['score']:.6g}, and the samples in {file} come to {number:.6g}"


def is_checkable(record: Record) -> bool:
    """Return whether a record's score follows from its samples, as it says itself.

    Records of before schema 5 do not say. Of theirs, known benchmarks do, unless samples failed.
    """
    known = record["task"] in BENCHMARKS and not record.get("failed")
    return record.get("from_samples", known)


def follows_from_samples(record: Record, samples: list[dict[str, Any]]) -> bool:
    """Return whether statistics of the samples are statistics of the record's score."""
    if record["score"] is None:  # nothing is judged yet
        return True
    if "from_samples" in record:
        return record["from_samples"]
    from zipeval.reporting import stats

    # A benchmark's was checked when it was read. Only of another task may the samples have another number.
    return record["task"] in BENCHMARKS or stats.agrees(
        record["task"], samples, record["score"]
    )


def kind_of_question(record: Record, sample: dict[str, Any]) -> str:
    """Return the kind of a question: its own, or that of the one score that it has beside its metric.

    A task that scores kinds apart gives a question `accuracy` and, say, `accuracy_color`.
    """
    if "kind" in sample:
        return str(sample["kind"])
    beginning = f"{record['metric']}_"
    scores = sample.get("scores") or {}
    names = [name for name in scores if name.startswith(beginning)]
    return (
        names[0].removeprefix(beginning)
        if len(names) == 1 and record["metric"] in scores
        else ""
    )


def seconds_per_sample(record: Record, samples: list[dict[str, Any]]) -> float | None:
    """Return the mean share of a sample in the seconds of its batch; None where samples have no time of their own."""
    # Where questions share what is computed of a picture a sample has no time of its own, and compiling takes minutes.
    if record.get("reuse", "none") != "none" or record["config"].get("runner", {}).get(
        "compile"
    ):
        return None
    shares = [
        sample["latency"] / sample["batch"] for sample in samples if "latency" in sample
    ]
    return fmean(shares) if shares else None
