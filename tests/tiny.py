"""Random LLaVA models, small enough to compare with anything: those of zipeval.contract, and what tests add."""

from __future__ import annotations

from pathlib import Path

from transformers import AutoTokenizer, CLIPImageProcessor, LlavaProcessor

from zipeval.contract.tiny_models import (
    FRAMES,
    GRIDS,
    IMAGE,
    PATCH,
    VIDEO,
    kinds_of,
    llava,
    llava_next,
    mini_gemini,
    parts,
    pictures_of,
    pixels_name,
    prompts,
    randomised,
    single,
    video_llava,
)
from zipeval.engine.vision import VisionMethod
from zipeval.models import EMBEDDED

__all__ = [
    "FRAMES",
    "GRIDS",
    "IMAGE",
    "PATCH",
    "VIDEO",
    "Watched",
    "kinds_of",
    "llava",
    "llava_next",
    "mini_gemini",
    "parts",
    "pictures_of",
    "pixels_name",
    "prompts",
    "randomised",
    "save_llava15",
    "single",
    "video_llava",
]


class Watched(VisionMethod):
    """A method that remembers what went in and out."""

    def __init__(self, method):
        self.method = method

    def left(self, patches):
        return self.method.left(patches)

    def reduce(self, crops):
        self.crops, self.reduced = crops, self.method.reduce(crops)
        return self.reduced


def save_llava15(path: Path, side: int = 24) -> Path:
    """A random checkpoint in the Hugging Face layout, by default with LLaVA-1.5's 576 patches of 336 px."""
    tokenizer = AutoTokenizer.from_pretrained(EMBEDDED / "tiny_llava")
    image_token = tokenizer.convert_tokens_to_ids("<image>")
    model = llava(side, vocabulary=len(tokenizer), image_token=image_token)
    model.generation_config.update(
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    model.save_pretrained(path)
    size = PATCH * side
    LlavaProcessor(
        image_processor=CLIPImageProcessor(
            size={"shortest_edge": size}, crop_size={"height": size, "width": size}
        ),
        tokenizer=tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=(EMBEDDED / "tiny_llava" / "chat_template.jinja").read_text(),
    ).save_pretrained(path)
    return path
