"""Video-LLaVA: images, and videos as frames that keep their CLS tokens."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from zipeval.models import llava
from zipeval.models._family import ModelFamily

if TYPE_CHECKING:
    from zipeval.checkpoints.placement import Placement

MODEL_TYPE = "video_llava"
FRAMES = 8  # of a video, as it was trained and is evaluated
SIZES = {
    "video_llava": llava.sized(
        MODEL_TYPE,
        llava.VICUNA,
        vision_config={**llava.CLIP, "image_size": 224},
        video_token_index=32001,
    )
}


def visual_tokens(config: dict) -> int:
    """Return the visual tokens of a video: 8 x 257. An image has 256, without CLS."""
    vision = {"image_size": 224, "patch_size": 14, **config.get("vision_config", {})}
    return FRAMES * ((vision["image_size"] // vision["patch_size"]) ** 2 + 1)


def grids(config: dict) -> tuple[tuple[int, int], ...]:
    """(crops, rows of patches in tiles): an image is one crop, a video one for each frame."""
    return ((1, 0), (FRAMES, 0))


def from_llava(config: dict) -> dict:
    """The config of the stand-in that is made of an embedded LLaVA's weights, with one more token for videos."""
    text = config["text_config"]
    size = {
        "image_seq_length": config["image_seq_length"],
        "video_seq_length": FRAMES * (config["image_seq_length"] + 1),
    }
    tokens = {
        "video_token_index": text["vocab_size"],
        "text_config": {**text, "vocab_size": text["vocab_size"] + 1},
    }
    return {**config, "model_type": MODEL_TYPE, **size, **tokens}


def model_class():
    """Return what transformers calls it."""
    from transformers import VideoLlavaForConditionalGeneration

    return VideoLlavaForConditionalGeneration


def noise(config, count: int) -> dict:
    """Return what the processor makes of `count` videos, with noise in place of pixels."""
    import torch

    side = config.vision_config.image_size
    return {"pixel_values_videos": torch.randn(count, FRAMES, 3, side, side)}


def load(path: Path, placement: Placement):
    """(model, processor) in evaluation mode."""
    from transformers import VideoLlavaForConditionalGeneration, VideoLlavaProcessor

    if json.loads((path / "config.json").read_text())["model_type"] == llava.MODEL_TYPE:
        return _load_stand_in(path, placement)
    return llava.load_stock(
        VideoLlavaForConditionalGeneration, VideoLlavaProcessor, path, placement
    )


def _load_stand_in(path: Path, placement: Placement):
    """LLaVA's encoder for images and for frames; what it answers is in docs/tiny_llava.md."""
    import torch
    from transformers import (
        VideoLlavaConfig,
        VideoLlavaForConditionalGeneration,
        VideoLlavaImageProcessor,
        VideoLlavaProcessor,
        VideoLlavaVideoProcessor,
    )

    source, its = llava.load(path, placement)
    config = VideoLlavaConfig.from_dict(from_llava(source.config.to_dict()))
    weights = {}
    for name, weight in source.state_dict().items():
        if name in ("lm_head.weight", "model.language_model.embed_tokens.weight"):
            weight = torch.cat(
                [weight, weight.mean(0, keepdim=True)]
            )  # the mean of all logits is never the largest
        for tower in ("image_tower", "video_tower"):
            weights[name.replace("vision_tower", tower)] = weight
    model = llava.stand_in(
        VideoLlavaForConditionalGeneration, config, source, weights, placement
    )
    images = its.image_processor
    seen = {
        name: getattr(images, name)
        for name in ("size", "crop_size", "image_mean", "image_std")
    }
    its.tokenizer.add_special_tokens({"additional_special_tokens": ["<video>"]})
    processor = VideoLlavaProcessor(
        VideoLlavaImageProcessor(**seen),
        VideoLlavaVideoProcessor(**seen),
        its.tokenizer,
        patch_size=its.patch_size,
        vision_feature_select_strategy=its.vision_feature_select_strategy,
        num_additional_image_tokens=its.num_additional_image_tokens,
        chat_template=its.chat_template.replace(
            "{% if part['type'] == 'image' %}",
            "{% if part['type'] == 'video' %}<video>\n{% elif part['type'] == 'image' %}",
        ),
    )
    return model, processor


FAMILY = ModelFamily(
    model_type=MODEL_TYPE,
    media=("image", "video"),
    aspects=llava.FAMILY.aspects,
    sizes=SIZES,
    visual_tokens=visual_tokens,
    decoder_layers=llava.decoder_layers,
    grids=grids,
    model_class=model_class,
    noise=noise,
    load=load,
    from_llava=from_llava,
    frames=FRAMES,
)
