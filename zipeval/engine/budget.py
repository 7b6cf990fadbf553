"""What `tokens=T` means.

With n_i visual tokens of an image entering layer i of a decoder of L layers, `budget=` says what equals T:

    paper   nothing: it is the method's published setting for T, whatever that comes to
    mean    (1/L) sum n_i, which compute and cache grow with
    final   n_(L-1)

Before the decoder, n_i is the same in every layer and all three agree. Papers that act inside it count each in its own
way: SparseVLM's "64" is a mean of 82.3 visual tokens on LLaVA-1.5, its FastV at "64" one of 81.0.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import ceil, floor
from statistics import fmean
from typing import TypeVar

PAPER_TOKENS, PAPER_LAYERS = (
    576,
    32,
)  # of an image in LLaVA-1.5-7B, which published settings are for
STEPS = 1 << 14

Setting = TypeVar("Setting")


@dataclass(frozen=True)
class Picture:
    """An image or a video of a prompt, as the model takes it.

    Attributes:
        tokens: visual tokens that it makes without reduction.
        crops: that the encoder sees: 1, the whole image and its tiles (LLaVA-NeXT's anyres), or the frames of a video.
        patches: of a crop; CLS is one where the model hands it to the decoder (Video-LLaVA's frames).
        rows: of patches in the image that its tiles make up.
    """

    tokens: int
    crops: int
    patches: int
    rows: int = 0


@dataclass(frozen=True)
class Shape:
    """What a budget is spent on.

    Attributes:
        image: visual tokens that the model makes of its largest picture, an image or a video.
        entering: those that reach this method; fewer behind another one.
        layers: of the decoder.
        grids: (crops, row ends) that a picture can have, ascending; row ends with packing=newline only.
    """

    image: int
    entering: int
    layers: int
    grids: tuple[tuple[int, int], ...] = ((1, 0),)

    @property
    def crops(self) -> int:
        """Of the largest picture."""
        return self.grids[-1][0]

    @property
    def picture(self) -> Picture:
        """The largest."""
        return self.pictures[-1]

    @property
    def pictures(self) -> list[Picture]:
        """One for each of the grids."""
        patches = self.entering // self.crops
        return [
            Picture(crops * patches, crops, patches, rows) for crops, rows in self.grids
        ]

    @property
    def row_ends(self) -> bool:
        """Whether methods before the decoder leave any."""
        return any(rows for _, rows in self.grids)

    def published(self, count: int, of: int = PAPER_TOKENS) -> int:
        """A number of tokens that was published for an image of `of` tokens, in proportion to this model's image."""
        return round(count * self.image / of)

    def depth(self, layer: int) -> int:
        """A layer that was published for LLaVA-1.5; in a shallower decoder the one at the same share of its depth."""
        return (
            layer
            if self.layers >= PAPER_LAYERS
            else round(layer * self.layers / PAPER_LAYERS)
        )


def published(
    settings: Mapping[int, Setting], tokens: int, shape: Shape, of: int = PAPER_TOKENS
) -> Setting:
    """The published setting for `tokens`; `settings` has a key for each number of tokens of an image of `of`.

    Raises:
        ValueError: if none was published.
    """
    in_crops = (
        of != PAPER_TOKENS
    )  # settings for images in crops are not for others, nor the other way round
    if not settings or in_crops != (shape.crops > 1):
        raise ValueError(
            f"tokens={tokens}: nothing was published for {shape.crops} crops. Choose budget=mean or budget=final"
        )
    # A share of every crop, so that what they add up to can be divided again.
    scaled = {
        shape.crops * shape.published(count, of * shape.crops): setting
        for count, setting in settings.items()
    }
    if tokens not in scaled:
        listed = ", ".join(map(str, scaled))
        raise ValueError(
            f"tokens={tokens}: published are {listed} of {shape.image} visual tokens. "
            "Choose one of these, or budget=mean or budget=final"
        )
    return scaled[tokens]


def search(
    make: Callable[[float], Setting], tokens: int, budget: str, shape: Shape
) -> Setting:
    """Of `make(0.0)`, which removes all it can, to `make(1.0)`, which removes nothing, the one that meets a budget.

    Raises:
        ValueError: if none does within one token; says what is feasible.
    """

    def reached(step: int) -> float:
        entering = make(step / STEPS).schedule(shape.entering, shape.layers)
        return fmean(entering) if budget == "mean" else entering[-1]

    if tokens == shape.entering:
        return make(1.0)
    low, high = reached(0), reached(STEPS)
    step = bisect_left(range(STEPS), tokens, key=reached)
    nearest = min((step, max(step - 1, 0)), key=lambda s: abs(reached(s) - tokens))
    if not low - 0.5 <= tokens <= high or abs(reached(nearest) - tokens) > 1:
        raise ValueError(
            f"tokens={tokens}: with budget={budget}, {ceil(low - 0.5)} to {floor(high)} are feasible on "
            f"{shape.layers} layers x {shape.entering} visual tokens"
        )
    return make(nearest / STEPS)
