"""Ask a judge model about the answers that it has not scored, and write down its verdicts as they come."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from zipeval.benchmarks.protocols import PROTOCOLS, summary
from zipeval.config.schema import JudgeConfig
from zipeval.errors import Stopped
from zipeval.evaluation.task_scores import follows_from_samples
from zipeval.results import records
from zipeval.results.schema import Record
from zipeval.utils.progress import progress
from zipeval.utils.stopping import stoppable

if TYPE_CHECKING:
    from zipeval.benchmarks.judge import Judge

# Answers between two writes of a record, and writes of a task at most: verdicts cost money.
JUDGED_AT_ONCE, MOST_WRITES = 64, 50


def tried_judge(
    config: JudgeConfig, earlier: Mapping[str, Record | None]
) -> Judge | None:
    """Return a judge that answers, where one is needed; asked before the model is loaded.

    Args:
        earlier: the records of before, by task.

    Raises:
        UsageError: for a judge that gives no verdict.
    """
    waiting = []
    for task, record in earlier.items():
        is_finished = record and not records.incomplete(record)
        if task in PROTOCOLS and not is_finished:
            waiting.append(task)
    if not waiting:
        return None
    from zipeval.benchmarks.judge import Judge

    judge = Judge(config)
    # Of each kind one question.
    judge.check({PROTOCOLS[task]: None for task in waiting})
    return judge


def judge_record(judge: Judge, directory: Path, record: Record) -> Record:
    """Return the record with the judge's verdicts on its unscored answers, written now and then.

    Raises:
        Stopped: when the process was asked to stop; every verdict is in the record.
    """
    # Added when it was read, and no part of the file.
    record.pop("path")
    task = record["task"]
    samples = records.read_samples(directory, record)
    # Verdicts of before stay.
    unscored = [sample for sample in samples if "unscored" in sample]
    at_once = max(JUDGED_AT_ONCE, len(samples) // MOST_WRITES)
    label = f"{directory.name} {task}"
    with (
        progress(f"{label} judge", len(unscored)) as advance,
        stoppable() as is_stopping,
    ):
        for start in range(0, len(unscored), at_once):
            try:
                judge.score(PROTOCOLS[task], unscored[start : start + at_once], advance)
            # Also what was judged until an interruption.
            finally:
                record |= summary(task, samples)
                record["from_samples"] = follows_from_samples(
                    task, samples, record["score"]
                )
                record["ended"] = records.now()
                records.write(directory, record, samples)
            if is_stopping():
                raise Stopped(
                    f"{label}: stopped, every verdict is kept. The same command goes on."
                )
    return record
