"""LLaVA-1.5 and everything else that transformers loads as `LlavaForConditionalGeneration`."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING

from zipeval.errors import UsageError
from zipeval.models._family import ModelFamily

if TYPE_CHECKING:
    from zipeval.checkpoints.placement import Placement

MODEL_TYPE = "llava"
# The parts of models whose weights may not be here, as their config.json describe them.
CLIP = {
    "model_type": "clip_vision_model",
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 336,
    "patch_size": 14,
}
VICUNA = {
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "vocab_size": 32064,
    "max_position_embeddings": 4096,
}
VICUNA_13B = VICUNA | {
    "hidden_size": 5120,
    "intermediate_size": 13824,
    "num_hidden_layers": 40,
    "num_attention_heads": 40,
    "num_key_value_heads": 40,
}


def sized(model_type: str, text: dict, **others) -> dict:
    """A config.json of these parts; `others` come on top."""
    return {
        "model_type": model_type,
        "vision_config": CLIP,
        "text_config": text,
        "image_token_index": 32000,
        **others,
    }


SIZES = {
    "llava15": sized(MODEL_TYPE, VICUNA),
    "llava15_13b": sized(MODEL_TYPE, VICUNA_13B),
}


def visual_tokens(config: dict) -> int:
    """Visual tokens of one image, from the checkpoint's config.json."""
    vision = {"image_size": 336, "patch_size": 14, **config.get("vision_config", {})}
    patches = (vision["image_size"] // vision["patch_size"]) ** 2
    with_cls = vision.get("model_type", "clip_vision_model").startswith("clip")
    return patches + (
        with_cls and config.get("vision_feature_select_strategy") == "full"
    )


def decoder_layers(config: dict) -> int:
    """Layers of the language model, from the checkpoint's config.json; 32 is Llama's default."""
    return config.get("text_config", {}).get("num_hidden_layers", 32)


def grids(config: dict) -> tuple[tuple[int, int], ...]:
    """(crops, rows of patches in its tiles) that an image can have: the encoder sees it once."""
    return ((1, 0),)


def model_class():
    """Return what transformers calls it."""
    from transformers import LlavaForConditionalGeneration

    return LlavaForConditionalGeneration


def noise(config, count: int) -> dict:
    """Return what the processor makes of `count` pictures of the largest size, with noise in place of pixels."""
    import torch

    side = getattr(
        config, "image_size_aux", config.vision_config.image_size
    )  # Mini-Gemini's are larger
    return {"pixel_values": torch.randn(count, 3, side, side)}


def load(path: Path, placement: Placement):
    """(model, processor) in evaluation mode."""
    from transformers import LlavaForConditionalGeneration, LlavaProcessor

    return load_stock(LlavaForConditionalGeneration, LlavaProcessor, path, placement)


def load_stock(model_class, processor_class, path: Path, placement: Placement):
    """(model, processor) of stock classes in evaluation mode.

    Raises:
        UsageError: if weights are missing or have other shapes; transformers would fill them with noise.
    """
    import torch

    try:
        model, report = model_class.from_pretrained(
            path,
            dtype=getattr(torch, placement.dtype),
            attn_implementation=placement.attn_implementation,
            quantization_config=_quantization(placement),
            device_map=placement.device_map or {"": placement.device},
            output_loading_info=True,
            local_files_only=True,
        )
        processor = processor_class.from_pretrained(path, local_files_only=True)
    except (ImportError, OSError, ValueError, TypeError, KeyError) as error:
        reason = str(error).split("\n")[0]
        raise UsageError(
            f"{path}: transformers cannot load it ({reason}). Fetch the checkpoint again."
        ) from error
    for problem in ("missing_keys", "mismatched_keys"):
        if report[problem]:
            names = ", ".join(sorted(map(str, report[problem]))[:3])
            count = len(report[problem])
            what = problem.removesuffix("_keys")
            raise UsageError(
                f"{path}: {count} tensors are {what} ({names} ...). Fetch the checkpoint again."
            )
    processor.tokenizer.padding_side = "left"
    return model.eval(), processor


def stand_in(model_class, config, source, weights: dict, placement: Placement):
    """A model of another family in evaluation mode: `weights` of an embedded LLaVA, `source`, and the rest as made."""
    config._attn_implementation = placement.attn_implementation
    model = model_class(config).to(source.device, source.dtype)
    model.load_state_dict({**model.state_dict(), **weights})
    model.generation_config = source.generation_config
    return model.eval()


def _quantization(placement: Placement):
    """transformers' BitsAndBytesConfig for the language model alone: methods read what the encoder attends to."""
    import torch
    from transformers import BitsAndBytesConfig

    if placement.quantization == "none":
        return None
    # At every call of a layer it would say that 8-bit products are computed in float16.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    return BitsAndBytesConfig(
        load_in_8bit=placement.quantization == "8bit",
        load_in_4bit=placement.quantization == "4bit",
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=getattr(torch, placement.dtype),
        llm_int8_skip_modules=[
            r"(?!model\.language_model\.).*"
        ],  # for both widths; matched from a name's start
    )


FAMILY = ModelFamily(
    model_type=MODEL_TYPE,
    media=("image",),
    aspects=("pad", "crop"),
    sizes=SIZES,
    visual_tokens=visual_tokens,
    decoder_layers=decoder_layers,
    grids=grids,
    model_class=model_class,
    noise=noise,
    load=load,
)
