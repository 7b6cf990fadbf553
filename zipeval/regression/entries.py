"""An entry of a baseline: a record, small enough to commit.

    of        what it is of: a row and a column of a model's table
    same      what must agree for two records to be comparable
    scores    the score of each sample, in the order of their doc_id
    answers   two characters for each sample, 12 bits of a hash of its answer, or of all answers in a conversation
    left      two characters likewise, of the positions of tokens that were left as themselves and of merged ones; null:
              the method removes none
    counts    two characters likewise, of the visual tokens that entered each layer
    digests   two little-endian float32 numbers in base64, the largest logit of its first token and the log-sum-exp;
              nan where nothing was generated

12 bits miss one change in 4096. They tell in how many samples something changed, and with the digests are 30 KB for
1,500 samples.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from zipeval.errors import UsageError
from zipeval.reporting import tables
from zipeval.results import records
from zipeval.results.identity import judge_identity

# Characters of base64 for each sample, of 6 bits each.
WIDTH = 2
VISUAL = ("mean", "final", "entering")
CODED = ("answers", "left", "counts")
DIGEST = ("logit", "logsumexp")
WAITS = "answers have no verdict. The command that made it asks the judge for those."


def entry(record: dict[str, Any], samples: list[dict[str, Any]]) -> dict[str, Any]:
    """Return what a baseline holds of a record.

    Args:
        record: the record.
        samples: its samples, in the order of their doc_id.

    Raises:
        UsageError: if it waits for its judge.
    """
    if records.incomplete(record):
        raise UsageError(f"{record['path']}: {WAITS}")
    visual_tokens = record["visual_tokens"]
    measured = {f"visual tokens, {name}": visual_tokens[name] for name in VISUAL}
    scores = [_as_integer(sample["score"]) for sample in samples]
    positions = [(sample.get("kept"), sample.get("merged")) for sample in samples]
    counts = [sample.get("visual_tokens") for sample in samples]
    reduces = any("kept" in sample for sample in samples)
    counted = any("visual_tokens" in sample for sample in samples)
    digested = any(sample.get("digest") for sample in samples)
    return {
        "of": identity_of(record),
        "same": _comparable_fields(record, samples),
        "git": record["git"],
        "metric": record["metric"],
        "higher_is_better": record.get("higher_is_better", True),
        "from_samples": record.get("from_samples"),
        "score": record["score"],
        "measured": measured | record["prefill"],
        "scores": scores,
        "answers": _codes(map(_answer, samples)),
        "left": _codes(positions) if reduces else None,
        "counts": _codes(counts) if counted else None,
        "digests": _encode_digests(samples) if digested else None,
    }


def identity_of(record: dict[str, Any]) -> dict[str, Any]:
    """Return the row and the column of a model's table that a record belongs to."""
    label, tokens = tables.key(record)
    return {
        "model": record["config"]["model"]["name"],
        "method": label,
        "tokens": tokens,
        "task": record["task"],
    }


def name(identity: dict[str, Any]) -> str:
    """Return model, method, budget and task as a person writes them."""
    return " ".join(str(part) for part in identity.values() if part is not None)


def sorted_samples(record: dict[str, Any]) -> list[dict[str, Any]]:
    """Return a record's samples, in the order of their doc_id.

    Raises:
        UsageError: if they changed since, or are not there.
    """
    samples = records.read_samples(Path(record["path"]).parent, record)
    return sorted(samples, key=lambda sample: sample["doc_id"])


def with_scores(
    samples: list[dict[str, Any]], scores: list[float | None]
) -> list[dict[str, Any]]:
    """Return samples with other scores, as those of the baseline."""
    pairs = zip(samples, scores, strict=True)
    return [{**sample, "score": score} for sample, score in pairs]


def _comparable_fields(
    record: dict[str, Any], samples: list[dict[str, Any]]
) -> dict[str, Any]:
    """Return what two records agree on that answer the same questions, with the same weights, held in one way."""
    config, resolved = record["config"], record["resolved"]
    questions = [(sample["doc_id"], sample["question_hash"]) for sample in samples]
    digest = hashlib.sha256(json.dumps(questions).encode()).hexdigest()[:16]
    model = config["model"]
    return {
        "fingerprint": resolved["fingerprint"],
        "projector": resolved.get("projector"),
        "task_hash": record["task_hash"],
        "data_hash": record["data_hash"],
        "limit": config["limit"],
        "questions": digest,
        # `cuda:0` and `cuda:1` are one kind of device.
        "device": resolved["device"].partition(":")[0],
        "dtype": resolved["dtype"],
        "attn_implementation": resolved["attn_implementation"],
        "quantization": resolved["quantization"],
        "device_map": resolved["device_map"],
        "family": model["family"],
        "prompt": model["prompt"],
        "image_aspect": model["image_aspect"],
        "judge": judge_identity(config.get("judge")),
    }


def _answer(sample: dict[str, Any]) -> str | list[str]:
    """Return an answer; of a conversation also the later ones with a fresh selection, which some metrics are of."""
    if "fresh" in sample:
        return [sample["prediction"], sample["fresh"]]
    return sample["prediction"]


def _as_integer(score: float | None) -> float | None:
    """Return 1 instead of 1.0: most scores are one of 0 and 1, and the file is committed."""
    if score is None or not math.isfinite(score) or score != int(score):
        return score
    return int(score)


def _codes(values: Iterable[Any]) -> str:
    """Return WIDTH characters of every value's hash, one after another."""
    codes = []
    for value in values:
        digest = hashlib.sha256(json.dumps(value).encode()).digest()
        codes.append(base64.b64encode(digest)[:WIDTH].decode())
    return "".join(codes)


def split_codes(codes: str, count: int) -> np.ndarray:
    """Return the code of every sample, [samples]; missing ones are empty."""
    starts = range(0, WIDTH * count, WIDTH)
    return np.array([codes[start : start + WIDTH] for start in starts], dtype=str)


def _encode_digests(samples: list[dict[str, Any]]) -> str:
    """Return the digests of samples as a baseline holds them."""
    rows = []
    for sample in samples:
        digest = sample.get("digest", {})
        rows.append([digest.get(name, math.nan) for name in DIGEST])
    return base64.b64encode(np.array(rows, "<f4").tobytes()).decode()


def digests(entry: dict[str, Any]) -> np.ndarray:
    """Return the digests of an entry, [samples, 2]."""
    numbers = np.frombuffer(base64.b64decode(entry["digests"]), "<f4")
    return numbers.reshape(-1, len(DIGEST))
