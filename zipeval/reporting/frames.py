"""Records, samples and tables as pandas DataFrames. Imports no torch."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import pandas as pd

from zipeval.errors import UsageError
from zipeval.reporting import remarks
from zipeval.reporting.scored_samples import kind_of_question, read_scored
from zipeval.reporting.tables import (
    Record,
    Row,
    Table,
    TableCell,
    bound_among,
    heading,
    is_higher_better,
    key,
)

WHOLE = "Int64"  # whole numbers of which some are missing
YES_OR_NO = "boolean"  # True, False or missing
TYPES = {
    **dict.fromkeys(("tokens", "lost", "gained"), WHOLE),
    **dict.fromkeys(
        ("mean", "final", "flops", "score", "percent", "low", "high", "p"), "float64"
    ),
}
STATISTICS = ("low", "high", "lost", "gained", "p")
OF_A_METHOD = ("mean", "final", "flops")


def records_frame(records: Sequence[Record]) -> pd.DataFrame:
    """Return a row for each record: what was run, what came out and what it cost.

    Columns: model, method and its options, tokens (visual tokens that were asked for, missing for all), benchmark (the
    heading of tables), task, metric, score (on the papers' scale), samples, failed, overflowed, mean and final (visual
    tokens that entered the decoder's layers on average, and its last one), flops (of reading a prompt), seconds,
    run_id, and path of the record.
    """
    rows = []
    for record in records:
        rows.append(
            {
                **_run(record),
                "task": record["task"],
                "metric": record["metric"],
                "score": record["score"],
                "samples": record["samples"]["count"],
                "failed": record["failed"],
                "overflowed": record.get("overflowed", 0),
                "mean": record["visual_tokens"]["mean"],
                "final": record["visual_tokens"]["final"],
                "flops": record["prefill"]["flops_exact"],
                "seconds": record["seconds"],
                "run_id": record["run_id"],
                "path": record["path"],
            }
        )
    columns = [
        *RUN,
        "task",
        "metric",
        "score",
        "samples",
        "failed",
        "overflowed",
        *OF_A_METHOD,
        "seconds",
        "run_id",
        "path",
    ]
    return pd.DataFrame(rows, columns=columns).astype(
        {"tokens": WHOLE, "score": "float64"}
    )


RUN = ("model", "method", "tokens", "benchmark")


def _run(record: Record) -> dict[str, Any]:
    """Return what a record is about, as its rows begin."""
    method, tokens = key(record)
    name = record["config"]["model"]["name"]
    return dict(zip(RUN, (name, method, tokens, heading(record)), strict=True))


def samples_frame(
    records: Sequence[Record], candidates: Sequence[Record]
) -> pd.DataFrame:
    """Return a row for each question of each record.

    Columns: model, method and its options, tokens (visual tokens that were asked for), benchmark, doc_id (number of the
    question in its data set), question, choices, target, prediction, score, bound_score (of the upper bound's answer),
    lost and gained (whether the upper bound's answer is worth more or less; missing where there is no upper bound),
    kind (of question), visual_tokens (that entered the decoder's layers on average), prompt_tokens, latency (seconds of
    the sample's whole batch), error (why it was not read), task and run_id.

    Args:
        candidates: records among which the upper bounds are.

    Raises:
        UsageError: if samples changed since their record was written, or an upper bound was asked other questions.
    """
    samples_by_path: dict[str, list[dict[str, Any]]] = {}

    def samples_of(record: Record) -> list[dict[str, Any]]:
        if record["path"] not in samples_by_path:
            samples_by_path[record["path"]] = [
                _brief(record, sample) for sample in read_scored(record)
            ]
        return samples_by_path[record["path"]]

    rows = []
    for record in records:
        bound = bound_among(record, candidates)
        samples = samples_of(record)
        of_bound = (
            {}
            if bound is None
            else {sample["doc_id"]: sample for sample in samples_of(bound)}
        )
        if bound is not None:
            _check_same_questions(record, samples, bound, of_bound)
        for sample in samples:
            beside = of_bound.get(sample["doc_id"])
            rows.append(
                _run(record)
                | sample
                | _against_bound(sample, beside, is_higher_better(record))
            )
    types = {
        "tokens": WHOLE,
        "score": "float64",
        "bound_score": "float64",
        "lost": YES_OR_NO,
        "gained": YES_OR_NO,
        "prompt_tokens": WHOLE,
    }
    return pd.DataFrame(rows, columns=SAMPLE_COLUMNS).astype(types)


SAMPLE_COLUMNS = (
    *RUN,
    *(
        "doc_id",
        "question",
        "choices",
        "target",
        "prediction",
        "score",
        "bound_score",
        "lost",
        "gained",
    ),
    *("kind", "visual_tokens", "prompt_tokens", "latency", "error", "task", "run_id"),
)


def _brief(record: Record, sample: dict[str, Any]) -> dict[str, Any]:
    """Return what a row shows of a sample, without the positions of its tokens; and the hash of what was asked."""
    entering = sample.get("visual_tokens")
    return {
        "doc_id": sample["doc_id"],
        "kind": kind_of_question(record, sample) or None,
        "question": sample.get("question"),
        "choices": sample.get("choices"),
        "target": sample["target"],
        "prediction": sample["prediction"],
        "score": sample["score"],
        "visual_tokens": math.fsum(entering) / len(entering) if entering else math.nan,
        "prompt_tokens": sample.get("prompt_tokens"),
        "latency": sample.get("latency", math.nan),
        "error": sample.get("error"),
        "task": record["task"],
        "run_id": record["run_id"],
        "question_hash": sample["question_hash"],
    }


def _check_same_questions(
    record: Record,
    samples: list[dict[str, Any]],
    bound: Record,
    of_bound: dict[int, dict[str, Any]],
) -> None:
    """Raise UsageError where a run and its upper bound were asked other questions."""
    hashes = {sample["doc_id"]: sample["question_hash"] for sample in samples}
    if hashes != {
        doc_id: sample["question_hash"] for doc_id, sample in of_bound.items()
    }:
        raise UsageError(
            f"{record['path']} and {bound['path']} are about other questions. Move one of them away and run it again."
        )


def _against_bound(
    sample: dict[str, Any], beside: dict[str, Any] | None, higher_is_better: bool
) -> dict[str, Any]:
    """Return the upper bound's score, and whether it is better or worse than a sample's."""
    if beside is None:
        return {"bound_score": None, "lost": None, "gained": None}
    score, bound_score = sample["score"], beside["score"]
    if score is None or bound_score is None:
        return {"bound_score": bound_score, "lost": False, "gained": False}
    more, less = score > bound_score, score < bound_score
    lost, gained = (less, more) if higher_is_better else (more, less)
    return {"bound_score": bound_score, "lost": lost, "gained": gained}


def cells_frame(tables: Iterable[Table]) -> pd.DataFrame:
    """Return a row for every number of some tables, which is what CSV and JSON hold.

    Columns: table, kind (measured, published, difference), method, tokens, mean, final, flops, benchmark (or average),
    higher_is_better, score, percent (of the upper bound), low, high, lost, gained, p (of the comparison with the upper
    bound), tied, run_id, status (what has to be said of the number).
    """
    rows = []
    for table in tables:
        for row in table.rows:
            rows += _cells(table, row)
    return pd.DataFrame(rows).astype(TYPES)


def _cells(table: Table, row: Row) -> Iterator[dict[str, Any]]:
    """Yield the numbers of a row. An average is one too; what is missing or not a number is None."""
    head = {
        "table": table.about,
        "kind": row.kind,
        "method": row.label,
        "tokens": row.tokens,
    }
    head |= {name: _finite(getattr(row, name)) for name in OF_A_METHOD}
    cells = dict(row.cells)
    if row.average is not None:
        cells["average"] = TableCell(
            None, row.average, comparison=row.average_comparison, remarks=row.remarks
        )
    for name, cell in cells.items():
        yield {
            **head,
            "benchmark": name,
            "higher_is_better": cell.higher_is_better,
            "score": _finite(cell.score),
            "percent": _finite(cell.percent),
            **{
                part: _finite(getattr(cell.comparison, part, None))
                for part in STATISTICS
            },
            "tied": cell.tied,
            "run_id": cell.record["run_id"] if cell.record else None,
            "status": remarks.status(cell.remarks),
        }


def _finite(value: float | None) -> float | None:
    """Return a number, or None for one that is infinite or none."""
    return value if value is not None and math.isfinite(value) else None
