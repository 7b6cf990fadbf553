"""Methods that let visual tokens go in stages: a list of layers, and how many tokens stay behind each of them."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass

from zipeval.engine import budget as budgets
from zipeval.engine.budget import Shape
from zipeval.engine.decoder import DecoderMethod, Prompts


@dataclass(frozen=True)
class Staged(DecoderMethod):
    """Visual tokens leave behind some layers; a subclass says which.

    Args:
        counts: visual tokens kept after each layer of `after`, before merged ones join them; at least one leaves, as in
            SparseVLM's code, but where the count is None.
        after: the layers behind which tokens leave.
        of: visual tokens of a prompt that `counts` is meant for; others keep in proportion. None: `counts` of any.
    """

    counts: tuple[int | None, ...] = ()
    after: tuple[int, ...] = ()
    of: int | None = None

    def __post_init__(self):
        if sorted({*self.after}) != [*self.after]:
            raise ValueError(
                f"after={[*self.after]}: not ascending; the decoder may be too shallow for so many stages"
            )
        if any(c is not None and (c < 0 or c != int(c)) for c in self.counts):
            raise ValueError(
                f"counts={[*self.counts]}: numbers of visual tokens from 0 up"
            )
        if not self.counts or len(self.counts) != len(self.after):
            raise ValueError(
                f"give tokens=, or method.counts= with one for each layer of after={[*self.after]}"
            )

    @classmethod
    @abstractmethod
    def published(
        cls, **options
    ) -> tuple[Mapping[int, tuple[int, ...]], tuple[int, ...]]:
        """The published `counts` by budget, and `after`, on LLaVA-1.5."""

    @property
    def asked(self) -> int | None:
        """Of counts that are shares of a prompt (`of`), none is too large for an image."""
        counts = [count for count in self.counts if count is not None]
        return min(counts) if counts and self.of is None else None

    def merged(self, dropped: int) -> int:
        """New tokens that so many dropped ones leave behind."""
        return 0

    @classmethod
    def for_budget(cls, tokens: int, budget: str, shape: Shape, **options) -> Staged:
        """The published list, or for the other budgets the one nearest to them, scaled."""
        if "counts" in options:
            raise ValueError("give tokens= or method.counts=, one of them")
        lists, after = cls.published(**options)
        usual = tuple(map(shape.depth, after))
        after = tuple(options.pop("after", usual))
        if len(after) != len(usual):
            raise ValueError(
                f"after={[*after]}: with tokens= it takes {len(usual)} layers, such as {[*usual]}"
            )

        def make(counts):
            return cls(counts=tuple(counts), after=after, of=shape.entering, **options)

        def scaled(factor):
            return make(
                round(factor * c) if factor * c < shape.entering - 0.5 else None
                for c in pattern
            )

        if budget == "paper" and tokens != shape.entering:
            if after != usual:
                raise ValueError(
                    f"after={[*after]}: published is {[*usual]}. Choose budget=mean or budget=final"
                )
            return make(map(shape.published, budgets.published(lists, tokens, shape)))
        pattern = lists[
            min(lists, key=lambda published: abs(shape.published(published) - tokens))
        ]
        most = shape.entering / min(pattern)
        return budgets.search(lambda share: scaled(share * most), tokens, budget, shape)

    def layers(self, depth: int) -> tuple[int, ...]:
        return tuple(layer + 1 for layer in self.after)

    def schedule(self, visual: int, depth: int) -> list[int]:
        entering, here = [], visual
        for layer in range(depth):
            if layer in self.layers(depth):
                kept = self._count(layer, here, visual)
                here = kept + self.merged(here - kept)
            entering.append(here)
        return entering

    def kept(self, layer: int, prompts: Prompts) -> list[int]:
        """How many visual tokens of each prompt stay before `layer`."""
        pairs = zip(prompts.counts, prompts.given.read, strict=True)
        return [self._count(layer, here, prompt.visual) for here, prompt in pairs]

    def _count(self, layer: int, here: int, given: int) -> int:
        count = self.counts[self.layers(0).index(layer)]
        if count is None:
            return here
        return max(
            0,
            min(here - 1, count if self.of is None else round(count * given / self.of)),
        )
