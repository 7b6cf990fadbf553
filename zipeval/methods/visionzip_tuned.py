"""VisionZip‡ (section 2.4): VisionZip with a projector that has learnt to use its few tokens.

`zipeval tune` trains the projector. All other weights, and the tokens that are chosen, are those of VisionZip.
"""

from __future__ import annotations

from dataclasses import dataclass

from zipeval.checkpoints import projector
from zipeval.engine import hf_names
from zipeval.methods.visionzip import VisionZip
from zipeval.utils.lazy import torch


@dataclass(frozen=True)
class VisionZipTuned(VisionZip):
    """Use tuned weights in place of the projector's own, which the model keeps.

    Args:
        tokens, dominant, contextual: as of VisionZip, and as it was tuned for; `zipeval run` sees to that.
        projector: the file that `zipeval tune` wrote; a process reads it once.
    """

    projector: str | None = None

    def project(self, model, features: torch.Tensor) -> torch.Tensor:
        stock = hf_names.projector(model)
        parameter = next(stock.parameters())
        weights = projector.weights(self.projector, parameter.device, parameter.dtype)
        # A call with other weights: the model itself stays as it is.
        return torch.func.functional_call(stock, weights, (features,), strict=True)
