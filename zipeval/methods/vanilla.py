"""The model as it is: the upper bound that every percentage refers to."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

from zipeval.engine.budget import Picture


@dataclass(frozen=True)
class Vanilla:
    """All visual tokens stay."""

    def applied(self, model) -> AbstractContextManager:
        return nullcontext()

    def entering(self, images: list[Picture], depth: int) -> list[int]:
        """All of them, in every layer."""
        return [sum(image.tokens for image in images)] * depth
