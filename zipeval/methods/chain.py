"""Two methods in order, one before the language model and one inside it.

Table 5 of VisionZip has it before SparseVLM.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from zipeval.engine.budget import Shape, VisualInput
from zipeval.engine.decoder import DecoderMethod
from zipeval.engine.guard import Applied
from zipeval.engine.images import largest_picture
from zipeval.engine.method import Method, Stages
from zipeval.engine.vision import VisionMethod
from zipeval.methods import build


@dataclass(frozen=True)
class Chain(Method):
    """Give `second` what `first` left.

    Args:
        first: a method between encoder and language model.
        second: a method inside the language model.
    """

    first: VisionMethod
    second: DecoderMethod

    def __post_init__(self):
        # A config without tokens= is built without `for_budget`, which makes methods of
        # the two nodes.
        if isinstance(self.first, dict):
            raise ValueError(
                "give tokens=, the visual tokens that the second one leaves"
            )
        for name, kind in (("first", VisionMethod), ("second", DecoderMethod)):
            method = getattr(self, name)
            if not isinstance(method, kind):
                raise ValueError(
                    f"{name}={type(method).__name__}: the {name} one has to be a {kind.__name__}"
                )

    @property
    def reduction_stages(self) -> Stages:
        """Return the two methods as the stages."""
        return Stages(self.first, self.second)

    @classmethod
    def for_budget(
        cls,
        tokens: int,
        budget: str,
        shape: Shape,
        first: dict[str, Any],
        second: dict[str, Any],
        of: int | None = None,
    ) -> Chain:
        """Return the chain whose second method meets a budget.

        Args:
            tokens: what `second` leaves.
            first: the node of a method that has a budget of its own.
            second: the node of a method with the same budget as the chain.
            of: visual tokens of an image that the budget of `first` is meant for; of
                other images it is the same share.

        Raises:
            ValueError: for budgets of the two that do not fit each other.
        """
        if of is not None and "projector" in first:
            raise ValueError(
                f"of={of}: a projector is tuned for as many tokens as method.first.tokens says. Set of=null"
            )
        if of is not None and first.get("tokens"):
            # The same share of every crop, so that it can be divided over the crops.
            share = shape.published(first["tokens"], of * shape.crops)
            first = {**first, "tokens": shape.crops * share}
        if not 1 <= (first.get("tokens") or 0) <= shape.entering:
            raise ValueError(
                f"first.tokens={first.get('tokens')}: give method.first.tokens=, the visual tokens that the first one "
                f"leaves, from {tokens} to {shape.entering}"
            )
        if second.get("tokens") != tokens:
            raise ValueError(
                f"second.tokens={second.get('tokens')}: what the second one leaves is set by tokens="
            )
        vision_method = build(first, budget, shape)
        entering = vision_method.num_tokens(shape.picture)
        # With all tokens of an image as its budget a chain is the stock model.
        if entering <= tokens < shape.entering:
            raise ValueError(
                f"tokens={tokens}: the second one gets {entering} and removes nothing"
            )
        # Row ends are the first method's affair, and count among what enters.
        grids = tuple((crops, 0) for crops, _ in shape.grids)
        inside = replace(shape, entering=entering, grids=grids)
        return cls(vision_method, build(second, budget, inside))

    @contextmanager
    def applied(self, model) -> Iterator[Applied]:
        """Let both methods act on a model.

        The block is given what the second left of what the first left.

        Raises:
            ValueError, IncompatibleError: as the two methods do, and where the second would remove nothing.
        """
        largest = self._reduced_by_first(largest_picture(model))
        self.second.check_removes(largest)
        # In this order the second one's `generate` is around that of the first.
        with self.first.applied(model), self.second.applied(model) as applied:
            yield applied

    def tokens_per_layer(self, images: list[VisualInput], depth: int) -> list[int]:
        """Return the visual tokens that enter each layer, of a prompt with these images."""
        return self.second.tokens_per_layer(
            [*map(self._reduced_by_first, images)], depth
        )

    def _reduced_by_first(self, image: VisualInput) -> VisualInput:
        """Return an image with as many tokens as the first method leaves of it."""
        return replace(image, tokens=self.first.num_tokens(image))
