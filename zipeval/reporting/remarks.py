"""Remarks: what a reader has to know of a number beside the number. Every format shows them, each in its own way."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from math import isnan
from typing import Any

Record = dict[str, Any]
FAILED, UNJUDGED, OVERFLOWED, UNDEFINED = (
    "failed",
    "unjudged",
    "overflowed",
    "undefined",
)
MARKS = {FAILED: "§", UNJUDGED: "¶", OVERFLOWED: "‖", UNDEFINED: "#"}
LOWER = " ↓"  # behind the name of a metric of which less is better
MEANINGS = {
    FAILED: "samples that could not be read",
    UNJUDGED: "answers without a verdict",
    OVERFLOWED: "prompts longer than the model's positions",
    UNDEFINED: "no percentage follows from the scores",
}


@dataclass(frozen=True)
class Remark:
    """Say what has to be known of a number.

    Attributes:
        kind: one of MARKS.
        text: the same in plain words, with its counts.
    """

    kind: str
    text: str


def record_remarks(record: Record) -> tuple[Remark, ...]:
    """Return what has to be said of a record's score."""
    total = record["samples"]["count"]
    rule = "count as wrong" if record.get("higher_is_better", True) else "are left out"
    texts = {
        FAILED: (record.get("failed"), f"of {total} samples failed and {rule}"),
        UNJUDGED: (record.get("unscored"), f"of {total} answers are unjudged"),
        OVERFLOWED: (
            record.get("overflowed"),
            f"of {total} prompts are longer than the model's positions",
        ),
    }
    return tuple(
        Remark(kind, f"{count} {text}")
        for kind, (count, text) in texts.items()
        if count
    )


def bound_remarks(bound: Record) -> tuple[Remark, ...]:
    """Return what has to be said of percentages of an upper bound."""
    return tuple(
        Remark(remark.kind, f"upper bound: {remark.text}")
        for remark in record_remarks(bound)
    )


def undefined_remarks(
    percent: float, higher_is_better: bool, bound: float
) -> tuple[Remark, ...]:
    """Return why there is no percentage; nothing where there is one, or where the table says itself that it is of 0."""
    if not isnan(percent) or (higher_is_better and bound == 0):
        return ()
    reason = (
        "the upper bound is below 0"
        if higher_is_better
        else "lower is better, and a score is not above 0"
    )
    return (Remark(UNDEFINED, f"no percentage: {reason}"),)


def marks(remarks: Iterable[Remark]) -> str:
    """Return the marks of some remarks, each once and in one order."""
    kinds = {remark.kind for remark in remarks}
    return "".join(mark for kind, mark in MARKS.items() if kind in kinds)


def key(remarks: Iterable[Remark]) -> str:
    """Return what the marks of some remarks mean; nothing without any."""
    kinds = {remark.kind for remark in remarks}
    return ", ".join(
        f"{mark} {MEANINGS[kind]}" for kind, mark in MARKS.items() if kind in kinds
    )


def status(remarks: Iterable[Remark]) -> str:
    """Return remarks in plain words, `ok` without any."""
    return "; ".join(dict.fromkeys(remark.text for remark in remarks)) or "ok"
