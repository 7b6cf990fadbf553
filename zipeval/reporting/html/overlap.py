"""Which visual tokens two runs both keep. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from statistics import fmean
from typing import Any

Kept = Mapping[
    Any, list[int]
]  # sample -> the positions kept of each of its pictures, as bits of an integer


def bits(positions: Iterable[int]) -> int:
    """A set as an integer that has bit i where i is in it: those of a benchmark are small, and fast to compare."""
    found = 0
    for position in positions:
        found |= 1 << position
    return found


def iou(ours: list[int], theirs: list[int]) -> float | None:
    """Intersection over union of what is kept of a sample's pictures; None where both keep nothing."""
    pairs = list(zip(ours, theirs, strict=True))
    union = sum((a | b).bit_count() for a, b in pairs)
    return sum((a & b).bit_count() for a, b in pairs) / union if union else None


def mean_iou(ours: Kept, theirs: Kept) -> float | None:
    """Mean over the samples that both runs have; None where there is nothing to compare."""
    found = [
        iou(kept, theirs[sample]) for sample, kept in ours.items() if sample in theirs
    ]
    return (
        fmean(known)
        if (known := [value for value in found if value is not None])
        else None
    )


def matrix(runs: list[Kept]) -> list[list[float | None]]:
    """The mean IoU of every run with every run."""
    found = [
        [mean_iou(ours, theirs) for theirs in runs[: i + 1]]
        for i, ours in enumerate(runs)
    ]
    return [
        [found[max(i, j)][min(i, j)] for j in range(len(runs))]
        for i in range(len(runs))
    ]
