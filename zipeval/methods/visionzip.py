"""VisionZip (Yang et al., CVPR 2025): the tokens that CLS attends to, and the rest merged into a few contextual ones.

Where the paper and its official code differ, this follows the code, which made the paper's tables: cosine similarity
of head-averaged keys instead of a dot product, target + mean instead of a mean, CLS counted among the dominant tokens.
Encoders without CLS are in the paper only: their patches are scored by the mean attention that they get.
"""

from __future__ import annotations

from dataclasses import dataclass

from zipeval.engine.budget import PAPER_TOKENS, Shape, published
from zipeval.engine.ragged import take
from zipeval.engine.vision import Crops, Reduced, VisionMethod
from zipeval.utils.lazy import torch

# By the crops of an image or frames of a video: visual tokens without reduction, and the dominant and contextual tokens
# of a crop for what is left in all (Tables 1, 2 and 3). Other numbers are split in the same proportion, as is that for
# videos, whose split was not published.
PUBLISHED = {
    1: (576, {192: (162, 30), 128: (108, 20), 64: (54, 10)}),
    5: (2880, {640: (108, 20), 320: (54, 10), 160: (27, 5)}),
    8: (2056, {136: (14, 3)}),
}


@dataclass(frozen=True)
class VisionZip(VisionMethod):
    """Sections 2.2 and 2.3, Algorithms 1 and 2.

    Args:
        tokens: visual tokens an image is left with, split as the paper does: 64 = 54 dominant + 10 contextual. All of
            an image's visual tokens (576 for LLaVA-1.5) leave the model as it is.
        dominant: overrides the split; counts the CLS token.
        contextual: likewise. `tokens` may then be left out.
    """

    tokens: int | None = None
    dominant: int | None = None
    contextual: int | None = None

    def __post_init__(self):
        for name in ("tokens", "dominant", "contextual"):
            if not isinstance(value := getattr(self, name), int | None):
                raise ValueError(
                    f"{name}={value!r}: a whole number of visual tokens, such as tokens=64"
                )
        split = self.split()
        if min(split) < 0 or split[0] < 1:
            raise ValueError(
                f"dominant={split[0]}, contextual={split[1]}: the CLS token alone makes dominant=1"
            )
        if self.tokens not in (None, sum(split)):
            raise ValueError(
                f"tokens={self.tokens} is not dominant + contextual = {split[0]} + {split[1]}"
            )

    @classmethod
    def for_budget(cls, tokens: int, budget: str, shape: Shape, **options) -> VisionZip:
        if (
            budget == "paper"
            and tokens != shape.entering
            and not {"dominant", "contextual"} & options.keys()
        ):
            of, splits = PUBLISHED.get(shape.crops, (PAPER_TOKENS, {}))
            published(splits, tokens, shape, of)
        return super().for_budget(tokens, budget, shape, **options)

    @property
    def asked(self) -> int:
        return sum(self.split())

    def left(self, tokens: int) -> int:
        return min(tokens, sum(self.split()))

    def split(self) -> tuple[int, int]:
        """(dominant, contextual). The published 54 + 10, 108 + 20, 162 + 30 are 54:10; other budgets round it."""
        dominant, contextual, tokens = self.dominant, self.contextual, self.tokens
        if tokens is None and None in (dominant, contextual):
            raise ValueError("tokens: give tokens=, or both dominant= and contextual=")
        if contextual is None:
            contextual = (
                int(tokens * 10 / 64 + 0.5) if dominant is None else tokens - dominant
            )
        return (tokens - contextual if dominant is None else dominant), contextual

    def reduce(self, crops: Crops) -> Reduced:
        dominant, contextual = self.split()
        if dominant + contextual >= crops.selected.shape[1]:
            return crops.everything()
        score = crops.attention().sum(1)
        top = score.topk(dominant - crops.prefix).indices + crops.prefix
        is_dominant = torch.zeros_like(crops.hidden[..., 0], dtype=torch.bool).scatter(
            1, top, True
        )
        is_dominant[:, : crops.prefix] = True
        order = is_dominant.to(torch.uint8).argsort(dim=1, descending=True, stable=True)
        kept, rest = order[:, :dominant], order[:, dominant:]
        merged = merge(
            take(crops.hidden, rest), take(crops.mean_keys(), rest), contextual
        )
        at = rest[:, targets(rest.shape[1], contextual)]
        return Reduced(torch.cat([take(crops.hidden, kept), merged], 1), kept, at)


def targets(tokens: int, count: int) -> slice:
    """`count` of so many tokens, evenly spaced, which others join."""
    step = max(1, tokens // max(1, count))
    return slice(0, count * step, step)


def merge(hidden: torch.Tensor, keys: torch.Tensor, count: int) -> torch.Tensor:
    """Algorithm 2: `count` evenly spaced targets, every other token joins its most similar one.

    Args:
        hidden: (N, R, D) tokens that are not dominant.
        keys: (N, R, d) their head-averaged keys.

    Returns:
        (N, count, D): each target plus the mean of what joined it.
    """
    if count == 0:
        return hidden[:, :0]
    chosen = targets(hidden.shape[1], count)
    keys = torch.nn.functional.normalize(keys, dim=-1)
    nearest = (keys @ keys[:, chosen].mT).argmax(2)
    joined = nearest[..., None] == torch.arange(count, device=keys.device)
    joined[:, chosen] = False  # a target joins nobody
    size = joined.sum(1).clamp(min=1)[..., None]
    return hidden[:, chosen] + joined.to(hidden.dtype).mT @ hidden / size.to(
        hidden.dtype
    )
