"""Ask a model what it makes of images and videos without reduction, and pack reduced crops.

A crop is what the encoder sees at once: an image, the whole image and its tiles
(LLaVA-NeXT), or a frame of a video.
"""

from __future__ import annotations

from itertools import chain

from zipeval import moved
from zipeval.engine.budget import VisualInput
from zipeval.engine.hf_names import PIXELS, SIZES, TOWERS
from zipeval.utils.lazy import torch


def check_model(model) -> None:
    """Raise ValueError for a model that is not built as LLaVA is.

    It has to have an encoder, a projector, a decoder, and generation.
    """
    base, config = getattr(model, "base_model", None), getattr(model, "config", None)
    owners = {
        "multi_modal_projector": base,
        "language_model": base,
        "vision_feature_layer": config,
    }
    missing = [name for name, owner in owners.items() if not hasattr(owner, name)]
    if missing or not hasattr(model, "generate"):
        raise ValueError(
            f"model={type(model).__name__}: it has no {', '.join(missing) or 'generate'}. Methods reduce "
            "...ForConditionalGeneration models of LLaVA, LLaVA-NeXT, Video-LLaVA and Mini-Gemini"
        )


def pixels(inputs: dict, kind: str) -> torch.Tensor | None:
    """Return the images or videos among the processor's inputs; None without any."""
    # One of several names: transformers 5.23 renamed Video-LLaVA's images.
    present = (inputs[name] for name in PIXELS[kind] if inputs.get(name) is not None)
    return next(present, None)


