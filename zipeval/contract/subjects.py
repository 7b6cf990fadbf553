"""The models that a method is checked on: a random one of each family, and the embedded one."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import cache, partial

import torch

from zipeval.contract.tiny_models import (
    FRAMES,
    llava,
    llava_next,
    mini_gemini,
    prompts,
    video_llava,
)
from zipeval.engine.budget import Shape

SIDE, LAYERS = 6, 6
# Token ids, of different lengths, so that two prompts are padded.
QUESTIONS = [[5, 9, 11], [7, 8, 21, 30, 31, 40, 12], [50, 51]]
# Pictures of each prompt.
IMAGES = [1, 2, 1]


@dataclass(frozen=True)
class Subject:
    """A model that methods are checked on.

    Attributes:
        name: of its family, or of the embedded model.
        build: makes the model in float32.
        shape: what a budget is spent on.
    """

    name: str
    build: Callable[[], torch.nn.Module]
    shape: Shape

    @property
    def third(self) -> int:
        """Return a third of the visual tokens of an image, in a number that is a grid, as pooling needs it."""
        return self.shape.image // 36 * 12

    def model(self, dtype: torch.dtype = torch.double) -> torch.nn.Module:
        """Return the model. In float64 a choice that hangs on rounding is nobody's error."""
        return _model(self, dtype)

    def prompts(self, dtype: torch.dtype = torch.double) -> dict[str, torch.Tensor]:
        """Return three left-padded prompts with one or two pictures each."""
        batch = prompts(self.model(dtype), QUESTIONS, IMAGES)
        for name in batch:
            # Ids and masks stay integers.
            if name.startswith("pixel"):
                batch[name] = batch[name].to(dtype)
        return batch


@cache
def _model(subject: Subject, dtype: torch.dtype) -> torch.nn.Module:
    return subject.build().to(dtype)


def _embedded() -> torch.nn.Module:
    """Return a copy of the embedded model, as others use the one that is loaded."""
    from zipeval import models
    from zipeval.checkpoints.placement import place
    from zipeval.config.compose import compose

    config = compose(["model=tiny_llava"]).model
    placement = place(replace(config, device="cpu", dtype="float32"))
    model, _ = models.load(config.family, models.find(config), placement)
    return deepcopy(model)


def _random(build: Callable, **options) -> Callable[[], torch.nn.Module]:
    return partial(build, side=SIDE, layers=LAYERS, gain=1.0, **options)


# 6 x 6 patches; the shapes below have several such crops, of which Video-LLaVA's keep CLS.
ONE_CROP = Shape(36, 36, LAYERS)
SUBJECTS = (
    Subject("llava", _random(llava), ONE_CROP),
    Subject(
        "llava_next",
        _random(llava_next),
        Shape(180, 180, LAYERS, grids=((3, 0), (4, 0), (5, 0))),
    ),
    Subject("mini_gemini", _random(mini_gemini), ONE_CROP),
    Subject(
        "mini_gemini_hd",
        _random(mini_gemini, grid=2),
        Shape(180, 180, LAYERS, grids=((5, 0),)),
    ),
    Subject(
        "video_llava",
        _random(video_llava),
        Shape(FRAMES * 37, FRAMES * 37, LAYERS, grids=((1, 0), (FRAMES, 0))),
    ),
    Subject("tiny_llava", _embedded, Shape(144, 144, LAYERS)),
)
