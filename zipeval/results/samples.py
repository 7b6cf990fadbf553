"""How many samples a task has and how long one takes, counted and measured without answering any. No torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from zipeval import benchmarks
from zipeval.benchmarks import data, videoqa
from zipeval.config.schema import RunConfig
from zipeval.results import records

Record = dict[str, Any]


def count(task: str, config: RunConfig) -> int | None:
    """Those that a run answers: of a local copy or of data beside the task as they are, of the hub's as its cards say.

    Returns:
        None where that shows only when the task is run.
    """
    known = (_all(task, config), config.limit)
    return min((number for number in known if number is not None), default=None)


def _all(task: str, config: RunConfig) -> int | None:
    if task in videoqa.SETS:
        there = (
            config.data.videos is not None
            and Path(config.data.videos).expanduser().is_dir()
        )
        return len(videoqa.questions(task, config.data.videos)) if there else None
    known = benchmarks.BENCHMARKS.get(task)
    if known and known.turns:
        return known.samples  # conversations, of a data set's rows of questions
    if known and known.sources:
        return data.rows(known.sources[0], config.data.root) or known.samples
    files = [*benchmarks.task_folder(task).glob("*.parquet")]
    if not files:
        return None
    from pyarrow import parquet

    return sum(parquet.read_metadata(file).num_rows for file in files)


@dataclass(frozen=True)
class Pace:
    """What a sample took.

    Attributes:
        seconds: of a device's time; of several processes the sum.
        device: its name.
    """

    seconds: float
    device: str


def pace(found: list[Record], *likenesses: dict[str, Any]) -> Pace | None:
    """As records measured it; None without one that is alike.

    Args:
        found: records.
        likenesses: what they have to agree on, by the names in `traits`; the first counts that some record meets.
    """
    for wanted in likenesses:
        alike = [record for record in found if wanted.items() <= traits(record).items()]
        if alike:
            device = max(alike, key=lambda record: record["ended"])["machine"][
                "device"
            ]  # times of two do not mix
            alike = [
                record for record in alike if record["machine"]["device"] == device
            ]
            seconds, counts = (
                sum(map(_seconds, alike)),
                [record["samples"]["count"] for record in alike],
            )
            return Pace(seconds / sum(counts), device)
    return None


def _seconds(record: Record) -> float:
    """Of a few samples, loading the model would be most of the record's own."""
    if record["config"]["limit"] is None:
        return sum(
            its["seconds"] * its["processes"]
            for its in record.get("sessions", [record])
        )
    samples = records.read_samples(Path(record["path"]).parent, record)
    shares = [
        sample["latency"] / sample["batch"] for sample in samples if "latency" in sample
    ]
    return median(shares or [0.0]) * len(samples)  # the first batch takes longer


def traits(record: Record) -> dict[str, Any]:
    """What the time of a sample depends on most."""
    config = record["config"]
    return {
        "task": record["task"],
        **of_run(
            config["model"]["name"],
            config["method"],
            config["tokens"],
            config["budget"],
        ),
    }


def of_run(
    model: str, method: dict[str, Any], tokens: int | None, budget: str
) -> dict[str, Any]:
    """Those of all tasks of a run."""
    return {
        "model": model,
        "method": method["name"],
        "tokens": tokens,
        "budget": budget,
    }
