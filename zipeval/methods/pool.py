"""Average pooling of the patch grid: the baseline that merges without looking."""

from __future__ import annotations

from dataclasses import dataclass

from zipeval.engine.budget import Shape
from zipeval.engine.vision import Crops, Reduced, RowEnds, VisionMethod
from zipeval.utils.lazy import torch


@dataclass(frozen=True)
class Pool(VisionMethod):
    """The grid averaged down to height x width = `tokens`, as square as the number allows.

    Args:
        tokens: visual tokens an image is left with; a number without factors that fit the grid is refused.
    """

    tokens: int

    @classmethod
    def for_budget(cls, tokens: int, budget: str, shape: Shape, **options) -> Pool:
        method = super().for_budget(tokens, budget, shape, **options)
        for picture in shape.pictures:
            for part in RowEnds(method).of_crops(picture):
                if part.tokens < picture.patches:
                    grid(part.tokens, round(picture.patches**0.5))
        return method

    def reduce(self, crops: Crops) -> Reduced:
        patches = crops.hidden[:, crops.prefix :]
        if self.tokens >= crops.selected.shape[1]:
            return crops.everything()
        side = round(patches.shape[1] ** 0.5)
        image = patches.mT.unflatten(2, (side, side))
        pooled = (
            torch.nn.functional.adaptive_avg_pool2d(image, grid(self.tokens, side))
            .flatten(2)
            .mT
        )
        return Reduced(pooled, pooled.new_zeros(len(pooled), 0).long())


def grid(tokens: int, side: int) -> tuple[int, int]:
    """(height, width) with height x width = tokens, height <= width <= side, as square as possible.

    Raises:
        ValueError: if there is none.
    """
    for height in range(int(tokens**0.5), 0, -1):
        if tokens % height == 0 and tokens // height <= side:
            return height, tokens // height
    raise ValueError(
        f"tokens={tokens} is no height x width within {side} x {side}; choose a product, such as {side}"
    )
