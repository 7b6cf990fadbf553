"""VisionZip (Yang et al., CVPR 2025): keep the tokens that CLS attends to, and merge the rest.

The rest becomes a few contextual tokens. Where the paper and its official code differ,
this follows the code, which made the paper's tables: cosine similarity of head-averaged
keys instead of a dot product, target + mean instead of a mean, CLS counted among the
dominant tokens. Encoders without CLS are in the paper only: their patches are scored by
the mean attention that they get.
"""

from __future__ import annotations

from dataclasses import dataclass

from zipeval.engine.budget import PAPER_TOKENS, Shape, published, wants_published
from zipeval.engine.ragged import take
from zipeval.engine.vision import Crops, Reduced, VisionMethod
from zipeval.utils.lazy import torch

# By the crops of an image or frames of a video: visual tokens without reduction, and the
# dominant and contextual tokens of a crop for what is left in all (Tables 1, 2 and 3).
# Other numbers are split in the same proportion, as is that for videos, whose split was not
# published.
PUBLISHED = {
    1: (576, {192: (162, 30), 128: (108, 20), 64: (54, 10)}),
    5: (2880, {640: (108, 20), 320: (54, 10), 160: (27, 5)}),
    8: (2056, {136: (14, 3)}),
}


@dataclass(frozen=True)
class VisionZip(VisionMethod):
    """Keep and merge tokens as in sections 2.2 and 2.3, Algorithms 1 and 2.

    Args:
        tokens: visual tokens an image is left with, split as the paper does: 64 = 54
            dominant + 10 contextual. All of an image's visual tokens (576 for LLaVA-1.5)
            leave the model as it is.
        dominant: overrides the split; counts the CLS token.
        contextual: likewise. `tokens` may then be left out.
    """

    tokens: int | None = None
    dominant: int | None = None
    contextual: int | None = None

    def __post_init__(self):
        for name in ("tokens", "dominant", "contextual"):
            value = getattr(self, name)
            if not isinstance(value, int | None):
                raise ValueError(
                    f"{name}={value!r}: a whole number of visual tokens, such as tokens=64"
                )
        dominant, contextual = self.split()
        if contextual < 0 or dominant < 1:
            raise ValueError(
                f"dominant={dominant}, contextual={contextual}: the CLS token alone makes dominant=1"
            )
        if self.tokens not in (None, dominant + contextual):
            raise ValueError(
                f"tokens={self.tokens} is not dominant + contextual = {dominant} + {contextual}"
            )

    @classmethod
    def for_budget(cls, tokens: int, budget: str, shape: Shape, **options) -> VisionZip:
        # A split that the user gives was never published.
        has_own_split = not options.keys().isdisjoint({"dominant", "contextual"})
        if wants_published(tokens, budget, shape) and not has_own_split:
            image_tokens, splits = PUBLISHED.get(shape.crops, (PAPER_TOKENS, {}))
            published(splits, tokens, shape, image_tokens)
        return super().for_budget(tokens, budget, shape, **options)

    @property
    def requested_tokens(self) -> int:
        return sum(self.split())

    def left(self, tokens: int) -> int:
        return min(tokens, sum(self.split()))

    def split(self) -> tuple[int, int]:
        """Return the numbers of dominant and of contextual tokens.

        The published 54 + 10, 108 + 20, 162 + 30 are 54:10; other budgets round it.

        Raises:
            ValueError: where the options do not tell both.
        """
        dominant, contextual, tokens = self.dominant, self.contextual, self.tokens
        if tokens is None and None in (dominant, contextual):
            raise ValueError("tokens: give tokens=, or both dominant= and contextual=")
        if dominant is None and contextual is None:
            contextual = int(tokens * 10 / 64 + 0.5)
        if contextual is None:
            contextual = tokens - dominant
        if dominant is None:
            dominant = tokens - contextual
        return dominant, contextual

    def reduce(self, crops: Crops) -> Reduced:
        dominant, contextual = self.split()
        if dominant + contextual >= crops.selected.shape[1]:
            return crops.everything()
        # Algorithm 1: attention received, summed over heads. [crops, patches]
        score = crops.attention().sum(1)
        top = score.topk(dominant - crops.prefix).indices + crops.prefix
        is_dominant = torch.zeros_like(crops.hidden[..., 0], dtype=torch.bool)
        is_dominant = is_dominant.scatter(1, top, True)
        # CLS is dominant whatever its score.
        is_dominant[:, : crops.prefix] = True
        # A stable sort leaves both groups in the order of the image.
        order = is_dominant.to(torch.uint8).argsort(dim=1, descending=True, stable=True)
        selected, rest = order[:, :dominant], order[:, dominant:]
        hidden, keys = take(crops.hidden, rest), take(crops.mean_keys(), rest)
        merged = merge(hidden, keys, contextual)
        # A merged token stands where its target was.
        places = rest[:, targets(rest.shape[1], contextual)]
        features = torch.cat([take(crops.hidden, selected), merged], 1)
        return Reduced(features, selected, places)


def targets(tokens: int, count: int) -> slice:
    """Return the evenly spaced tokens that others join, `count` of them."""
    step = max(1, tokens // max(1, count))
    return slice(0, count * step, step)


def merge(hidden: torch.Tensor, keys: torch.Tensor, count: int) -> torch.Tensor:
    """Merge tokens by Algorithm 2.

    Of `count` evenly spaced targets, every other token joins its most similar one.

    Args:
        hidden: (N, R, D) tokens that are not dominant.
        keys: (N, R, d) their head-averaged keys.

    Returns:
        (N, count, D): each target plus the mean of what joined it.
    """
    if count == 0:
        return hidden[:, :0]
    chosen = targets(hidden.shape[1], count)
    # Cosine similarity, as in the official code: [crops, tokens, targets]
    keys = torch.nn.functional.normalize(keys, dim=-1)
    nearest = (keys @ keys[:, chosen].mT).argmax(2)
    joined = nearest[..., None] == torch.arange(count, device=keys.device)
    # A target joins nobody.
    joined[:, chosen] = False
    # A target that nobody joins stays as it is: its sum is 0.
    size = joined.sum(1).clamp(min=1)[..., None].to(hidden.dtype)
    total = joined.to(hidden.dtype).mT @ hidden
    # Target + mean, as in the official code; the paper has the mean of all of them.
    return hidden[:, chosen] + total / size
