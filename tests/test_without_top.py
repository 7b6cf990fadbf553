"""What is left where VisionZip's dominant tokens are not."""

from __future__ import annotations

import pytest
import torch
from tiny import Watched, llava, prompts

from zipeval.methods.visionzip import VisionZip
from zipeval.methods.without_top import WithoutTop


@pytest.mark.parametrize("encoder", ["clip_vision_model", "siglip_vision_model"])
@pytest.mark.parametrize("top", [1, 7, 30])
def test_it_and_the_dominant_tokens_are_all_patches(encoder, top):
    """By the same score, so that the experiment takes away exactly what VisionZip would choose first."""
    model, prefix = llava(encoder=encoder), int(encoder.startswith("clip"))
    rest, dominant = (
        Watched(WithoutTop(tokens=36 - top)),
        Watched(VisionZip(dominant=top + prefix, contextual=0)),
    )
    for method in (rest, dominant):
        with torch.no_grad(), method.applied(model):
            model(**prompts(model, [[5, 6], [7]], [1, 1]))
    for left, taken in zip(
        rest.reduced.kept.tolist(), dominant.reduced.kept.tolist(), strict=True
    ):
        assert (len(left), left) == (36 - top, sorted(left))
        assert sorted(left + taken) == [*range(36 + prefix)]
