"""Images and videos of a prompt: what the model makes of them without reduction, and how reduced crops are packed.

A crop is what the encoder sees at once: an image, the whole image and its tiles (LLaVA-NeXT), or a frame of a video.
"""

from __future__ import annotations

from itertools import chain

from zipeval.engine.budget import Picture
from zipeval.engine.hf_names import PIXELS, SIZES, TOWERS
from zipeval.utils.lazy import torch


def check_model(model) -> None:
    """Raises ValueError for a model that is not built as LLaVA is: encoder, projector, decoder, and generation."""
    base = getattr(model, "base_model", None)
    lacks = [
        name
        for name in ("multi_modal_projector", "language_model")
        if not hasattr(base, name)
    ]
    lacks += [
        name
        for name in ("vision_feature_layer",)
        if not hasattr(getattr(model, "config", None), name)
    ]
    if lacks or not hasattr(model, "generate"):
        raise ValueError(
            f"model={type(model).__name__}: it has no {', '.join(lacks) or 'generate'}. Methods reduce "
            "...ForConditionalGeneration models of LLaVA, LLaVA-NeXT, Video-LLaVA and Mini-Gemini"
        )


def pixels(inputs: dict, kind: str) -> torch.Tensor | None:
    """The images or videos among the processor's inputs."""
    return next(
        (inputs[name] for name in PIXELS[kind] if inputs.get(name) is not None), None
    )


