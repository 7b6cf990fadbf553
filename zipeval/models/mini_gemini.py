"""Mini-Gemini (MGM) and its HD variant: LLaVA whose visual tokens attend to a ConvNeXt's features of their patch.

transformers lacks it: zipeval/models/_mini_gemini.py is the architecture. The official checkpoints are not in the
Hugging Face layout: zipeval/models/_convert.py brings them there.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from zipeval.models import llava
from zipeval.models._family import ModelFamily

if TYPE_CHECKING:
    from zipeval.checkpoints.placement import Placement

MODEL_TYPE = "mini_gemini"
CONVNEXT = {
    "model_type": "convnext",
    "depths": [3, 3, 27, 3],
    "hidden_sizes": [192, 384, 768, 1536],
}
VICUNA, VICUNA_13B = (
    {**text, "vocab_size": 32001} for text in (llava.VICUNA, llava.VICUNA_13B)
)
GEMMA = {
    "model_type": "gemma",
    "hidden_size": 2048,
    "intermediate_size": 16384,
    "num_hidden_layers": 18,
    "num_attention_heads": 8,
    "num_key_value_heads": 1,
    "head_dim": 256,
    "vocab_size": 256001,
    "max_position_embeddings": 8192,
}
SIZES = {
    "mini_gemini": llava.sized(
        MODEL_TYPE, VICUNA, aux_config=CONVNEXT, image_size_aux=768
    ),
    "mini_gemini_13b": llava.sized(
        MODEL_TYPE, VICUNA_13B, aux_config=CONVNEXT, image_size_aux=768
    ),
    "mini_gemini_hd": llava.sized(
        MODEL_TYPE, VICUNA, aux_config=CONVNEXT, image_size_aux=1536, image_grid=2
    ),
    "mini_gemini_2b": llava.sized(
        MODEL_TYPE,
        GEMMA,
        aux_config=CONVNEXT,
        image_size_aux=768,
        image_token_index=256000,
        tie_word_embeddings=True,
    ),
}


def grids(config: dict) -> tuple[tuple[int, int], ...]:
    """(crops, rows of patches in tiles) of every image: it is seen whole, in the HD variant in tiles too."""
    grid = config.get("image_grid", 1)
    return ((1 if grid == 1 else 1 + grid**2, 0),)


def visual_tokens(config: dict) -> int:
    """Return the visual tokens of all crops."""
    return grids(config)[-1][0] * llava.visual_tokens(config)


def placeholders(config: dict) -> dict:
    """LlavaProcessor's settings that make its arithmetic come to `visual_tokens`: a token for every patch of the tiles
    put together, and in the HD variant more for the whole image. One more is CLS, which it takes away again.
    """
    patches = llava.visual_tokens(config)
    tiles = config["image_grid"] ** 2
    across = (
        config["image_grid"]
        * config["vision_config"]["image_size"]
        // config["vision_config"]["patch_size"]
    )
    return {
        "patch_size": config["image_size_aux"] // across,
        "num_additional_image_tokens": visual_tokens(config) - tiles * patches + 1,
        "vision_feature_select_strategy": "default",
    }


def from_llava(config: dict) -> dict:
    """The config of the stand-in that is made of an embedded LLaVA's weights: twice the resolution, a tiny ConvNeXt."""
    aux = {
        "model_type": "convnext",
        "depths": [1, 1, 1, 1],
        "hidden_sizes": [8, 16, 16, 32],
    }
    size = 2 * config["vision_config"]["image_size"]
    return {
        **config,
        "model_type": MODEL_TYPE,
        "aux_config": aux,
        "image_size_aux": size,
        "image_grid": 1,
    }


def model_class():
    """Ours: see zipeval/models/_mini_gemini.py."""
    from zipeval.models._mini_gemini import MiniGeminiForConditionalGeneration

    return MiniGeminiForConditionalGeneration


def load(path: Path, placement: Placement):
    """(model, processor) in evaluation mode."""
    from transformers import LlavaProcessor

    from zipeval.models._mini_gemini import MiniGeminiForConditionalGeneration

    if json.loads((path / "config.json").read_text())["model_type"] == llava.MODEL_TYPE:
        return _load_stand_in(path, placement)
    return llava.load_stock(
        MiniGeminiForConditionalGeneration, LlavaProcessor, path, placement
    )


def _load_stand_in(path: Path, placement: Placement):
    """LLaVA's weights, and a mining of random features that adds zero; what it answers is in docs/tiny_llava.md."""
    import torch
    from transformers import CLIPImageProcessor, LlavaProcessor

    from zipeval.models._mini_gemini import (
        MiniGeminiConfig,
        MiniGeminiForConditionalGeneration,
    )

    source, its = llava.load(path, placement)
    settings = from_llava(source.config.to_dict())
    config = MiniGeminiConfig.from_dict(settings)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = llava.stand_in(
            MiniGeminiForConditionalGeneration,
            config,
            source,
            source.state_dict(),
            placement,
        )
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


FAMILY = ModelFamily(
    model_type=MODEL_TYPE,
    media=llava.FAMILY.media,
    aspects=llava.FAMILY.aspects,
    sizes=SIZES,
    visual_tokens=visual_tokens,
    decoder_layers=llava.decoder_layers,
    grids=grids,
    model_class=model_class,
    noise=llava.noise,
    load=load,
    from_llava=from_llava,
    no_weights="Make them of the official checkpoint with `zipeval convert mini_gemini SRC DST`, then set model.path=DST.",
)
