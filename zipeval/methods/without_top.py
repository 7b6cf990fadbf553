"""Remove the tokens that the encoder rates highest: shows what they are good for (Table 5 of VisionZip)."""

from __future__ import annotations

from dataclasses import dataclass

from zipeval.engine.ragged import take
from zipeval.engine.vision import Crops, Reduced, VisionMethod


@dataclass(frozen=True)
class WithoutTop(VisionMethod):
    """Keep the `tokens` patches with the least attention, in raster order.

    These are all but those that would be dominant in VisionZip.

    Args:
        tokens: visual tokens an image is left with. CLS, which the model itself leaves out, is not among them.
    """

    tokens: int

    def reduce(self, crops: Crops) -> Reduced:
        # Summed over heads, as VisionZip scores them.
        score = crops.attention().sum(1)
        lowest = score.topk(self.tokens, largest=False).indices
        positions = lowest.sort().values + crops.prefix
        return Reduced(take(crops.hidden, positions), positions)