def joined(inputs: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """The pictures of several of the processor's inputs, one after another; tiles are padded to the most of one."""
    made = {}
    for name in (SIZES, *chain.from_iterable(PIXELS.values())):
        rows = [row for its in inputs if name in its for row in its[name]]
        if rows:
            made[name] = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    return made


def pictures(model, inputs: dict, kind: str = "image") -> list[Picture]:
    """The images, or the videos, of the processor's inputs, in reading order."""
    given, sizes = pixels(inputs, kind), inputs.get(SIZES)
    if given is None:
        return []
    patches = side(model) ** 2
    if kind == "video" or model.config.vision_feature_select_strategy == "full":
        patches += cls_tokens(model)
    if kind == "video":
        frames = given.shape[1]
        return [Picture(frames * patches, frames, patches)] * len(given)
    if sizes is None:
        crops = getattr(model.base_model, "crops", 1)
        return [Picture(crops * patches, crops, patches)] * len(given)
    return [
        Picture(
            stock_tokens(model, size),
            tiles(model, size) + 1,
            patches,
            grid(model, size)[0] * side(model),
        )
        for size in sizes
    ]


def largest_picture(model) -> Picture:
    """Return the image or video of which the model makes most visual tokens without reduction."""
    config = model.config
    takes_cls = config.vision_feature_select_strategy == "full" or hasattr(
        config, "video_token_id"
    )
    patches = side(model) ** 2 + (cls_tokens(model) if takes_cls else 0)
    crops = getattr(model.base_model, "crops", 1)
    tokens = crops * patches
    for pinpoint in map(
        torch.tensor, getattr(config, "image_grid_pinpoints", None) or []
    ):
        crops = max(crops, 1 + tiles(model, pinpoint))
        tokens = max(
            tokens, stock_tokens(model, pinpoint)
        )  # of an image that fills its tiles nothing is cut off
    return Picture(max(tokens, getattr(config, "video_seq_length", 0)), crops, patches)


def tower(model, kind: str = "image"):
    """The encoder, with its `embeddings` and `encoder.layers`."""
    found = next(
        getattr(model.base_model, name)
        for name in TOWERS[kind]
        if hasattr(model.base_model, name)
    )
    return getattr(found, "vision_model", found)


def cls_tokens(model) -> int:
    """Tokens before the patches: 1 for CLIP, 0 for SigLIP."""
    return int(hasattr(tower(model).embeddings, "class_embedding"))


def side(model) -> int:
    """Patches in a row of a crop."""
    return (
        model.config.vision_config.image_size // model.config.vision_config.patch_size
    )


def grid(model, size: torch.Tensor) -> tuple[int, int]:
    """Rows and columns of tiles of an image of `size` (height, width)."""
    from transformers.models.llava_next.modeling_llava_next import (
        get_anyres_image_grid_shape,
    )

    config = model.config
    return get_anyres_image_grid_shape(
        size, config.image_grid_pinpoints, config.vision_config.image_size
    )


def tiles(model, size: torch.Tensor) -> int:
    """Of an image of `size`, besides the whole."""
    rows, columns = grid(model, size)
    return rows * columns


def stock_packing(model, size: torch.Tensor) -> torch.Tensor:
    """What the model packs an image of `size` into: of each visual token, which patch of its crops it is, counted crop
    after crop, or -1 for a row end.

    By definition: what the stock packing makes of these numbers.
    """
    crops = 1 + tiles(model, size)
    patches = torch.arange(crops * side(model) ** 2, dtype=torch.float32).view(
        crops, -1, 1
    )
    stock = type(model.base_model).pack_image_features
    row_end = torch.full((1,), -1.0)
    return stock(model.base_model, [patches], [size], "default", image_newline=row_end)[
        0
    ][0][:, 0].long()


def stock_tokens(model, size: torch.Tensor) -> int:
    """Visual tokens of an image of `size` without reduction."""
    return len(stock_packing(model, size))


def stock_positions(model, inputs: dict, kind: str = "image") -> list[torch.Tensor]:
    """Of each image's or video's visual tokens without reduction, which patch it is, counted crop after crop; -1 for a
    row end and for CLS.
    """
    if kind == "image" and inputs.get(SIZES) is not None:
        return [stock_packing(model, size) for size in inputs[SIZES]]
    patches = torch.arange(side(model) ** 2)
    found = []
    for picture in pictures(model, inputs, kind):
        cls = patches.new_full((picture.patches - len(patches),), -1)
        found.append(
            torch.cat(
                [
                    torch.cat([cls, patches + crop * len(patches)])
                    for crop in range(picture.crops)
                ]
            )
        )
    return found


def packing(
    model,
    counts: list[int],
    kept: list[torch.Tensor],
    size: torch.Tensor,
    row_ends: bool,
) -> torch.Tensor:
    """The tokens of an image in tiles, in the official VisionZip's order: which of all crops' it is, -1: a row end.

    The whole image as it is; then the tiles' patches in raster order of the image that they make up together, the
    CLS tokens of the tiles, and their merged tokens. Nothing is cut off where the image was padded.

    Args:
        counts: tokens of the whole image and of its tiles.
        kept: (<= count) the positions of the first of them in the encoder's sequence, as in `Reduced`.
        size: (2) height and width of the image.
        row_ends: whether the model's row end follows every row of patches, also where none is left of it; the
            official code has none.
    """
    prefix, width, device = cls_tokens(model), side(model), kept[0].device
    tile_rows, tile_columns = grid(model, size)
    rows, columns = tile_rows * width, tile_columns * width
    places = []
    for tile, (count, positions) in enumerate(zip(counts[1:], kept[1:], strict=True)):
        patch = positions - prefix
        top, left = tile // tile_columns * width, tile % tile_columns * width
        place = (top + patch // width) * (columns + 1) + left + patch % width
        place = torch.where(
            patch < 0, rows * (columns + 1), place
        )  # CLS: behind all patches
        merged = place.new_full((count - len(patch),), rows * (columns + 1) + 1)
        places.append(torch.cat([place, merged]))
    if row_ends:
        places.append(torch.arange(rows, device=device) * (columns + 1) + columns)
    order = torch.cat(places).argsort(stable=True) + counts[0]
    order = order.masked_fill(order >= sum(counts), -1)
    return torch.cat([torch.arange(counts[0], device=device), order])
