"""Count the samples of a task, and measure how long one takes, without answering any. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from zipeval import benchmarks
from zipeval.benchmarks import data, videoqa
from zipeval.config.schema import RunConfig
from zipeval.results import records
from zipeval.results.schema import Record


def count(task: str, config: RunConfig) -> int | None:
    """Return the number of samples that a run answers.

    Local copies and data beside the task are counted as they are; for the hub's data sets their cards count.

    Returns:
        None where the number shows only when the task is run.
    """
    numbers = [_count_all(task, config), config.limit]
    known = [number for number in numbers if number is not None]
    return min(known, default=None)


def _count_all(task: str, config: RunConfig) -> int | None:
    """Return the number of all samples of a task."""
    if task in videoqa.SETS:
        videos = config.data.videos
        if videos is None or not Path(videos).expanduser().is_dir():
            return None
        return len(videoqa.questions(task, videos))
    benchmark = benchmarks.BENCHMARKS.get(task)
    if benchmark:
        # A sample of conversations is no row of the data set, which holds questions.
        if benchmark.turns:
            return benchmark.samples
        if benchmark.sources:
            rows = data.rows(benchmark.sources[0], config.data.root)
            return rows or benchmark.samples
    files = [*benchmarks.task_folder(task).glob("*.parquet")]
    if not files:
        return None
    from pyarrow import parquet

    return sum(parquet.read_metadata(file).num_rows for file in files)


@dataclass(frozen=True)
class Pace:
    """Hold how long a sample takes.

    Attributes:
        seconds: of a device's time; of several processes the sum.
        device: its name.
    """

    seconds: float
    device: str


def pace(measured: list[Record], *likenesses: dict[str, Any]) -> Pace | None:
    """Return how long a sample takes, as records measured it; None without one that is alike.

    Args:
        measured: records.
        likenesses: what they have to agree on, by the names in `traits`; the first counts that some record meets.
    """
    for likeness in likenesses:
        alike = [r for r in measured if likeness.items() <= traits(r).items()]
        if not alike:
            continue
        # Times of two devices do not mix: the device of the latest record counts.
        latest = max(alike, key=lambda record: record["ended"])
        device = latest["machine"]["device"]
        seconds, samples = 0.0, 0
        for record in alike:
            if record["machine"]["device"] == device:
                seconds += _seconds(record)
                samples += record["samples"]["count"]
        return Pace(seconds / samples, device)
    return None


def _seconds(record: Record) -> float:
    """Return the seconds that the samples of a record took."""
    if record["config"]["limit"] is None:
        sessions = record.get("sessions", [record])
        return sum(session["seconds"] * session["processes"] for session in sessions)
    # Of a few samples, loading the model would be most of the record's own seconds; and
    # the first batch takes longer, so that the median counts.
    samples = records.read_samples(Path(record["path"]).parent, record)
    shares = []
    for sample in samples:
        if "latency" in sample:
            shares.append(sample["latency"] / sample["batch"])
    return median(shares or [0.0]) * len(samples)


def traits(record: Record) -> dict[str, Any]:
    """Return what the time of a sample depends on most."""
    config = record["config"]
    model = config["model"]["name"]
    run = of_run(model, config["method"], config["tokens"], config["budget"])
    return {"task": record["task"], **run}


def of_run(
    model: str, method: dict[str, Any], tokens: int | None, budget: str
) -> dict[str, Any]:
    """Return the traits that all tasks of a run have in common."""
    return {
        "model": model,
        "method": method["name"],
        "tokens": tokens,
        "budget": budget,
    }
