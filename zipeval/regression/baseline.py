"""Baselines: what records held, small enough to commit. `zipeval check` compares later records with it. No torch.

A JSON file with a line for each record (entries.py). Baselines of schema 1 lack `counts` and `digests`, and whether
more is better.
"""

from __future__ import annotations

import json
import math
import shlex
from numbers import Real
from pathlib import Path
from typing import Any

from zipeval.benchmarks import BENCHMARKS
from zipeval.errors import UsageError
from zipeval.regression.entries import (
    CODED,
    VISUAL,
    WIDTH,
    digests,
    entry,
    identity_of,
    name,
    sorted_samples,
)
from zipeval.reporting import scored_samples, stats
from zipeval.results import records
from zipeval.results.identity import judge_identity

SCHEMA = 2
READABLE = (1, SCHEMA)
# Fields of a record's `prefill`.
COSTS = ("prompt_tokens", "kv_entries", "flops_formula", "flops_exact")
MEASURED = {*(f"visual tokens, {name}" for name in VISUAL), *COSTS}
# Fields that schema 1 has not.
LATER = ("higher_is_better", "from_samples", "counts", "digests")
FIELDS = {"of", "same", "git", "metric", "score", "measured", "scores", *CODED, *LATER}


def write(results: str, out: Path) -> int:
    """Write a baseline of every record below a results directory, and return how many there are.

    What `out` held is replaced.

    Raises:
        UsageError: without records, with one that waits for its judge or has numbers that are not finite, with two of
            the same, or if `out` cannot be written.
    """
    current = records.read_all(results)
    if not current:
        raise UsageError(
            f"results={results}: no records. `zipeval run` makes them; results=DIR looks elsewhere."
        )
    lines = [_line(record) for record in current]
    _refuse_equal(current)
    content = f'{{"schema":{SCHEMA},"records":[\n' + ",\n".join(lines) + "\n]}\n"
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        records.atomic_write(out, content)
    except OSError as error:
        raise UsageError(
            f"out={out}: cannot be written ({error.strerror}). Choose another out=FILE."
        ) from error
    return len(current)


def _refuse_equal(current: list[dict[str, Any]]) -> None:
    """Raise UsageError where two records are of the same row and column of a table."""
    paths: dict[tuple, str] = {}
    for record in current:
        identity = identity_of(record)
        earlier = paths.setdefault(tuple(identity.values()), record["path"])
        if earlier != record["path"]:
            words = " ".join(map(str, identity.values()))
            raise UsageError(
                f"{earlier}, {record['path']}: both are of {words}. "
                "Move one of them away, or give another results=DIR."
            )


def _line(record: dict[str, Any]) -> str:
    """Return the line of a record in a baseline's file."""
    samples = sorted_samples(record)
    disagreement = scored_samples.score_disagreement(record, samples)
    if disagreement:
        again = records.again(Path(record["path"]))
        raise UsageError(f"{disagreement}. Move both away and {again}.")
    try:
        return json.dumps(
            entry(record, samples),
            ensure_ascii=False,
            allow_nan=False,
            separators=(",", ":"),
        )
    except ValueError as error:
        raise UsageError(
            f"{record['path']}: it holds a number that is not finite, which nothing can be compared with. "
            "Move it away and run it again."
        ) from error


def read(path: Path) -> list[dict[str, Any]]:
    """Return the entries of a baseline.

    Raises:
        UsageError: if the file is none.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"), parse_constant=_refuse)
        schema = content["schema"]
        if schema not in READABLE:
            raise ValueError(f"schema {schema}, this zipeval reads {SCHEMA}")
        if not content["records"]:
            raise ValueError("it has no records")
        for line in content["records"]:
            if schema == 1:
                for field in LATER:
                    line.setdefault(field, None)
            _check(line)
        return content["records"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        command = shlex.join(["zipeval", "baseline", f"out={path}"])
        raise UsageError(
            f"against={path}: not a readable baseline ({error}). "
            f"`{command}` writes one of the records in results/runs."
        ) from error


def _refuse(constant: str) -> None:
    """Raise ValueError for Infinity and NaN, which Python's JSON would accept."""
    raise ValueError(f"it holds {constant}")


def _complete(same: dict[str, Any]) -> None:
    """Bring the field `same` of a line that an earlier version wrote into today's form."""
    # Earlier versions recorded the port of the judge's server as part of its identity.
    same["judge"] = judge_identity(same.get("judge"))
    # Earlier versions had no tuned projectors.
    same.setdefault("projector", None)


def _check(line: dict[str, Any]) -> None:
    """Raise ValueError where a line of a baseline is not whole, or contradicts itself.

    A line of an earlier version gets today's form.
    """
    different = ", ".join(sorted(line.keys() ^ FIELDS))
    if different:
        raise ValueError(f"a record lacks or has too many of {different}")
    _complete(line["same"])
    label = name(line["of"])
    different = ", ".join(sorted(line["measured"].keys() ^ MEASURED))
    if different:
        raise ValueError(f"`measured` of {label} lacks or has too many of {different}")
    for key, measured in line["measured"].items():
        if not _are_finite(measured):
            raise ValueError(f"`measured` of {label}: {key} is {measured}")
    if not line["scores"] or len(_lengths(line)) != 1:
        fields = " or ".join(("scores", *CODED, "digests"))
        raise ValueError(f"{fields} of {label} are cut short")
    # Other tasks' scores need what their samples have beside their scores: the gate
    # checks those.
    if line["of"]["task"] not in stats.STATISTICS:
        samples = [{"score": score} for score in line["scores"]]
        disagreement = score_disagreement(line, samples)
        if disagreement:
            raise ValueError(disagreement)


def _are_finite(measured: Any) -> bool:
    """Return whether a measured value is a finite number, or a list of at least one."""
    numbers = measured if isinstance(measured, list) else [measured]
    if not numbers:
        return False
    return all(isinstance(n, Real) and math.isfinite(n) for n in numbers)


def _lengths(line: dict[str, Any]) -> set[float]:
    """Return the numbers of samples that the fields of a line have; a whole line has one."""
    lengths = {len(line["scores"])}
    for key in CODED:
        if line[key] is not None:
            lengths.add(len(line[key]) / WIDTH)
    if line["digests"] is not None:
        lengths.add(len(digests(line)))
    return lengths


def score_disagreement(line: dict[str, Any], samples: list[dict[str, Any]]) -> str:
    """Return in words how a line's score is not what its own scores come to; nothing where it is, or cannot be told.

    Args:
        line: of a baseline.
        samples: samples with the line's scores, and what else their task's number is made of.
    """
    task, score = line["of"]["task"], line["score"]
    from_samples = line["from_samples"]
    # Baselines of schema 1 do not say; the scores of the benchmarks that zipeval knows
    # follow from their samples.
    if from_samples is None:
        from_samples = task in BENCHMARKS
    if not from_samples or score is None or stats.agrees(task, samples, score):
        return ""
    value = stats.value(task, samples)
    return f"`score` of {name(line['of'])} is {score:.6g}, and its `scores` come to {value:.6g}"
