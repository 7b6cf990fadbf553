"""Patches on an even grid: the baseline that knows nothing of the image and covers all of it."""

from __future__ import annotations

from dataclasses import dataclass

from zipeval.engine.ragged import on_device, take
from zipeval.engine.vision import Crops, Reduced, VisionMethod


@dataclass(frozen=True)
class Uniform(VisionMethod):
    """`tokens` patches in rows as even as the number allows, in raster order.

    Args:
        tokens: visual tokens an image is left with.
    """

    tokens: int

    def reduce(self, crops: Crops) -> Reduced:
        side = round((crops.hidden.shape[1] - crops.prefix) ** 0.5)
        kept = on_device(grid(self.tokens, side), crops.hidden.device) + crops.prefix
        kept = kept.expand(len(crops.hidden), -1)
        return Reduced(take(crops.hidden, kept), kept)


def grid(count: int, side: int) -> list[int]:
    """`count` different patches of side x side: about sqrt(count) rows, in each the middles of equal parts."""
    rows = max(1, round(count**0.5))
    ends = [round(count * (row + 1) / rows) for row in range(rows)]
    patches = []
    for row, end in enumerate(ends):
        number = end - len(patches)
        y = int((row + 0.5) * side / rows)
        patches += [y * side + int((i + 0.5) * side / number) for i in range(number)]
    return patches
