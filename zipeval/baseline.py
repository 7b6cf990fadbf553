"""Baselines: what records held, small enough to commit. `zipeval check` compares later records with it. No torch.

A JSON file with a line for each record: what it is of (`of`), what must agree for two to be comparable (`same`), its
score, what was measured, and of every sample, in the order of their doc_id,

    scores    its score
    answers   two characters, 12 bits of a hash of its answer, or of all answers in a conversation
    left      two characters likewise, of the positions of the tokens that were left; null: the method removes none

12 bits miss one change in 4096. They tell in how many samples something changed, and are 10 KB for 1,500 samples.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
import shlex
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from zipeval import records, tables
from zipeval.errors import UsageError

SCHEMA = 1
WIDTH = 2  # characters of base64, of 6 bits each
VISUAL = ("mean", "final", "entering")
PER_SAMPLE = ("scores", "answers", "left")
FIELDS = {"of", "same", "git", "metric", "score", "measured", *PER_SAMPLE}
WAITS = "answers have no verdict. The command that made it asks the judge for those."


def write(results: str, out: Path) -> int:
    """A baseline of every record below a results directory, in place of what `out` held; returns how many.

    Raises:
        UsageError: without records, with one that waits for its judge or has numbers that are not finite, with two of
            the same, or if `out` cannot be written.
    """
    found = records.read_all(results)
    if not found:
        raise UsageError(f"results={results}: no records. `zipeval run` makes them; results=DIR looks elsewhere.")
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
        raise UsageError(f"out={out}: cannot be written ({error.strerror}). Choose another out=FILE.") from error
    return len(found)


def _line(record: dict[str, Any]) -> str:
    """Of a baseline's file."""
    try:
        return json.dumps(entry(record, samples(record)), ensure_ascii=False, allow_nan=False, separators=(",", ":"))
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
        held = json.loads(path.read_text(encoding="utf-8"), parse_constant=_refused)
        if held["schema"] != SCHEMA:
            raise ValueError(f"schema {held['schema']}, this zipeval reads {SCHEMA}")
        if not held["records"]:
            raise ValueError("it has no records")
        for its in held["records"]:
            if its.keys() != FIELDS:
                raise ValueError(f"a record lacks or has too many of {', '.join(sorted(its.keys() ^ FIELDS))}")
            its["same"].setdefault("projector", None)  # of which earlier ones do not tell: they have none
            if len({len(its["scores"]), *(len(its[name]) / WIDTH for name in PER_SAMPLE[1:] if its[name])}) != 1:
                raise ValueError(f"{' or '.join(PER_SAMPLE)} are cut short")
        return held["records"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UsageError(
            f"against={path}: not a readable baseline ({error}). "
            f"`{shlex.join(['zipeval', 'baseline', f'out={path}'])}` writes one of the records in results/runs."
        ) from error


def _refused(constant: str) -> None:
    raise ValueError(f"it holds {constant}")


def samples(record: dict[str, Any]) -> list[dict[str, Any]]:
    """A record's samples, in the order of their doc_id.

    Raises:
        UsageError: if they changed since, or are not there.
    """
    return sorted(records.read_samples(Path(record["path"]).parent, record), key=lambda s: s["doc_id"])


def entry(record: dict[str, Any], its: list[dict[str, Any]]) -> dict[str, Any]:
    """What a baseline holds of a record.

    Args:
        its: its samples.

    Raises:
        UsageError: if it waits for its judge.
    """
    if records.incomplete(record):
        raise UsageError(f"{record['path']}: {WAITS}")
    visual = record["visual_tokens"]
    return {
        "of": of(record),
        "same": _same(record, its),
        "git": record["git"],
        "metric": record["metric"],
        "score": record["score"],
        "measured": {f"visual tokens, {name}": visual[name] for name in VISUAL} | record["prefill"],
        "scores": [_short(sample["score"]) for sample in its],
        "answers": _codes(_answer(sample) for sample in its),
        "left": _codes((s.get("kept"), s.get("merged")) for s in its) if any("kept" in s for s in its) else None,
    }


def of(record: dict[str, Any]) -> dict[str, Any]:
    """What a record is of: a row and a column of a model's table."""
    label, tokens = tables.key(record)
    return {"model": record["config"]["model"]["name"], "method": label, "tokens": tokens, "task": record["task"]}


def _same(record: dict[str, Any], its: list[dict[str, Any]]) -> dict[str, Any]:
    """What two records agree on that answer the same questions, with the same weights, held in the same way."""
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
        **{name: resolved[name] for name in ("dtype", "attn_implementation", "quantization", "device_map")},
        **{name: config["model"][name] for name in ("family", "prompt", "image_aspect")},
        "judge": config.get("judge"),
    }


def _answer(sample: dict[str, Any]) -> str | list[str]:
    """Of a conversation also the later answers with a fresh selection: some of its metrics follow from them."""
    return [sample["prediction"], sample["fresh"]] if "fresh" in sample else sample["prediction"]


def _short(score: float | None) -> float | None:
    """1 instead of 1.0."""
    return int(score) if score is not None and math.isfinite(score) and score == int(score) else score


def _codes(values: Iterable[Any]) -> str:
    """Of every value WIDTH characters of its hash, one after another."""
    hashes = (hashlib.sha256(json.dumps(value).encode()).digest() for value in values)
    return "".join(base64.b64encode(found)[:WIDTH].decode() for found in hashes)
