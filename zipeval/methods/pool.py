"""Average pooling of the patch grid: the baseline that merges without looking."""

from __future__ import annotations

from dataclasses import dataclass

from zipeval.engine.budget import Shape
from zipeval.engine.vision import Crops, Reduced, VisionMethod, WithImageNewlines
from zipeval.utils.lazy import torch


@dataclass(frozen=True)
class Pool(VisionMethod):
    """Average the grid down to height x width = `tokens`, as square as that allows.

    Args:
        tokens: visual tokens an image is left with; a number without factors that fit the grid is refused.
    """

    tokens: int

    @classmethod
    def for_budget(cls, tokens: int, budget: str, shape: Shape, **options) -> Pool:
        method = super().for_budget(tokens, budget, shape, **options)
        # Refused here and not in the middle of a run: a crop's share with no such grid.
        for picture in shape.pictures:
            side = round(picture.patches**0.5)
            for crop_method in WithImageNewlines(method).of_crops(picture):
                if crop_method.tokens < picture.patches:
                    grid(crop_method.tokens, side)
        return method

    def reduce(self, crops: Crops) -> Reduced:
        patches = crops.hidden[:, crops.prefix :]
        if self.tokens >= crops.selected.shape[1]:
            return crops.everything()
        side = round(patches.shape[1] ** 0.5)
        image = patches.mT.unflatten(2, (side, side))  # [crops, width, side, side]
        size = grid(self.tokens, side)
        pooled = torch.nn.functional.adaptive_avg_pool2d(image, size).flatten(2).mT
        # Every token is new: [crops, 0] positions of tokens that were kept.
        kept_positions = pooled.new_zeros(len(pooled), 0).long()
        return Reduced(pooled, kept_positions)


def grid(tokens: int, side: int) -> tuple[int, int]:
    """Return height <= width <= side with height x width = tokens, as square as possible.

    Raises:
        ValueError: if there is none.
    """
    # The largest factor up to the root is the height of the squarest grid.
    for height in range(int(tokens**0.5), 0, -1):
        if tokens % height == 0 and tokens // height <= side:
            return height, tokens // height
    raise ValueError(
        f"tokens={tokens} is no height x width within {side} x {side}; choose a product, such as {side}"
    )
