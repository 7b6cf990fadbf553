"""Random LLaVA models, small enough to compare with anything."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import (
    CONFIG_MAPPING,
    AutoTokenizer,
    CLIPImageProcessor,
    CLIPVisionConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
)

from zipeval.models import EMBEDDED

IMAGE = 98
PATCH = 14


def llava(side=6, vocabulary=100, image_token=IMAGE, seed=0, layers=3, decoder="llama", gain=3.0):
    """LlavaForConditionalGeneration with side x side patches and weights far from uniform attention."""
    torch.manual_seed(seed)
    vision = CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        image_size=PATCH * side,
        patch_size=PATCH,
    )
    text = CONFIG_MAPPING[decoder](
        vocab_size=vocabulary,
        hidden_size=48,
        intermediate_size=96,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=None,
        **({"sliding_window": None} if decoder == "mistral" else {}),
    )
    config = LlavaConfig(
        vision_config=vision, text_config=text, image_token_id=image_token, image_seq_length=side * side
    )
    model = LlavaForConditionalGeneration(config).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim == 2 and "embed" not in name:
                weight.normal_(0, gain * weight.shape[1] ** -0.5)
    return model


def prompts(model, questions: list[list[int]], images: list[int], seed: int = 0) -> dict:
    """Left-padded inputs: row i is BOS, `images[i]` images with text between them, then `questions[i]`."""
    patches = model.config.image_seq_length
    rows = [[1, *([2] + [IMAGE] * patches) * n, *q] for q, n in zip(questions, images, strict=True)]
    width = max(map(len, rows))
    ids = torch.tensor([[0] * (width - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    side = model.config.vision_config.image_size
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randn(sum(images), 3, side, side, generator=generator)
    return {"input_ids": ids, "attention_mask": mask, "pixel_values": pixels}


def save_llava15(path: Path, side: int = 24) -> Path:
    """A random checkpoint in the Hugging Face layout, by default with LLaVA-1.5's 576 patches of 336 px."""
    tokenizer = AutoTokenizer.from_pretrained(EMBEDDED / "tiny_llava")
    image_token = tokenizer.convert_tokens_to_ids("<image>")
    model = llava(side, len(tokenizer), image_token)
    model.generation_config.update(eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    model.save_pretrained(path)
    size = PATCH * side
    LlavaProcessor(
        image_processor=CLIPImageProcessor(size={"shortest_edge": size}, crop_size={"height": size, "width": size}),
        tokenizer=tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=(EMBEDDED / "tiny_llava" / "chat_template.jinja").read_text(),
    ).save_pretrained(path)
    return path
