"""The model as it is: the upper bound that every percentage refers to."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

from zipeval.engine.budget import VisualInput
from zipeval.engine.method import Method, Stages


@dataclass(frozen=True)
class Vanilla(Method):
    """Keep all visual tokens."""

    @property
    def reduction_stages(self) -> Stages:
        """Return no stage: nothing leaves anywhere."""
        return Stages()

    def applied(self, model) -> AbstractContextManager:
        return nullcontext()

    def tokens_per_layer(self, images: list[VisualInput], depth: int) -> list[int]:
        """Return the number of all visual tokens, for every layer."""
        return [sum(image.tokens for image in images)] * depth
