"""Random models of each family, small enough to compare with anything."""

from __future__ import annotations

import inspect
import itertools

import torch
from transformers import (
    CONFIG_MAPPING,
    ConvNextConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    VideoLlavaConfig,
    VideoLlavaForConditionalGeneration,
)

from zipeval.engine.budget import VisualInput
from zipeval.engine.images import PIXELS, pictures
from zipeval.models._mini_gemini import (
    MiniGeminiConfig,
    MiniGeminiForConditionalGeneration,
)

IMAGE, VIDEO = 98, 97
FRAMES = 3
PATCH = 14
GRIDS = [(1, 2), (2, 2), (2, 1), (1, 3), (3, 1)]  # rows x columns of tiles


def llava(side=6, layers=3, decoder="llama", gain=3.0, **options):
    """LlavaForConditionalGeneration with side x side patches and weights far from uniform attention."""
    config = LlavaConfig(
        **parts(side, layers, decoder, **options), image_seq_length=side * side
    )
    return randomised(LlavaForConditionalGeneration, config, gain)


def llava_next(side=6, layers=3, decoder="llama", gain=3.0, **options):
    """LlavaNextForConditionalGeneration, likewise; tiles of PATCH x side pixels."""
    pinpoints = [
        [PATCH * side * rows, PATCH * side * columns] for rows, columns in GRIDS
    ]
    config = LlavaNextConfig(
        **parts(side, layers, decoder, **options), image_grid_pinpoints=pinpoints
    )
    return randomised(LlavaNextForConditionalGeneration, config, gain)


def mini_gemini(side=6, layers=3, decoder="llama", gain=3.0, grid=1, **options):
    """MiniGeminiForConditionalGeneration, likewise; with grid=2 the HD variant. 4 x 4 ConvNeXt features to a patch."""
    aux = ConvNextConfig(
        depths=[1, 2, 1, 1], hidden_sizes=[8, 8, 16, 24], layer_scale_init_value=1.0
    )
    config = MiniGeminiConfig(
        **parts(side, layers, decoder, **options),
        aux_config=aux,
        image_size_aux=16 * side * grid,
        image_grid=grid,
    )
    return randomised(MiniGeminiForConditionalGeneration, config, gain)


def video_llava(side=6, layers=3, decoder="llama", gain=3.0, **options):
    """VideoLlavaForConditionalGeneration, likewise."""
    config = VideoLlavaConfig(
        **parts(side, layers, decoder, **options), video_token_id=VIDEO
    )
    return randomised(VideoLlavaForConditionalGeneration, config, gain)


def parts(
    side,
    layers,
    decoder,
    vocabulary=100,
    image_token=IMAGE,
    encoder="clip_vision_model",
):
    """Configurations of the parts, as keyword arguments."""
    vision = CONFIG_MAPPING[encoder](
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
        **{"mistral": {"sliding_window": None}, "gemma": {"head_dim": 12}}.get(
            decoder, {}
        ),
    )
    strategy = (
        "default" if encoder.startswith("clip") else "full"
    )  # only where there is a CLS token to leave out
    return {
        "vision_config": vision,
        "text_config": text,
        "image_token_id": image_token,
        "vision_feature_select_strategy": strategy,
    }


def randomised(model_class, config, gain, seed=0):
    torch.manual_seed(seed)
    model = model_class(config).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim == 2 and "embed" not in name:
                weight.normal_(0, gain * weight.shape[1] ** -0.5)
    return model


def kinds_of(model, images: list[int]) -> list[list[str]]:
    """What `prompts` makes of `images[i]` pictures in row i: images; where the model takes videos, every other."""
    videos = hasattr(model.config, "video_token_id")
    kinds = iter(
        [
            ("video", "image")[number % 2] if videos else "image"
            for number in range(sum(images))
        ]
    )
    return [[next(kinds) for _ in range(count)] for count in images]


def pictures_of(model, inputs: dict, images: list[int]) -> list[list[VisualInput]]:
    """The pictures of every row."""
    remaining = {kind: iter(pictures(model, inputs, kind)) for kind in PIXELS}
    return [[next(remaining[kind]) for kind in row] for row in kinds_of(model, images)]


def single(model, inputs: dict, images: list[int], row: int) -> dict:
    """One row of `prompts`, without its padding."""
    length, kinds = int(inputs["attention_mask"][row].sum()), kinds_of(model, images)
    one = {
        name: inputs[name][row : row + 1, -length:]
        for name in ("input_ids", "attention_mask")
    }
    for name in inputs.keys() - one.keys():
        kind = "video" if name in PIXELS["video"] else "image"
        first = sum(before.count(kind) for before in kinds[:row])
        if count := kinds[row].count(kind):
            one[name] = inputs[name][first : first + count]
    return one


def pixels_name(model, kind: str) -> str:
    """What the installed transformers calls them: 5.23 renamed Video-LLaVA's images."""
    taken = inspect.signature(type(model).forward).parameters
    return next(name for name in PIXELS[kind] if name in taken)


def prompts(
    model, questions: list[list[int]], images: list[int], seed: int = 0
) -> dict:
    """Left-padded inputs: row i is BOS, `images[i]` images with text between them, then `questions[i]`.

    For LLaVA-NeXT the images are of every grid in turn, some of them padded; for Video-LLaVA every other is a video.
    """
    kinds = kinds_of(model, images)
    side = model.config.vision_config.image_size
    generator = torch.Generator().manual_seed(seed)
    if model.config.model_type == "llava_next":
        grids = [GRIDS[i % len(GRIDS)] for i in range(sum(images))]
        sizes = torch.tensor(
            [
                [side * rows - 20 * (i % 2), side * columns]
                for i, (rows, columns) in enumerate(grids)
            ]
        )
        most = max(1 + rows * columns for rows, columns in grids)
        pixels = torch.randn(sum(images), most, 3, side, side, generator=generator)
        inputs = {"pixel_values": pixels, "image_sizes": sizes}
    else:
        side = getattr(model.config, "image_size_aux", side)
        inputs = {
            pixels_name(model, kind): torch.randn(
                count, *frames, 3, side, side, generator=generator
            )
            for kind, frames in (("image", ()), ("video", (FRAMES,)))
            if (count := sum(row.count(kind) for row in kinds))
        }
    placeholders = {
        "image": model.config.image_token_id,
        "video": getattr(model.config, "video_token_id", None),
    }
    rows = []
    for question, row, its in zip(
        questions, kinds, pictures_of(model, inputs, images), strict=True
    ):
        media = (
            [2] + [placeholders[kind]] * picture.tokens
            for kind, picture in zip(row, its, strict=True)
        )
        rows.append([1, *itertools.chain(*media), *question])
    width = max(map(len, rows))
    ids = torch.tensor([[0] * (width - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    return {"input_ids": ids, "attention_mask": mask, **inputs}
