"""Mini-Gemini's architecture, which transformers lacks, from its stock parts: LLaVA with a ConvNeXt beside CLIP.

Li et al., Mini-Gemini: Mining the Potential of Multi-modality Vision Language Models, 2024,
https://arxiv.org/abs/2403.18814. Written from the paper and from what the official code computes.
"""

from __future__ import annotations

from math import isqrt

import torch
import torch.nn.functional as F
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForImageTextToText,
    ConvNextConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaModel,
)
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.llava.modeling_llava import LlavaMultiModalProjector
from transformers.utils.generic import can_return_tuple, merge_with_config_defaults

from zipeval.engine import hf_names

MODEL_TYPE = "mini_gemini"  # as zipeval/models/mini_gemini.py has it


class MiniGeminiConfig(LlavaConfig):
    """LLaVA's settings and those of the high resolution.

    Attributes:
        aux_config: the ConvNeXt that sees an image in high resolution.
        image_size_aux: pixels of a side of what the model is given, 768, or 1536 in the HD variant.
        image_grid: CLIP sees the image in so many tiles a side, and whole too where that is more than 1 (HD: 2).

    Raises:
        ValueError: where a visual token would not lie on a whole number of high-resolution features.
    """

    model_type = MODEL_TYPE
    sub_configs = {**LlavaConfig.sub_configs, "aux_config": ConvNextConfig}  # noqa: RUF012

    aux_config: dict | ConvNextConfig | None = None
    image_size_aux: int = 768
    image_grid: int = 1

    def __post_init__(self, **kwargs):
        if not isinstance(self.aux_config, ConvNextConfig):
            self.aux_config = ConvNextConfig(**(self.aux_config or {}))
        super().__post_init__(**kwargs)
        tokens = (
            self.image_grid
            * self.vision_config.image_size
            // self.vision_config.patch_size
        )
        if self.image_size_aux % (tokens * self.aux_config.patch_size):
            raise ValueError(
                f"image_size_aux={self.image_size_aux}: not a multiple of {tokens} tokens a side x "
                f"{self.aux_config.patch_size} pixels of a ConvNeXt feature"
            )