def join_pictures(inputs: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Return the pictures of several of the processor's inputs, one after another.

    Images with fewer tiles than others are padded.
    """
    joint = {}
    for name in (SIZES, *chain.from_iterable(PIXELS.values())):
        rows = [*chain.from_iterable(each[name] for each in inputs if name in each)]
        if rows:
            joint[name] = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    return joint


def pictures(model, inputs: dict, kind: str = "image") -> list[VisualInput]:
    """Return the images, or the videos, of the processor's inputs, in reading order."""
    values, sizes = pixels(inputs, kind), inputs.get(SIZES)
    if values is None:
        return []
    is_video = kind == "video"
    patches = _patches_in_crop(model, is_video)
    if is_video or sizes is None:
        # [videos, frames, ...]; Mini-Gemini makes several crops of an image.
        crops = values.shape[1] if is_video else getattr(model.base_model, "crops", 1)
        return [VisualInput(crops * patches, crops, patches)] * len(values)
    images = []
    for size in sizes:
        tile_rows, tile_columns = grid(model, size)
        crops = 1 + tile_rows * tile_columns
        rows = tile_rows * side(model)
        images.append(VisualInput(stock_tokens(model, size), crops, patches, rows))
    return images


def largest_picture(model) -> VisualInput:
    """Return the image or video that becomes most visual tokens without reduction."""
    config = model.config
    patches = _patches_in_crop(model, hasattr(config, "video_token_id"))
    crops = getattr(model.base_model, "crops", 1)
    tokens = crops * patches
    # Sizes that fill their tiles: nothing of such an image is cut off as padding.
    for pinpoint in getattr(config, "image_grid_pinpoints", None) or []:
        size = torch.tensor(pinpoint)
        crops = max(crops, 1 + tiles(model, size))
        tokens = max(tokens, stock_tokens(model, size))
    return VisualInput(
        max(tokens, getattr(config, "video_seq_length", 0)), crops, patches
    )


def _patches_in_crop(model, is_video: bool) -> int:
    """Return the tokens of a crop that go to the decoder, CLS among them where it does."""
    patches = side(model) ** 2
    # Video-LLaVA hands the CLS token of a frame to the decoder.
    if is_video or model.config.vision_feature_select_strategy == "full":
        patches += cls_tokens(model)
    return patches


def tower(model, kind: str = "image"):
    """Return the encoder of a kind, with its `embeddings` and `encoder.layers`."""
    base = model.base_model
    name = next(name for name in TOWERS[kind] if hasattr(base, name))
    encoder = getattr(base, name)
    # Some encoders wrap the module that has these.
    return getattr(encoder, "vision_model", encoder)


def cls_tokens(model) -> int:
    """Return the number of tokens before the patches: 1 for CLIP, 0 for SigLIP."""
    return int(hasattr(tower(model).embeddings, "class_embedding"))


def side(model) -> int:
    """Return the number of patches in a row of a crop."""
    config = model.config.vision_config
    return config.image_size // config.patch_size


def grid(model, size: torch.Tensor) -> tuple[int, int]:
    """Return the rows and columns of tiles of an image of `size` (height, width)."""
    from transformers.models.llava_next.modeling_llava_next import (
        get_anyres_image_grid_shape,
    )

    config = model.config
    return get_anyres_image_grid_shape(
        size, config.image_grid_pinpoints, config.vision_config.image_size
    )


def tiles(model, size: torch.Tensor) -> int:
    """Return the number of tiles of an image of `size`, besides the whole image."""
    rows, columns = grid(model, size)
    return rows * columns


def stock_packing(model, size: torch.Tensor) -> torch.Tensor:
    """Return which patch each visual token of an image of `size` is.

    Patches are counted crop after crop; -1 stands for a row end. The answer is right by
    definition: it is what the model's own packing makes of these numbers.
    """
    crops = 1 + tiles(model, size)
    numbers = torch.arange(crops * side(model) ** 2, dtype=torch.float32)
    patches = numbers.view(crops, -1, 1)  # [crops, patches, 1], as features
    # That of the class: on the model itself `see` puts another one while it encodes.
    stock = type(model.base_model).pack_image_features
    row_end = torch.full((1,), -1.0)
    packed = stock(
        model.base_model, [patches], [size], "default", image_newline=row_end
    )
    # The features of all images come first in what it returns; here is one image.
    features = packed[0][0]
    return features[:, 0].long()


def stock_tokens(model, size: torch.Tensor) -> int:
    """Return the number of visual tokens of an image of `size` without reduction."""
    return len(stock_packing(model, size))


def stock_positions(model, inputs: dict, kind: str = "image") -> list[torch.Tensor]:
    """Return which patch each visual token is without reduction, for every picture.

    Patches are counted crop after crop; -1 stands for a row end and for CLS.
    """
    if kind == "image" and inputs.get(SIZES) is not None:
        return [stock_packing(model, size) for size in inputs[SIZES]]
    patches = torch.arange(side(model) ** 2)
    positions = []
    for picture in pictures(model, inputs, kind):
        # `picture.patches` counts the CLS token where the model hands it on.
        cls = patches.new_full((picture.patches - len(patches),), -1)
        crops = []
        for crop in range(picture.crops):
            crops += [cls, patches + crop * len(patches)]
        positions.append(torch.cat(crops))
    return positions


def packing_order(
    model,
    counts: list[int],
    positions: list[torch.Tensor],
    size: torch.Tensor,
    row_ends: bool,
) -> torch.Tensor:
    """Return the tokens of an image in tiles in the official VisionZip's order.

    The whole image comes as it is; then the tiles' patches in raster order of the image
    that they make up together, the CLS tokens of the tiles, and their merged tokens.
    Nothing is cut off where the image was padded.

    Args:
        counts: tokens of the whole image and of its tiles.
        positions: (<= count) those of the first of them in the encoder's sequence, as
            `Reduced.kept`.
        size: (2) height and width of the image.
        row_ends: whether the model's row end follows every row of patches, also where
            none is left of it; the official code has none.

    Returns:
        The number of each token among those of all crops; -1 for a row end.
    """
    prefix, width, device = cls_tokens(model), side(model), positions[0].device
    tile_rows, tile_columns = grid(model, size)
    rows, columns = tile_rows * width, tile_columns * width
    # Places in raster order: each row has one more column, which is for its row end.
    row_length = columns + 1
    behind_patches = rows * row_length
    places = []
    tiles_of_image = zip(counts[1:], positions[1:], strict=True)
    for tile, (count, tile_positions) in enumerate(tiles_of_image):
        patch = tile_positions - prefix
        tile_top = tile // tile_columns * width
        tile_left = tile % tile_columns * width
        row, column = tile_top + patch // width, tile_left + patch % width
        place = row * row_length + column
        # A CLS token is at a position below 0.
        place = torch.where(patch < 0, behind_patches, place)
        merged = place.new_full((count - len(patch),), behind_patches + 1)
        places.append(torch.cat([place, merged]))
    if row_ends:
        places.append(torch.arange(rows, device=device) * row_length + columns)
    # Stable: CLS tokens, and merged ones, stay in the order of their tiles.
    order = torch.cat(places).argsort(stable=True) + counts[0]
    # Row ends were put behind all tokens.
    order = order.masked_fill(order >= sum(counts), -1)
    return torch.cat([torch.arange(counts[0], device=device), order])


# Names of before, for a release.
__getattr__ = moved.renamed(__name__)
