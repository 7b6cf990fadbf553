"""No visual token at all: a model answers from the question alone."""

from __future__ import annotations

from dataclasses import dataclass

from zipeval.engine.vision import Crops, Reduced, VisionMethod


@dataclass(frozen=True)
class Blind(VisionMethod):
    """Remove the images' placeholders from the prompt."""

    tokens = 0

    def reduce(self, crops: Crops) -> Reduced:
        nothing = crops.hidden[:, :0]
        return Reduced(nothing, nothing.new_zeros(len(nothing), 0).long())
