"""Mini-Gemini (MGM) and its HD variant: LLaVA whose visual tokens attend to a ConvNeXt's features of their patch.

transformers lacks it: zipeval/models/_mini_gemini.py is the architecture. The official checkpoints are not in the
Hugging Face layout: zipeval/convert.py brings them there.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from zipeval.models import llava

if TYPE_CHECKING:
    from zipeval.placement import Placement

MODEL_TYPE = "mini_gemini"
MEDIA, ASPECTS = llava.MEDIA, llava.ASPECTS
NO_WEIGHTS = "Make them of the official checkpoint with `zipeval convert mini_gemini SRC DST`, then set model.path=DST."

decoder_layers = llava.decoder_layers


def grids(config: dict) -> tuple[tuple[int, int], ...]:
    """(crops, rows of patches in tiles) of every image: it is seen whole, in the HD variant in tiles too."""
    grid = config.get("image_grid", 1)
    return ((1 if grid == 1 else 1 + grid**2, 0),)


def visual_tokens(config: dict) -> int:
    """Of all crops."""
    return grids(config)[-1][0] * llava.visual_tokens(config)


def placeholders(config: dict) -> dict:
    """LlavaProcessor's settings that make its arithmetic come to `visual_tokens`: a token for every patch of the tiles
    put together, and in the HD variant more for the whole image. One more is CLS, which it takes away again.
    """
    patches = llava.visual_tokens(config)
    tiles = config["image_grid"] ** 2
    across = config["image_grid"] * config["vision_config"]["image_size"] // config["vision_config"]["patch_size"]
    return {
        "patch_size": config["image_size_aux"] // across,
        "num_additional_image_tokens": visual_tokens(config) - tiles * patches + 1,
        "vision_feature_select_strategy": "default",
    }


def of_llava(config: dict) -> dict:
    """The config of the stand-in that is made of an embedded LLaVA's weights: twice the resolution, a tiny ConvNeXt."""
    aux = {"model_type": "convnext", "depths": [1, 1, 1, 1], "hidden_sizes": [8, 16, 16, 32]}
    size = 2 * config["vision_config"]["image_size"]
    return {**config, "model_type": MODEL_TYPE, "aux_config": aux, "image_size_aux": size, "image_grid": 1}


def load(path: Path, placement: Placement):
    """(model, processor) in evaluation mode."""
    from transformers import LlavaProcessor

    from zipeval.models._mini_gemini import MiniGeminiForConditionalGeneration

    if json.loads((path / "config.json").read_text())["model_type"] == llava.MODEL_TYPE:
        return _load_stand_in(path, placement)
    return llava.load_stock(MiniGeminiForConditionalGeneration, LlavaProcessor, path, placement)


def _load_stand_in(path: Path, placement: Placement):
    """LLaVA's weights, and a mining of random features that adds zero; what it answers is in docs/tiny_llava.md."""
    import torch
    from transformers import CLIPImageProcessor, LlavaProcessor

    from zipeval.models._mini_gemini import MiniGeminiConfig, MiniGeminiForConditionalGeneration

    source, its = llava.load(path, placement)
    settings = of_llava(source.config.to_dict())
    config = MiniGeminiConfig.from_dict(settings)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = llava.stand_in(MiniGeminiForConditionalGeneration, config, source, source.state_dict(), placement)
    for nothing in model.model.patch_info_mining.value[1].parameters():
        torch.nn.init.zeros_(nothing)
    images, size = its.image_processor, config.image_size_aux
    processor = LlavaProcessor(
        CLIPImageProcessor(
            size={"shortest_edge": size},
            crop_size={"height": size, "width": size},
            image_mean=images.image_mean,
            image_std=images.image_std,
        ),
        its.tokenizer,
        chat_template=its.chat_template,
        **placeholders(settings),
    )
    return model, processor
