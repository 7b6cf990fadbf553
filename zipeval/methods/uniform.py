"""Patches on an even grid: the baseline that knows nothing of the image and covers all of it."""

from __future__ import annotations

from dataclasses import dataclass

from zipeval.engine.ragged import on_device, take
from zipeval.engine.vision import Crops, Reduced, VisionMethod


@dataclass(frozen=True)
class Uniform(VisionMethod):
    """Keep `tokens` patches in rows as even as the number allows, in raster order.

    Args:
        tokens: visual tokens an image is left with.
    """

    tokens: int

    def reduce(self, crops: Crops) -> Reduced:
        side = round((crops.hidden.shape[1] - crops.prefix) ** 0.5)
        patches = on_device(grid(self.tokens, side), crops.hidden.device)
        # The same patches of every crop: [crops, tokens]
        positions = (patches + crops.prefix).expand(len(crops.hidden), -1)
        return Reduced(take(crops.hidden, positions), positions)


def grid(count: int, side: int) -> list[int]:
    """Return the numbers of `count` different patches of side x side, ascending.

    They stand in about sqrt(count) rows, in each at the middles of equal parts.
    """
    rows = max(1, round(count**0.5))
    ends = [round(count * (row + 1) / rows) for row in range(rows)]
    patches = []
    for row, end in enumerate(ends):
        # Rows differ by one patch at most, where the count does not divide.
        in_row = end - len(patches)
        y = int((row + 0.5) * side / rows)
        for i in range(in_row):
            x = int((i + 0.5) * side / in_row)
            patches.append(y * side + x)
    return patches
