"""Remarks: what a reader has to know of a number beside the number. Every format shows them, each in its own way."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from math import isnan

from zipeval.results.schema import Record

FAILED = "failed"
UNJUDGED = "unjudged"
OVERFLOWED = "overflowed"
UNDEFINED = "undefined"
MARKS = {FAILED: "§", UNJUDGED: "¶", OVERFLOWED: "‖", UNDEFINED: "#"}
# Stands behind the name of a metric of which less is better.
LOWER = " ↓"
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
    """Return the remarks on a record's score."""
    total = record["samples"]["count"]
    rule = "count as wrong" if record.get("higher_is_better", True) else "are left out"
    counted = [
        (FAILED, "failed", f"of {total} samples failed and {rule}"),
        (UNJUDGED, "unscored", f"of {total} answers are unjudged"),
        (
            OVERFLOWED,
            "overflowed",
            f"of {total} prompts are longer than the model's positions",
        ),
    ]
    remarks = []
    for kind, field, text in counted:
        count = record.get(field)
        if count:
            remarks.append(Remark(kind, f"{count} {text}"))
    return tuple(remarks)


def bound_remarks(bound: Record) -> tuple[Remark, ...]:
    """Return the remarks on percentages of an upper bound."""
    remarks = record_remarks(bound)
    return tuple(Remark(r.kind, f"upper bound: {r.text}") for r in remarks)


def undefined_remarks(
    percent: float, higher_is_better: bool, bound: float
) -> tuple[Remark, ...]:
    """Return why there is no percentage; nothing where there is one, or where the table says itself that it is of 0."""
    if not isnan(percent):
        return ()
    reason = "the upper bound is below 0"
    if not higher_is_better:
        reason = "lower is better, and a score is not above 0"
    elif bound == 0:
        return ()
    return (Remark(UNDEFINED, f"no percentage: {reason}"),)


def _kinds(remarks: Iterable[Remark]) -> list[str]:
    """Return the kinds of some remarks, each once and in the order of MARKS."""
    kinds = {remark.kind for remark in remarks}
    return sorted(kinds, key=list(MARKS).index)


def marks(remarks: Iterable[Remark]) -> str:
    """Return the marks of some remarks, each once and in one order."""
    return "".join(map(MARKS.get, _kinds(remarks)))


def key(remarks: Iterable[Remark]) -> str:
    """Return what the marks of some remarks mean; nothing without any."""
    return ", ".join(f"{MARKS[kind]} {MEANINGS[kind]}" for kind in _kinds(remarks))


def status(remarks: Iterable[Remark]) -> str:
    """Return remarks in plain words, `ok` without any."""
    return "; ".join(dict.fromkeys(remark.text for remark in remarks)) or "ok"
