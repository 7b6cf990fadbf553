"""Random patches: the baseline that every selection has to beat."""

from __future__ import annotations

from dataclasses import dataclass
from zlib import crc32

from zipeval.engine.ragged import take
from zipeval.engine.vision import Crops, Reduced, VisionMethod
from zipeval.utils.lazy import torch


@dataclass(frozen=True)
class Random(VisionMethod):
    """Keep `tokens` random patches, in raster order.

    Args:
        tokens: visual tokens an image is left with.
        seed: of the choice. It depends on this and on the image alone, not on the batch or the order of the samples.
    """

    tokens: int
    seed: int = 0
    reads_pixels = True

    def reduce(self, crops: Crops) -> Reduced:
        patches = crops.hidden.shape[1] - crops.prefix
        chosen = [self._choose(image, patches) for image in crops.pixels.float()]
        # Chosen on the host, so that every device keeps the same patches.
        patches_kept = torch.stack(chosen).to(crops.hidden.device, non_blocking=True)
        positions = patches_kept + crops.prefix
        return Reduced(take(crops.hidden, positions), positions)

    def _choose(self, image: torch.Tensor, patches: int) -> torch.Tensor:
        """Return the numbers of the patches to keep of an image, ascending: (tokens)."""
        seed = crc32(image.numpy().tobytes(), self.seed)
        generator = torch.Generator().manual_seed(seed)
        return torch.randperm(patches, generator=generator)[: self.tokens].sort().values
