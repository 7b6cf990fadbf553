"""Baselines: what records held, small enough to commit. `zipeval check` compares later records with it. No torch.

A JSON file with a line for each record: what it is of (`of`), what must agree for two to be comparable (`same`), its
score, what was measured, and of every sample, in the order of their doc_id,

    scores    its score
    answers   two characters, 12 bits of a hash of its answer, or of all answers in a conversation
    left      two characters likewise, of the positions of tokens that were left as themselves and of merged ones; null:
              the method removes none
    counts    two characters likewise, of the visual tokens that entered each layer
    digests   two little-endian float32 numbers in base64, the largest logit of its first token and the log-sum-exp;
              nan where nothing was generated

12 bits miss one change in 4096. They tell in how many samples something changed, and with the digests are 30 KB for
1,500 samples. Baselines of schema 1 lack the last two, and whether more is better.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
import shlex
from collections.abc import Iterable
from numbers import Real
from pathlib import Path
from typing import Any

import numpy as np

from zipeval.benchmarks import BENCHMARKS
from zipeval.errors import UsageError
from zipeval.reporting import scored_samples, stats, tables
from zipeval.results import records
from zipeval.results.identity import judge_identity

SCHEMA = 2
READABLE = (1, SCHEMA)
WIDTH = 2  # characters of base64, of 6 bits each
VISUAL = ("mean", "final", "entering")
COSTS = (
    "prompt_tokens",
    "kv_entries",
    "flops_formula",
    "flops_exact",
)  # of a record's `prefill`
MEASURED = {*(f"visual tokens, {name}" for name in VISUAL), *COSTS}
CODED = ("answers", "left", "counts")
LATER = (
    "higher_is_better",
    "from_samples",
    "counts",
    "digests",
)  # fields that schema 1 has not
FIELDS = {"of", "same", "git", "metric", "score", "measured", "scores", *CODED, *LATER}
DIGEST = ("logit", "logsumexp")
WAITS = "answers have no verdict. The command that made it asks the judge for those."


def write(results: str, out: Path) -> int:
    """A baseline of every record below a results directory, in place of what `out` held; returns how many.

    Raises:
        UsageError: without records, with one that waits for its judge or has numbers that are not finite, with two of
            the same, or if `out` cannot be written.
    """
    found = records.read_all(results)
    if not found:
        raise UsageError(
            f"results={results}: no records. `zipeval run` makes them; results=DIR looks elsewhere."
        )
    lines = [_line(record) for record in found]
    for i, record in enumerate(found):
        for other in found[:i]:
            if of(record) == of(other):
                raise UsageError(
                    f"{other['path']}, {record['path']}: both are of {' '.join(map(str, of(record).values()))}. "
                    "Move one of them away, or give another results=DIR."
                )
    content = f'{{"schema":{SCHEMA},"records":[\n' + ",\n".join(lines) + "\n]}\n"
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        records.atomic_write(out, content)
    except OSError as error:
        raise UsageError(
            f"out={out}: cannot be written ({error.strerror}). Choose another out=FILE."
        ) from error
    return len(found)


def _line(record: dict[str, Any]) -> str:
    """Return the line of a baseline's file that is of a record."""
    in_order = samples(record)
    disagreement = scored_samples.score_disagreement(record, in_order)
    if disagreement:
        raise UsageError(
            f"{disagreement}. Move both away and {records.again(Path(record['path']))}."
        )
    try:
        return json.dumps(
            entry(record, in_order),
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
    """The entries of a baseline.

    Raises:
        UsageError: if it is none.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"), parse_constant=_refused)
        if content["schema"] not in READABLE:
            raise ValueError(f"schema {content['schema']}, this zipeval reads {SCHEMA}")
        if not content["records"]:
            raise ValueError("it has no records")
        for line in content["records"]:
            if content["schema"] == 1:
                line |= {name: None for name in LATER if name not in line}
            _check(line)
        return content["records"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UsageError(
            f"against={path}: not a readable baseline ({error}). "
            f"`{shlex.join(['zipeval', 'baseline', f'out={path}'])}` writes one of the records in results/runs."
        ) from error


def _check(line: dict[str, Any]) -> None:
    """Raise ValueError where a line of a baseline is not whole, or contradicts itself."""
    if line.keys() != FIELDS:
        raise ValueError(
            f"a record lacks or has too many of {', '.join(sorted(line.keys() ^ FIELDS))}"
        )
    name = " ".join(str(part) for part in line["of"].values() if part is not None)
    different = line["measured"].keys() ^ MEASURED
    if different:
        raise ValueError(
            f"`measured` of {name} lacks or has too many of {', '.join(sorted(different))}"
        )
    for key, measured in line["measured"].items():
        numbers = measured if isinstance(measured, list) else [measured]
        if not numbers or not all(
            isinstance(number, Real) and math.isfinite(number) for number in numbers
        ):
            raise ValueError(f"`measured` of {name}: {key} is {measured}")
    line["same"]["judge"] = judge_identity(
        line["same"].get("judge")
    )  # earlier ones have the port of its server
    line["same"].setdefault(
        "projector", None
    )  # of which earlier ones do not tell: they have none
    lengths = {
        len(line["scores"]),
        *(len(line[key]) / WIDTH for key in CODED if line[key] is not None),
    }
    if line["digests"] is not None:
        lengths.add(len(digests(line)))
    if len(lengths) != 1 or not line["scores"]:
        raise ValueError(
            f"{' or '.join(('scores', *CODED, 'digests'))} of {name} are cut short"
        )
    # Other tasks' scores need what their samples have beside their scores: the gate checks those.
    if line["of"]["task"] not in stats.STATISTICS:
        disagreement = score_disagreement(
            line, [{"score": score} for score in line["scores"]]
        )
        if disagreement:
            raise ValueError(disagreement)


def score_disagreement(line: dict[str, Any], samples: list[dict[str, Any]]) -> str:
    """Return in words how a line's score is not what its own scores come to; nothing where it is, or cannot be told.

    Args:
        samples: with the line's scores, and what else their task's number is made of.
    """
    task, score = line["of"]["task"], line["score"]
    follows = (
        task in BENCHMARKS if line["from_samples"] is None else line["from_samples"]
    )
    if not follows or score is None or stats.agrees(task, samples, score):
        return ""
    name = " ".join(str(part) for part in line["of"].values() if part is not None)
    return f"`score` of {name} is {score:.6g}, and its `scores` come to {stats.value(task, samples):.6g}"


def digests(line: dict[str, Any]) -> np.ndarray:
    """Return the digests of a line, (samples, 2)."""
    return np.frombuffer(base64.b64decode(line["digests"]), "<f4").reshape(
        -1, len(DIGEST)
    )


def _refused(constant: str) -> None:
    raise ValueError(f"it holds {constant}")


def samples(record: dict[str, Any]) -> list[dict[str, Any]]:
    """Return a record's samples, in the order of their doc_id.

    Raises:
        UsageError: if they changed since, or are not there.
    """
    return sorted(
        records.read_samples(Path(record["path"]).parent, record),
        key=lambda s: s["doc_id"],
    )


def _digests(its: list[dict[str, Any]]) -> str:
    """Return the digests of samples as a baseline holds them."""
    numbers = [
        [sample.get("digest", {}).get(name, math.nan) for name in DIGEST]
        for sample in its
    ]
    return base64.b64encode(np.array(numbers, "<f4").tobytes()).decode()


def entry(record: dict[str, Any], its: list[dict[str, Any]]) -> dict[str, Any]:
    """Return what a baseline holds of a record.

    Args:
        its: its samples.

    Raises:
        UsageError: if it waits for its judge.
    """
    if records.incomplete(record):
        raise UsageError(f"{record['path']}: {WAITS}")
    visual = record["visual_tokens"]
    reduces, counted = (
        any("kept" in sample for sample in its),
        any("visual_tokens" in sample for sample in its),
    )
    return {
        "of": of(record),
        "same": _same(record, its),
        "git": record["git"],
        "metric": record["metric"],
        "higher_is_better": record.get("higher_is_better", True),
        "from_samples": record.get("from_samples"),
        "score": record["score"],
        "measured": {f"visual tokens, {name}": visual[name] for name in VISUAL}
        | record["prefill"],
        "scores": [_short(sample["score"]) for sample in its],
        "answers": _codes(_answer(sample) for sample in its),
        "left": _codes((sample.get("kept"), sample.get("merged")) for sample in its)
        if reduces
        else None,
        "counts": _codes(sample.get("visual_tokens") for sample in its)
        if counted
        else None,
        "digests": _digests(its)
        if any(sample.get("digest") for sample in its)
        else None,
    }


def of(record: dict[str, Any]) -> dict[str, Any]:
    """Return what a record is of: a row and a column of a model's table."""
    label, tokens = tables.key(record)
    return {
        "model": record["config"]["model"]["name"],
        "method": label,
        "tokens": tokens,
        "task": record["task"],
    }


def _same(record: dict[str, Any], its: list[dict[str, Any]]) -> dict[str, Any]:
    """Return what two records agree on that answer the same questions, with the same weights, held in one way."""
    config, resolved = record["config"], record["resolved"]
    asked = json.dumps([(sample["doc_id"], sample["question_hash"]) for sample in its])
    return {
        "fingerprint": resolved["fingerprint"],
        "projector": resolved.get("projector"),
        "task_hash": record["task_hash"],
        "data_hash": record["data_hash"],
        "limit": config["limit"],
        "questions": hashlib.sha256(asked.encode()).hexdigest()[:16],
        "device": resolved["device"].partition(":")[0],
        **{
            name: resolved[name]
            for name in ("dtype", "attn_implementation", "quantization", "device_map")
        },
        **{
            name: config["model"][name] for name in ("family", "prompt", "image_aspect")
        },
        "judge": judge_identity(config.get("judge")),
    }


def _answer(sample: dict[str, Any]) -> str | list[str]:
    """Return an answer; of a conversation also the later ones with a fresh selection, which some metrics are of."""
    return (
        [sample["prediction"], sample["fresh"]]
        if "fresh" in sample
        else sample["prediction"]
    )


def _short(score: float | None) -> float | None:
    """1 instead of 1.0."""
    return (
        int(score)
        if score is not None and math.isfinite(score) and score == int(score)
        else score
    )


def _codes(values: Iterable[Any]) -> str:
    """Return WIDTH characters of every value's hash, one after another."""
    hashes = (hashlib.sha256(json.dumps(value).encode()).digest() for value in values)
    return "".join(base64.b64encode(found)[:WIDTH].decode() for found in hashes)
