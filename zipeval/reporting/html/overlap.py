"""Compare which visual tokens two runs keep. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from statistics import fmean
from typing import Any

# The positions kept of each picture of a sample, as bits of an integer, by sample.
KeptPositions = Mapping[Any, list[int]]


def bits(positions: Iterable[int]) -> int:
    """Return a set as an integer that has bit i where i is in it.

    The positions of a benchmark are small, and integers are compared fast.
    """
    integer = 0
    for position in positions:
        integer |= 1 << position
    return integer


def iou(ours: list[int], theirs: list[int]) -> float | None:
    """Return intersection over union of what is kept of a sample's pictures; None where both keep nothing."""
    intersection, union = 0, 0
    for our_bits, their_bits in zip(ours, theirs, strict=True):
        intersection += (our_bits & their_bits).bit_count()
        union += (our_bits | their_bits).bit_count()
    return intersection / union if union else None


def mean_iou(ours: KeptPositions, theirs: KeptPositions) -> float | None:
    """Return the mean over the samples that both runs have; None where there is nothing to compare."""
    values = []
    for sample in ours.keys() & theirs.keys():
        value = iou(ours[sample], theirs[sample])
        if value is not None:
            values.append(value)
    return fmean(values) if values else None


def matrix(runs: list[KeptPositions]) -> list[list[float | None]]:
    """Return the mean IoU of every run with every run."""
    means: list[list[float | None]] = [[None] * len(runs) for _ in runs]
    for i, ours in enumerate(runs):
        # IoU is symmetric: each pair of runs is compared once.
        for j, theirs in enumerate(runs[: i + 1]):
            means[i][j] = means[j][i] = mean_iou(ours, theirs)
    return means
