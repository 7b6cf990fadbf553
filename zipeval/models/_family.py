"""The declaration of a model family: what zipeval asks a family, and what a new one has to answer."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from zipeval.checkpoints.placement import Placement

# A checkpoint's config.json.
Settings = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class ModelFamily:
    """A family of models; a module of `zipeval.models` declares one as `FAMILY`.

    Everything but `model_class`, `noise` and `load` is answered without torch, so that a
    plan or a refusal takes no seconds.

    Attributes:
        model_type: of its checkpoints, as their config.json says.
        media: kinds of visual input that a prompt may have: image, video.
        aspects: values of `model.image_aspect` that fit it, the default first.
        sizes: config.json of models whose weights may not be here, by name.
        visual_tokens: returns the visual tokens of the largest picture.
        decoder_layers: returns the number of decoder layers.
        grids: returns (crops, rows of patches in the tiles) of each picture, ascending.
        model_class: imports and returns the class of transformers.
        noise: returns random inputs of the vision encoder, for a number of pictures.
        load: returns (model, processor) of a checkpoint.
        from_llava: returns the config.json of the stand-in that `load` makes of a small
            LLaVA; None: the family has no stand-in.
        no_weights: says what to do where a model names no weights.
        frames: of a video; None: it takes no videos.
    """

    model_type: str
    media: tuple[str, ...]
    aspects: tuple[str, ...]
    sizes: Mapping[str, Settings]
    visual_tokens: Callable[[Settings], int]
    decoder_layers: Callable[[Settings], int]
    grids: Callable[[Settings], tuple[tuple[int, int], ...]]
    model_class: Callable[[], type]
    noise: Callable[[Any, int], dict]
    load: Callable[[Path, Placement], tuple]
    from_llava: Callable[[Settings], Settings] | None = None
    no_weights: str = "Set model.hub=ORGANISATION/NAME or model.path=DIR."
    frames: int | None = None
