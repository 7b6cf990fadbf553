"""LLaVA-NeXT (LLaVA-1.6): an image is seen whole and in tiles."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from zipeval.models import llava
from zipeval.models._family import ModelFamily

if TYPE_CHECKING:
    from zipeval.checkpoints.placement import Placement

MODEL_TYPE = "llava_next"
PINPOINTS = [
    [336, 672],
    [672, 336],
    [672, 672],
    [1008, 336],
    [336, 1008],
]  # transformers' default
MISTRAL = llava.VICUNA | {
    "model_type": "mistral",
    "intermediate_size": 14336,
    "num_key_value_heads": 8,
    "max_position_embeddings": 32768,
    "sliding_window": None,
}
SIZES = {
    "llava_next": llava.sized(MODEL_TYPE, llava.VICUNA),
    "llava_next_13b": llava.sized(MODEL_TYPE, llava.VICUNA_13B),
    "llava_next_mistral": llava.sized(MODEL_TYPE, MISTRAL),
}


def grids(config: dict) -> tuple[tuple[int, int], ...]:
    """(crops, rows of patches in its tiles) that an image can have: it is seen whole and in the tiles of a grid."""
    vision = {"image_size": 336, "patch_size": 14, **config.get("vision_config", {})}
    side, pinpoints = (
        vision["image_size"],
        config.get("image_grid_pinpoints", PINPOINTS),
    )
    shapes = {
        (1 + (high // side) * (wide // side), high // vision["patch_size"])
        for high, wide in pinpoints
    }
    return tuple(sorted(shapes))


def visual_tokens(config: dict) -> int:
    """Return the visual tokens of all crops, as papers count.

    They count neither row ends nor what is cut off where a tile is padded.
    """
    return grids(config)[-1][0] * llava.visual_tokens(config)


def from_llava(config: dict) -> dict:
    """The config of the stand-in that is made of an embedded LLaVA's weights: the same grids in its crops."""
    side = config["vision_config"]["image_size"]
    pinpoints = [
        [height // 336 * side, width // 336 * side] for height, width in PINPOINTS
    ]
    return {**config, "model_type": MODEL_TYPE, "image_grid_pinpoints": pinpoints}


def model_class():
    """Return what transformers calls it."""
    from transformers import LlavaNextForConditionalGeneration

    return LlavaNextForConditionalGeneration


def noise(config, count: int) -> dict:
    """Return what the processor makes of `count` images that fill the largest grid, with noise in place of pixels."""
    import torch

    side = config.vision_config.image_size
    high, wide = max(config.image_grid_pinpoints, key=lambda size: size[0] * size[1])
    crops = 1 + (high // side) * (wide // side)
    return {
        "pixel_values": torch.randn(count, crops, 3, side, side),
        "image_sizes": torch.tensor([[high, wide]] * count),
    }


def load(path: Path, placement: Placement):
    """(model, processor) in evaluation mode."""
    from transformers import LlavaNextForConditionalGeneration, LlavaNextProcessor

    if json.loads((path / "config.json").read_text())["model_type"] == llava.MODEL_TYPE:
        return _load_stand_in(path, placement)
    return llava.load_stock(
        LlavaNextForConditionalGeneration, LlavaNextProcessor, path, placement
    )


def _load_stand_in(path: Path, placement: Placement):
    """LLaVA's weights and a row end of zeros; what it answers is in docs/tiny_llava.md."""
    import torch
    from transformers import (
        LlavaNextConfig,
        LlavaNextForConditionalGeneration,
        LlavaNextImageProcessor,
    )
    from transformers import LlavaNextProcessor as Processor

    source, its = llava.load(path, placement)
    config = LlavaNextConfig.from_dict(from_llava(source.config.to_dict()))
    row_end = torch.zeros(config.text_config.hidden_size)
    weights = {**source.state_dict(), "model.image_newline": row_end}
    model = llava.stand_in(
        LlavaNextForConditionalGeneration, config, source, weights, placement
    )
    images = its.image_processor
    processor = Processor(
        LlavaNextImageProcessor(
            size=images.size,
            crop_size=images.crop_size,
            image_mean=images.image_mean,
            image_std=images.image_std,
            image_grid_pinpoints=config.image_grid_pinpoints,
        ),
        its.tokenizer,
        patch_size=its.patch_size,
        vision_feature_select_strategy=its.vision_feature_select_strategy,
        num_additional_image_tokens=its.num_additional_image_tokens,
        chat_template=its.chat_template,
    )
    return model, processor


FAMILY = ModelFamily(
    model_type=MODEL_TYPE,
    media=llava.FAMILY.media,
    aspects=("anyres",),
    sizes=SIZES,
    visual_tokens=visual_tokens,
    decoder_layers=llava.decoder_layers,
    grids=grids,
    model_class=model_class,
    noise=noise,
    load=load,
    from_llava=from_llava,
)
