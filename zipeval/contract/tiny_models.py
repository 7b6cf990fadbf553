"""Random models of each family, small enough to compare with anything."""

from __future__ import annotations

import inspect
import itertools
from collections import Counter

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
from zipeval.engine.ragged import left_padded
from zipeval.models._mini_gemini import (
    MiniGeminiConfig,
    MiniGeminiForConditionalGeneration,
)

# Ids of placeholders, of the beginning of a prompt, and of any text.
IMAGE, VIDEO, BOS, TEXT = 98, 97, 1, 2
FRAMES = 3
PATCH = 14
# Rows and columns of tiles.
GRIDS = [(1, 2), (2, 2), (2, 1), (1, 3), (3, 1)]
# Settings of a decoder's configuration that its defaults have otherwise.
DECODER_SETTINGS = {"mistral": {"sliding_window": None}, "gemma": {"head_dim": 12}}


def llava(side=6, layers=3, decoder="llama", gain=3.0, **options):
    """Return a LlavaForConditionalGeneration with side x side patches and weights far from uniform attention."""
    config = LlavaConfig(
        **parts(side, layers, decoder, **options), image_seq_length=side * side
    )
    return randomised(LlavaForConditionalGeneration, config, gain)


def llava_next(side=6, layers=3, decoder="llama", gain=3.0, **options):
    """Return a LlavaNextForConditionalGeneration, likewise; tiles of PATCH x side pixels."""
    pinpoints = [
        [PATCH * side * rows, PATCH * side * columns] for rows, columns in GRIDS
    ]
    config = LlavaNextConfig(
        **parts(side, layers, decoder, **options), image_grid_pinpoints=pinpoints
    )
    return randomised(LlavaNextForConditionalGeneration, config, gain)


def mini_gemini(side=6, layers=3, decoder="llama", gain=3.0, grid=1, **options):
    """Return a MiniGeminiForConditionalGeneration, likewise; with grid=2 the HD variant.

    A patch has 4 x 4 ConvNeXt features.
    """
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
    """Return a VideoLlavaForConditionalGeneration, likewise."""
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
    """Return the configurations of a model's parts, as keyword arguments."""
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
        **DECODER_SETTINGS.get(decoder, {}),
    )
    # "default" leaves the CLS token out, which only CLIP has.
    strategy = "default" if encoder.startswith("clip") else "full"
    return {
        "vision_config": vision,
        "text_config": text,
        "image_token_id": image_token,
        "vision_feature_select_strategy": strategy,
    }


def randomised(model_class, config, gain, seed=0):
    """Return a model whose linear layers have weights of standard deviation gain / sqrt(inputs)."""
    torch.manual_seed(seed)
    model = model_class(config).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            # Default weights are so small that attention is uniform, and methods have nothing to choose by.
            if weight.ndim == 2 and "embed" not in name:
                weight.normal_(0, gain * weight.shape[1] ** -0.5)
    return model


def kinds_of(model, images: list[int]) -> list[list[str]]:
    """Return the kinds of the `images[i]` pictures in row i of `prompts`.

    They are images; where the model takes videos, every other picture is one.
    """
    takes_videos = hasattr(model.config, "video_token_id")
    kinds = itertools.cycle(["video", "image"] if takes_videos else ["image"])
    return [list(itertools.islice(kinds, number)) for number in images]


def pictures_of(model, inputs: dict, images: list[int]) -> list[list[VisualInput]]:
    """Return the pictures of every row."""
    # Images and videos are apart in the inputs, each in reading order.
    remaining = {kind: iter(pictures(model, inputs, kind)) for kind in PIXELS}
    rows = []
    for kinds in kinds_of(model, images):
        rows.append([next(remaining[kind]) for kind in kinds])
    return rows


def single(model, inputs: dict, images: list[int], row: int) -> dict:
    """Return one row of `prompts`, without its padding."""
    length, kinds = int(inputs["attention_mask"][row].sum()), kinds_of(model, images)
    one = {
        name: inputs[name][row : row + 1, -length:]
        for name in ("input_ids", "attention_mask")
    }
    before = list(itertools.chain.from_iterable(kinds[:row]))
    for name in inputs.keys() - one.keys():
        kind = "video" if name in PIXELS["video"] else "image"
        # Pictures of a kind stand behind each other, those of earlier rows first.
        first, number = before.count(kind), kinds[row].count(kind)
        if number:
            one[name] = inputs[name][first : first + number]
    return one


def pixels_name(model, kind: str) -> str:
    """Return the argument of the model that takes pixels of a kind.

    transformers 5.23 renamed that of Video-LLaVA's images.
    """
    parameters = inspect.signature(type(model).forward).parameters
    return next(name for name in PIXELS[kind] if name in parameters)


def prompts(
    model, questions: list[list[int]], images: list[int], seed: int = 0
) -> dict:
    """Return left-padded inputs: row i is BOS, `images[i]` images with text between them, then `questions[i]`.

    For LLaVA-NeXT the images are of every grid in turn, some of them padded; for Video-LLaVA every other is a video.
    """
    kinds = kinds_of(model, images)
    generator = torch.Generator().manual_seed(seed)
    if model.config.model_type == "llava_next":
        pixels = _tiles(model, sum(images), generator)
    else:
        pixels = _crops(model, kinds, generator)
    placeholders = {
        "image": model.config.image_token_id,
        "video": getattr(model.config, "video_token_id", None),
    }
    rows = []
    shapes = pictures_of(model, pixels, images)
    for question, row_kinds, row_shapes in zip(questions, kinds, shapes, strict=True):
        row = [BOS]
        for kind, picture in zip(row_kinds, row_shapes, strict=True):
            row += [TEXT] + [placeholders[kind]] * picture.tokens
        rows.append(torch.tensor(row + question))
    # [prompts, tokens of the longest]
    ids, mask = left_padded(rows, 0)
    return {"input_ids": ids, "attention_mask": mask, **pixels}


def _tiles(model, number: int, generator: torch.Generator) -> dict:
    """Return pixels (number, tiles, 3, side, side) and sizes of images of every grid in turn."""
    side = model.config.vision_config.image_size
    grids = list(itertools.islice(itertools.cycle(GRIDS), number))
    sizes = []
    for place, (rows, columns) in enumerate(grids):
        # Every other image is lower than its grid, and so padded.
        sizes.append([side * rows - 20 * (place % 2), side * columns])
    # The image as a whole is one more tile.
    tiles = max(1 + rows * columns for rows, columns in grids)
    # Images of fewer tiles have noise in the others, which nothing reads.
    pixels = torch.randn(number, tiles, 3, side, side, generator=generator)
    return {"pixel_values": pixels, "image_sizes": torch.tensor(sizes)}


def _crops(model, kinds: list[list[str]], generator: torch.Generator) -> dict:
    """Return pixels (images, 3, side, side) and, where there are videos, (videos, FRAMES, 3, side, side)."""
    side = model.config.vision_config.image_size
    side = getattr(model.config, "image_size_aux", side)
    numbers = Counter(itertools.chain.from_iterable(kinds))
    inputs = {}
    for kind, frames in (("image", []), ("video", [FRAMES])):
        if numbers[kind]:
            shape = [numbers[kind], *frames, 3, side, side]
            pixels = torch.randn(shape, generator=generator)
            inputs[pixels_name(model, kind)] = pixels
    return inputs
