"""Two methods in order: VisionZip before the language model and SparseVLM inside it (Table 5 of VisionZip)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from zipeval.engine.budget import Picture, Shape
from zipeval.engine.decoder import DecoderMethod
from zipeval.engine.guard import Applied
from zipeval.engine.images import largest_picture
from zipeval.engine.vision import VisionMethod
from zipeval.methods import build


@dataclass(frozen=True)
class Chain:
    """`second` gets what `first` left.

    Args:
        first: a method between encoder and language model.
        second: a method inside the language model.
    """

    first: VisionMethod
    second: DecoderMethod

    def __post_init__(self):
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
        """`first` has a budget of its own; `tokens` is what `second` leaves.

        Args:
            of: visual tokens of an image that the budget of `first` is meant for, of others it is the same share.
        """
        if of is not None and "projector" in first:
            raise ValueError(
                f"of={of}: a projector is tuned for as many tokens as method.first.tokens says. Set of=null"
            )
        if of is not None and first.get("tokens"):
            first = {
                **first,
                "tokens": shape.crops
                * shape.published(first["tokens"], of * shape.crops),
            }
        if not 1 <= (first.get("tokens") or 0) <= shape.entering:
            raise ValueError(
                f"first.tokens={first.get('tokens')}: give method.first.tokens=, the visual tokens that the first one "
                f"leaves, from {tokens} to {shape.entering}"
            )
        if second.get("tokens") != tokens:
            raise ValueError(
                f"second.tokens={second.get('tokens')}: what the second one leaves is set by tokens="
            )
        before = build(first, budget, shape)
        left = before.left_of(shape.picture)
        if left <= tokens < shape.entering:
            raise ValueError(
                f"tokens={tokens}: the second one gets {left} and removes nothing"
            )
        behind = replace(
            shape, entering=left, grids=tuple((crops, 0) for crops, _ in shape.grids)
        )
        return cls(before, build(second, budget, behind))

    @contextmanager
    def applied(self, model) -> Iterator[Applied]:
        """While open, both act. The block is given what the second left of what the first left.

        Raises:
            ValueError, IncompatibleError: as the two methods do, and where the second would remove nothing.
        """
        largest = largest_picture(model)
        self.second.check_removes(replace(largest, tokens=self.first.left_of(largest)))
        with self.first.applied(model), self.second.applied(model) as applied:
            yield applied

    def entering(self, images: list[Picture], depth: int) -> list[int]:
        """Visual tokens that enter each of `depth` layers, of a prompt with these images."""
        return self.second.entering(
            [replace(image, tokens=self.first.left_of(image)) for image in images],
            depth,
        )
