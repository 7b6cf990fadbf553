"""Define what `tokens=T` means.

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

from zipeval import moved

# Visual tokens of an image, and decoder layers, of LLaVA-1.5-7B, which published settings
# are for.
PAPER_TOKENS, PAPER_LAYERS = 576, 32
# Settings that `search` can choose from.
STEPS = 1 << 14

Setting = TypeVar("Setting")


@dataclass(frozen=True)
class VisualInput:
    """Describe an image or a video of a prompt, as the model takes it.

    Attributes:
        tokens: visual tokens that it makes without reduction.
        crops: that the encoder sees: 1, the whole image and its tiles (LLaVA-NeXT's
            anyres), or the frames of a video.
        patches: of a crop; CLS is one where the model hands it to the decoder
            (Video-LLaVA's frames).
        rows: of patches in the image that its tiles make up.
    """

    tokens: int
    crops: int
    patches: int
    rows: int = 0


@dataclass(frozen=True)
class Shape:
    """Describe what a budget is spent on.

    Attributes:
        image: visual tokens that the model makes of its largest picture, an image or a video.
        entering: those that reach this method; fewer behind another one.
        layers: of the decoder.
        grids: (crops, row ends) that a picture can have, ascending; row ends with
            packing=newline only.
    """

    image: int
    entering: int
    layers: int
    grids: tuple[tuple[int, int], ...] = ((1, 0),)

    @property
    def crops(self) -> int:
        """Return the number of crops of the largest picture."""
        return self.grids[-1][0]

    @property
    def picture(self) -> VisualInput:
        """Return the largest picture."""
        return self.pictures[-1]

    @property
    def pictures(self) -> list[VisualInput]:
        """Return a picture for each of the grids."""
        patches = self.entering // self.crops
        return [
            VisualInput(crops * patches, crops, patches, rows)
            for crops, rows in self.grids
        ]

    @property
    def row_ends(self) -> bool:
        """Tell whether methods before the decoder leave row ends."""
        return any(rows for _, rows in self.grids)

    def published(self, count: int, image_tokens: int = PAPER_TOKENS) -> int:
        """Return a count that was published for an image, in proportion."""
        return round(count * self.image / image_tokens)

    def depth(self, layer: int) -> int:
        """Return the layer that stands for one that was published for LLaVA-1.5.

        In a shallower decoder it is the one at the same share of its depth.
        """
        if self.layers >= PAPER_LAYERS:
            return layer
        return round(layer * self.layers / PAPER_LAYERS)


def wants_published(tokens: int, budget: str, shape: Shape) -> bool:
    """Tell whether a budget is a published setting.

    All tokens of an image were never published: there, a search leaves all of them.
    """
    return budget == "paper" and tokens != shape.entering


def published(
    settings: Mapping[int, Setting],
    tokens: int,
    shape: Shape,
    image_tokens: int = PAPER_TOKENS,
) -> Setting:
    """Return the published setting for `tokens`.

    Args:
        settings: has a key for each number of tokens that is left of an image of
            `image_tokens`.

    Raises:
        ValueError: if none was published.
    """
    # Settings for images in crops are not for others, nor the other way round.
    in_crops = image_tokens != PAPER_TOKENS
    if not settings or in_crops != (shape.crops > 1):
        raise ValueError(
            f"tokens={tokens}: nothing was published for {shape.crops} crops. Choose budget=mean or budget=final"
        )
    # A share of every crop, so that what they add up to can be divided again.
    scaled = {}
    for count, setting in settings.items():
        share = shape.published(count, image_tokens * shape.crops)
        scaled[shape.crops * share] = setting
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
    """Return the method that meets a budget.

    Args:
        make: returns a method for a share: 0.0 removes all it can, 1.0 removes nothing.

    Raises:
        ValueError: if none does within one token; says what is feasible.
    """

    def reached(step: int) -> float:
        entering = make(step / STEPS).schedule(shape.entering, shape.layers)
        return fmean(entering) if budget == "mean" else entering[-1]

    if tokens == shape.entering:
        return make(1.0)
    low, high = reached(0), reached(STEPS)
    # More is left at every step; of the two steps around the budget the nearer one is it.
    step = bisect_left(range(STEPS), tokens, key=reached)
    nearest = min((step, max(step - 1, 0)), key=lambda s: abs(reached(s) - tokens))
    is_feasible = low - 0.5 <= tokens <= high
    if not is_feasible or abs(reached(nearest) - tokens) > 1:
        raise ValueError(
            f"tokens={tokens}: with budget={budget}, {ceil(low - 0.5)} to {floor(high)} are feasible on "
            f"{shape.layers} layers x {shape.entering} visual tokens"
        )
    return make(nearest / STEPS)


# Names of before, for a release.
__getattr__ = moved.renamed(__name__)
