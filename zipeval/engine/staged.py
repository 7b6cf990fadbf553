"""Methods that remove visual tokens in stages: a list of layers, and a count for each of them."""

from __future__ import annotations

import warnings
from abc import abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from zipeval import moved
from zipeval.engine import budget as budgets
from zipeval.engine.budget import Shape
from zipeval.engine.decoder import DecoderMethod, PromptBatch


@dataclass(frozen=True)
class ScheduledDecoderMethod(DecoderMethod):
    """Remove visual tokens after some layers; a subclass chooses the tokens.

    Args:
        counts: visual tokens kept after each layer of `after`, before merged ones join
            them; at least one leaves, as in SparseVLM's code, but where the count is
            None.
        after: the layers after which tokens leave.
        of: visual tokens of a prompt that `counts` is meant for; others keep in
            proportion. None: `counts` holds for prompts of any size.
    """

    counts: tuple[int | None, ...] = ()
    after: tuple[int, ...] = ()
    of: int | None = None

    def __post_init__(self):
        if sorted(set(self.after)) != list(self.after):
            raise ValueError(
                f"after={[*self.after]}: not ascending; the decoder may be too shallow for so many stages"
            )
        for count in self._numbers():
            if count < 0 or count != int(count):
                raise ValueError(
                    f"counts={[*self.counts]}: numbers of visual tokens from 0 up"
                )
        # Nothing at all is the default, so that a user who gave neither option ends here.
        if not self.counts or len(self.counts) != len(self.after):
            raise ValueError(
                f"give tokens=, or method.counts= with one for each layer of after={[*self.after]}"
            )

    @classmethod
    @abstractmethod
    def published(
        cls, **options
    ) -> tuple[Mapping[int, tuple[int, ...]], tuple[int, ...]]:
        """Return the published `counts` by budget, and `after`, on LLaVA-1.5."""

    @property
    def requested_tokens(self) -> int | None:
        """Return the smallest count; None where counts are shares of a prompt (`of`).

        A share is never too large for an image.
        """
        if self.of is not None:
            return None
        return min(self._numbers(), default=None)

    def _numbers(self) -> list[int]:
        """Return the counts of the stages that remove tokens."""
        return [count for count in self.counts if count is not None]

    def merged(self, dropped: int) -> int:
        """Return the number of new tokens that are made of so many dropped ones."""
        return 0

    @classmethod
    def for_budget(
        cls, tokens: int, budget: str, shape: Shape, **options
    ) -> ScheduledDecoderMethod:
        """Return the method with the published counts, or with a scaled list of them.

        For the budgets `mean` and `final`, the list that comes nearest is scaled.

        Raises:
            ValueError: for options that contradict the budget, and for a budget that
                cannot be met.
        """
        if "counts" in options:
            raise ValueError("give tokens= or method.counts=, one of them")
        lists, published_after = cls.published(**options)
        # In a shallower decoder these are the layers at the same share of its depth.
        usual = tuple(map(shape.depth, published_after))
        after = tuple(options.pop("after", usual))
        if len(after) != len(usual):
            raise ValueError(
                f"after={[*after]}: with tokens= it takes {len(usual)} layers, such as {[*usual]}"
            )

        def with_counts(counts: Iterable[int | None]) -> ScheduledDecoderMethod:
            return cls(counts=tuple(counts), after=after, of=shape.entering, **options)

        if budgets.wants_published(tokens, budget, shape):
            if after != usual:
                raise ValueError(
                    f"after={[*after]}: published is {[*usual]}. Choose budget=mean or budget=final"
                )
            # Published for 576 visual tokens; in proportion to what this model has.
            counts = budgets.published(lists, tokens, shape)
            return with_counts(map(shape.published, counts))

        # The stages keep the proportions of a published list.
        nearest = min(lists, key=lambda count: abs(shape.published(count) - tokens))
        pattern = lists[nearest]
        # At this factor even the smallest count is all that an image has.
        largest_factor = shape.entering / min(pattern)

        def scaled(share: float) -> ScheduledDecoderMethod:
            factor = share * largest_factor
            return with_counts(_scale_counts(pattern, factor, shape.entering))

        return budgets.search(scaled, tokens, budget, shape)

    def layers(self, depth: int) -> tuple[int, ...]:
        """Return the layers before which tokens leave: one behind each of `after`."""
        return tuple(layer + 1 for layer in self.after)

    def schedule(self, visual: int, depth: int) -> list[int]:
        """Return the visual tokens that enter each layer, merged ones among them."""
        entering = []
        remaining = visual
        reducing = self.layers(depth)
        for layer in range(depth):
            if layer in reducing:
                selected = self._count(layer, remaining, visual)
                # Merged tokens enter the layer beside the selected ones.
                remaining = selected + self.merged(remaining - selected)
            entering.append(remaining)
        return entering

    def counts_before(self, layer: int, prompts: PromptBatch) -> list[int]:
        """Return how many visual tokens of each prompt stay before `layer`."""
        pairs = zip(prompts.counts, prompts.initial.infos, strict=True)
        return [self._count(layer, count, prompt.visual) for count, prompt in pairs]

    def kept(self, layer: int, prompts: PromptBatch) -> list[int]:
        """Return `counts_before`, by its name of before."""
        text = f"{type(self).__name__}.kept is called counts_before now"
        warnings.warn(text, DeprecationWarning, stacklevel=2)
        return self.counts_before(layer, prompts)

    def _count(self, layer: int, remaining: int, initial: int) -> int:
        """Return how many of the remaining tokens stay, of a prompt that began with `initial`."""
        count = self.counts[self.layers(0).index(layer)]
        if count is None:
            return remaining
        if self.of is not None:
            count = round(count * initial / self.of)
        # At least one token leaves, as in SparseVLM's code.
        return max(0, min(remaining - 1, count))


def _scale_counts(
    pattern: Iterable[int], factor: float, entering: int
) -> list[int | None]:
    """Return a list of counts times a factor; None where a stage would remove nothing."""
    counts: list[int | None] = []
    for published in pattern:
        count = factor * published
        removes_tokens = count < entering - 0.5
        counts.append(round(count) if removes_tokens else None)
    return counts


# Names of before, for a release.
__getattr__ = moved.renamed(__name__)
