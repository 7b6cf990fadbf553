"""Images in crops, as LLaVA-NeXT takes them: the whole image, then its tiles; and how reduced crops are packed."""

from __future__ import annotations

from functools import partial

import torch
from transformers.models.llava_next.modeling_llava_next import get_anyres_image_grid_shape, image_size_to_num_patches

from zipeval.budget import Picture


def pictures(model, inputs: dict) -> list[Picture]:
    """The images of the processor's inputs, in reading order."""
    vision = model.config.vision_config
    patches = (vision.image_size // vision.patch_size) ** 2
    if model.config.vision_feature_select_strategy == "full":
        patches += cls_tokens(model)
    pixels, sizes = inputs.get("pixel_values"), inputs.get("image_sizes")
    if sizes is None:
        return [Picture(patches, 1, patches)] * (0 if pixels is None else len(pixels))
    return [Picture(stock_tokens(model, size), crops(model, size), patches) for size in sizes]


def cls_tokens(model) -> int:
    """Tokens before the patches: 1 for CLIP, 0 for SigLIP."""
    tower = model.base_model.vision_tower
    return int(hasattr(getattr(tower, "vision_model", tower).embeddings, "class_embedding"))


def crops(model, size: torch.Tensor) -> int:
    """Crops of an image of `size` (height, width)."""
    return image_size_to_num_patches(size, model.config.image_grid_pinpoints, model.config.vision_config.image_size)


def stock_tokens(model, size: torch.Tensor) -> int:
    """Its visual tokens without reduction, by definition: what the stock packing makes of crops of width 1."""
    vision = model.config.vision_config
    dummy = torch.zeros(crops(model, size), (vision.image_size // vision.patch_size) ** 2, 1)
    stock = type(model.base_model).pack_image_features
    return int(stock(model.base_model, [dummy], [size], "default", image_newline=torch.zeros(1))[1])


def pack(model, kept: list, prefix: int, features, image_sizes, vision_feature_select_strategy, image_newline=None):
    """Stands in for the model's `pack_image_features`; the official VisionZip's order.

    The whole image as it is; then the tiles' patches in raster order of the image that they make up together, the
    CLS tokens of the tiles, and their merged tokens. No row ends, and nothing is cut off where the image was padded.
    Images that nothing was removed from are packed as the model packs them.

    Args:
        kept: `Reduced` of every crop, filled by the time that this is called.
        features: of each image (crops, L, D), padded at the end where crops are left with different numbers.
    """
    base, config = model.base_model, model.config
    side = config.vision_config.image_size // config.vision_config.patch_size
    everything = torch.arange(side * side, device=features[0].device) + prefix
    stock = partial(type(base).pack_image_features, base, image_newline=image_newline)
    packed, remaining = [], iter(kept)
    for image, size in zip(features, image_sizes, strict=True):
        reduced = [next(remaining) for _ in image]
        if all(torch.equal(crop.kept, everything) for crop in reduced):  # nothing was removed from it
            packed += stock([image], [size], vision_feature_select_strategy)[0]
            continue
        _, columns = get_anyres_image_grid_shape(size, config.image_grid_pinpoints, config.vision_config.image_size)
        tokens, place = [], []
        for tile, (crop, of_crop) in enumerate(zip(image[1:], reduced[1:], strict=True)):
            count = len(of_crop.features)
            patch = of_crop.kept - prefix
            row, column = (tile // columns) * side + patch // side, (tile % columns) * side + patch % side
            raster = row * columns * side + column
            last = columns * side * side * len(image)
            raster = torch.where(patch < 0, last, raster)  # CLS: behind all patches
            merged = raster.new_full((count - len(patch),), last + 1)
            tokens.append(crop[:count])
            place.append(torch.cat([raster, merged]))
        order = torch.cat(place).argsort(stable=True)
        packed.append(torch.cat([image[0, : len(reduced[0].features)], torch.cat(tokens)[order]]))
    return packed, torch.tensor([len(p) for p in packed])
