"""FastV (Chen et al., ECCV 2024): behind layer K only the visual tokens stay that the last token attended to most.

Semantics of the official code: the attention of layer K - 1, averaged over heads, drops tokens once, before layer K,
while the prompt is read. What stays keeps its order and its positions.
"""

from __future__ import annotations

from dataclasses import dataclass

from zipeval.engine.budget import Shape, published, search
from zipeval.engine.decoder import DecoderMethod, Kept, Prompts, keep_best
from zipeval.utils.lazy import torch

# Kept at K=2 in the comparisons that SparseVLM published and VisionZip took over.
PUBLISHED = {192: 180, 128: 114, 64: 48}
ONE = "give tokens=, method.keep= or method.ratio=, one of them"


@dataclass(frozen=True)
class FastV(DecoderMethod):
    """Section 4.1, with its K and R.

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
        for name, least in (("keep", 0), ("K", 1)):
            value = getattr(self, name)
            if value is not None and not (isinstance(value, int) and value >= least):
                raise ValueError(f"{name}={value}: a whole number from {least} up")
        if self.score not in ("last", "mean"):
            raise ValueError(f"score={self.score}: last or mean")

    @classmethod
    def for_budget(cls, tokens: int, budget: str, shape: Shape, **options) -> FastV:
        """As a ratio, so that a prompt with two images keeps twice as many."""
        if {"keep", "ratio"} & options.keys():
            raise ValueError(ONE)
        usual = max(1, shape.depth(2))
        K = options.pop("K", usual)

        def keeping(count):
            return cls(ratio=max(0.0, 1 - count / shape.entering), K=K, **options)

        if budget == "paper" and tokens != shape.entering:
            if usual != K:
                raise ValueError(
                    f"K={K}: published is K={usual}. Choose budget=mean or budget=final"
                )
            return keeping(shape.published(published(PUBLISHED, tokens, shape)))
        return search(
            lambda share: keeping(round(share * shape.entering)), tokens, budget, shape
        )

    @property
    def asked(self) -> int | None:
        return self.keep

    def layers(self, depth: int) -> tuple[int, ...]:
        return (self.K,)

    def schedule(self, visual: int, depth: int) -> list[int]:
        return [visual] * self.K + [self._count(visual)] * (depth - self.K)

    def reduce(self, layer: int, prompts: Prompts) -> Kept:
        score = (
            self._mean(prompts)
            if self.score == "mean"
            else prompts.attention(prompts.last_rows()).mean(1)[:, 0]
        )
        return Kept(keep_best(score, prompts, [self._count(n) for n in prompts.counts]))

    def _count(self, visual: int) -> int:
        return min(
            visual,
            self.keep if self.ratio is None else round(visual * (1 - self.ratio)),
        )

    @staticmethod
    def _mean(prompts: Prompts) -> torch.Tensor:
        """(B, L): attention received, averaged over heads and over the rows of all tokens."""
        valid = prompts.valid
        rows = torch.arange(valid.shape[1], device=valid.device).expand(len(valid), -1)
        return prompts.received(rows, valid[..., None]).mean(1) / valid.sum(
            1, keepdim=True
        )