class PatchInfoMining(nn.Module):
    """Every token of the low resolution attends to the features of the high one that lie in its patch.

    Args:
        width: of tokens.
        width_aux: of high-resolution features.
    """

    def __init__(self, width: int, width_aux: int):
        super().__init__()
        self.query = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width))
        self.key = nn.Sequential(nn.LayerNorm(width_aux), nn.Linear(width_aux, width))
        self.value = nn.Sequential(nn.LayerNorm(width_aux), nn.Linear(width_aux, width))

    def forward(self, tokens: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
        """tokens (N, P, D) in raster order, features (N, A, h, w) of the same images -> (N, P, D)."""
        patch_features = (
            cut(features, isqrt(tokens.shape[1])).flatten(3).mT
        )  # (N, P, features of a patch, A)
        keys = self.key(patch_features).mT / tokens.shape[-1] ** 0.5
        logits = self.query(tokens)[:, :, None] @ keys
        return (
            tokens
            + (logits.nan_to_num().softmax(-1) @ self.value(patch_features))[:, :, 0]
        )


class Projector(LlavaMultiModalProjector):
    """LLaVA's, before a decoder that scales its embeddings as it looks them up, as Gemma does.

    When Mini-Gemini was trained, the decoder scaled whatever it was given, visual tokens included.
    """

    def __init__(self, config: MiniGeminiConfig, scale: float):
        super().__init__(config)
        self.scale = scale

    def forward(self, image_features: torch.Tensor) -> torch.Tensor:
        """(N, P, D) -> (N, P, the decoder's width)."""
        projected = super().forward(image_features)
        return projected * projected.new_full((), self.scale)


class MiniGeminiModel(LlavaModel):
    """LlavaModel whose `pixel_values` are (N, 3, image_size_aux, image_size_aux); what CLIP sees is made of them.

    Attributes:
        crops: of every image, (whole, tiles row by row): rows of what CLIP sees and of what the projector is given.
    """

    config_class = MiniGeminiConfig
    _no_split_modules = (
        "ConvNextModel",
        "PatchInfoMining",
    )  # what is computed of several of their parts

    def __init__(self, config: MiniGeminiConfig):
        super().__init__(config)
        self.crops = 1 if config.image_grid == 1 else 1 + config.image_grid**2
        scale = getattr(self.get_input_embeddings(), "scalar_embed_scale", 1.0)
        self.multi_modal_projector = Projector(config, scale)
        # It has no attention, and refuses to hear of any other than eager.
        self.vision_tower_aux = AutoModel.from_config(
            config.aux_config, attn_implementation="eager"
        )
        self.vision_tower_aux.layernorm = (
            nn.Identity()
        )  # of the pooled features, which nobody asks for
        self.patch_info_mining = PatchInfoMining(
            config.vision_config.hidden_size, sum(config.aux_config.hidden_sizes)
        )
        self.post_init()

    @merge_with_config_defaults
    @can_return_tuple
    def get_image_features(
        self,
        pixel_values: torch.Tensor,
        vision_feature_layer: int | None = None,
        vision_feature_select_strategy: str | None = None,
        image_sizes: None = None,
        **kwargs,
    ) -> BaseModelOutputWithPooling:
        """Return what LlavaModel's `forward` asks for; `pooler_output` is a (crops * P, D) for each image.

        Raises:
            ValueError: if CLS is to be kept: no part of the image is its own.
        """
        if vision_feature_select_strategy != "default":
            raise ValueError(
                f"vision_feature_select_strategy={vision_feature_select_strategy!r}: CLS cannot be mined"
            )
        kwargs |= hf_names.hidden_states_of(vision_feature_layer)
        seen = self.vision_tower(
            self.low_resolution(pixel_values), return_dict=True, **kwargs
        )
        tokens = seen.hidden_states[vision_feature_layer][:, 1:].unflatten(
            0, (-1, self.crops)
        )
        # One image after another: in high resolution, the features of a single one are up to 1 GB.
        mined = [
            self.patch_info_mining(rows, self.high_resolution(pixels[None]))
            for rows, pixels in zip(tokens, pixel_values, strict=True)
        ]
        features = self.multi_modal_projector(torch.cat(mined))
        seen.pooler_output = list(features.unflatten(0, (-1, self.crops)).flatten(1, 2))
        return seen

    def low_resolution(self, pixels: torch.Tensor) -> torch.Tensor:
        """(N, 3, S, S) -> (N * crops, 3, s, s), by the same interpolation of normalised pixels as in training."""
        side, grid = self.config.vision_config.image_size, self.config.image_grid
        large = _resized(pixels.float(), grid * side)
        return _with_tiles(_resized(large, side), large, grid).to(pixels.dtype)

    def high_resolution(self, pixels: torch.Tensor) -> torch.Tensor:
        """(N, 3, S, S) -> (N * crops, A, h, w): what the stages of the ConvNeXt put out, side by side."""
        config = self.config.aux_config
        stages = self.vision_tower_aux(pixels, output_hidden_states=True).hidden_states[
            -config.num_stages :
        ]
        large = torch.cat([_resized(stage, stages[0].shape[-1]) for stage in stages], 1)
        grid = self.config.image_grid
        return _with_tiles(_resized(large, large.shape[-1] // grid), large, grid)


class MiniGeminiForConditionalGeneration(LlavaForConditionalGeneration):
    """LlavaForConditionalGeneration over MiniGeminiModel."""

    config_class = MiniGeminiConfig

    def __init__(self, config: MiniGeminiConfig):
        super().__init__(config)
        self.model = MiniGeminiModel(config)
        self.post_init()


def cut(images: torch.Tensor, grid: int) -> torch.Tensor:
    """(N, C, grid * h, grid * w) -> (N, grid ** 2, C, h, w), row by row."""
    parts = images.unflatten(-1, (grid, -1)).unflatten(-3, (grid, -1))
    return parts.permute(0, 2, 4, 1, 3, 5).flatten(1, 2)


def _with_tiles(whole: torch.Tensor, large: torch.Tensor, grid: int) -> torch.Tensor:
    """whole (N, C, h, w) and large (N, C, grid * h, grid * w) -> (N * crops, C, h, w); nothing new where grid is 1."""
    return (
        whole
        if grid == 1
        else torch.cat([whole[:, None], cut(large, grid)], 1).flatten(0, 1)
    )


def _resized(images: torch.Tensor, side: int) -> torch.Tensor:
    """(N, C, h, h) -> (N, C, side, side) in the same dtype; in float32, as the official code does."""
    if images.shape[-1] == side:
        return images
    return F.interpolate(
        images.float(), size=(side, side), mode="bilinear", align_corners=False
    ).to(images.dtype)


AutoConfig.register(MODEL_TYPE, MiniGeminiConfig, exist_ok=True)
AutoModelForImageTextToText.register(
    MiniGeminiConfig, MiniGeminiForConditionalGeneration, exist_ok=True
)
