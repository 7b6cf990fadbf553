"""FastV (Chen et al., ECCV 2024): keep the visual tokens that the last token attends to most.

Semantics of the official code: the attention of layer K - 1, averaged over heads, drops
tokens once, before layer K, while the prompt is read. What stays keeps its order and its
positions.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from zipeval.engine.budget import Shape, published, search, wants_published
from zipeval.engine.decoder import DecoderMethod, PromptBatch, Selection, topk_mask
from zipeval.utils.lazy import torch

# Kept at K=2 in the comparisons that SparseVLM published and VisionZip took over.
PUBLISHED = {192: 180, 128: 114, 64: 48}
ONE = "give tokens=, method.keep= or method.ratio=, one of them"


@dataclass(frozen=True)
class FastV(DecoderMethod):
    """Drop tokens as in section 4.1, with its K and R.

    Args:
        keep: visual tokens that are left of a prompt.
        ratio: R, the share that is dropped; instead of `keep`.
        K: number of layers that see all of them.
        score: last (official: attention of the last token) or mean (of all tokens: the variant behind many weak FastV
            rows in other papers' tables).
    """

    keep: int | None = None
    ratio: float | None = None
    K: int = 2
    score: str = "last"

    def __post_init__(self):
        if (self.keep is None) == (self.ratio is None):
            raise ValueError(ONE)
        if self.ratio is not None and not 0 <= self.ratio <= 1:
            raise ValueError(
                f"ratio={self.ratio}: the share of visual tokens that is dropped, from 0 to 1"
            )
        if self.keep is not None:
            _check_whole("keep", self.keep, 0)
        _check_whole("K", self.K, 1)
        if self.score not in ("last", "mean"):
            raise ValueError(f"score={self.score}: last or mean")

    @classmethod
    def for_budget(cls, tokens: int, budget: str, shape: Shape, **options) -> FastV:
        """Return the method with a ratio that meets a budget.

        A ratio and no number, so that a prompt with two images keeps twice as many.

        Raises:
            ValueError: for options that contradict the budget, and for a budget that
                cannot be met.
        """
        if {"keep", "ratio"} & options.keys():
            raise ValueError(ONE)
        # Before layer 0 there is no attention that could rate tokens.
        usual = max(1, shape.depth(2))
        K = options.pop("K", usual)

        def keeping(count: int) -> FastV:
            ratio = max(0.0, 1 - count / shape.entering)
            return cls(ratio=ratio, K=K, **options)

        def keeping_share(share: float) -> FastV:
            return keeping(round(share * shape.entering))

        if wants_published(tokens, budget, shape):
            if usual != K:
                raise ValueError(
                    f"K={K}: published is K={usual}. Choose budget=mean or budget=final"
                )
            return keeping(shape.published(published(PUBLISHED, tokens, shape)))
        return search(keeping_share, tokens, budget, shape)

    @property
    def requested_tokens(self) -> int | None:
        return self.keep

    def layers(self, depth: int) -> tuple[int, ...]:
        return (self.K,)

    def schedule(self, visual: int, depth: int) -> list[int]:
        # K layers see all tokens; those behind them see what was kept.
        return [visual] * self.K + [self._count(visual)] * (depth - self.K)

    def reduce(self, layer: int, prompts: PromptBatch) -> Selection:
        counts = [self._count(visual) for visual in prompts.counts]
        return Selection(topk_mask(self._attention(prompts), prompts, counts))

    def _attention(self, prompts: PromptBatch) -> torch.Tensor:
        """Return the attention that tokens are rated by, averaged over heads: (B, L)."""
        if self.score == "mean":
            return _mean_attention(prompts)
        # [batch, heads, 1, slots] -> [batch, slots]
        return prompts.attention(prompts.last_rows()).mean(1)[:, 0]

    def _count(self, visual: int) -> int:
        """Return how many tokens stay of a prompt's visual ones."""
        if self.ratio is not None:
            return min(visual, round(visual * (1 - self.ratio)))
        # A prompt with few tokens keeps all of them.
        return min(visual, self.keep)


def _check_whole(name: str, value: Any, least: int) -> None:
    """Raise ValueError for an option that is not a whole number from `least` up."""
    if not isinstance(value, int) or value < least:
        raise ValueError(f"{name}={value}: a whole number from {least} up")


def _mean_attention(prompts: PromptBatch) -> torch.Tensor:
    """Return the attention received, averaged over heads and the rows of all tokens: (B, L)."""
    valid = prompts.valid
    rows = torch.arange(valid.shape[1], device=valid.device).expand(len(valid), -1)
    # Rows of padding weigh nothing.
    received = prompts.received(rows, valid[..., None]).mean(1)
    return received / valid.sum(1, keepdim=True)
