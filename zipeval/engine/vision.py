"""Reduction between the vision encoder and the language model, on stock classes and without touching their attention.

Hooks on one encoder layer and on the projector let a method replace the features that the projector is about to get.
The prompt's image placeholders then shrink to match. SDPA or FlashAttention stays on in every layer: queries and keys
of the one layer a method scores by are the outputs of its `q_proj` and `k_proj`, seen on their way.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from transformers.modeling_outputs import BaseModelOutputWithPooling

from zipeval.budget import Shape
from zipeval.engine.ragged import compact_index, take


@dataclass(frozen=True)
class Crops:
    """N images as the encoder layer that features are read from sees them; S tokens each, P of them patches.

    Attributes:
        hidden: (N, S, D) output of that layer, the CLS token first where the encoder has one.
        queries: (N, S, H * d) of that layer's self-attention, bias included.
        keys: (N, S, H * d), likewise.
        heads: H.
        prefix: number of tokens before the patches: 1 for CLIP (CLS), 0 for SigLIP.
        selected: (N, K, D) what the model itself would hand to the projector (LLaVA: the patches without CLS).
        pixels: (N, 3, height, width) what the encoder was given.
    """

    hidden: torch.Tensor
    queries: torch.Tensor
    keys: torch.Tensor
    heads: int
    prefix: int
    selected: torch.Tensor
    pixels: torch.Tensor

    def cls_attention(self) -> torch.Tensor:
        """(N, H, P) float32: softmaxed attention of the CLS token to every patch."""
        if not self.prefix:
            raise ValueError("this vision encoder has no CLS token to score patches by")
        query, key = (x.unflatten(-1, (self.heads, -1)).transpose(1, 2) for x in (self.queries[:, :1], self.keys))
        scores = query @ key.mT * key.shape[-1] ** -0.5
        return scores.softmax(-1, dtype=torch.float32)[:, :, 0, self.prefix :]

    def mean_keys(self) -> torch.Tensor:
        """(N, S, d): keys averaged over heads."""
        return self.keys.unflatten(-1, (self.heads, -1)).mean(2)


@dataclass(frozen=True)
class Reduced:
    """What a method leaves of N images.

    Attributes:
        features: (N, k, D) for the projector; the first `kept.shape[1]` are tokens of the encoder, the rest merged.
        kept: (N, <= k) their positions in `Crops.hidden`, ascending (with CLS: 0 is CLS, patch p is p + 1).
    """

    features: torch.Tensor
    kept: torch.Tensor


class VisionMethod(ABC):
    """A method that acts between encoder and projector.

    Attributes:
        tokens: visual tokens that an image is left with.
    """

    tokens: int

    @abstractmethod
    def reduce(self, crops: Crops) -> Reduced:
        """What is left of some images."""

    @classmethod
    def for_budget(cls, tokens: int, budget: str, shape: Shape, **options) -> VisionMethod:
        """The method with its settings for a budget: what is left of an image enters every layer of the decoder.

        Raises:
            ValueError: for a budget that cannot be met.
        """
        return cls(tokens=tokens, **options)

    def left(self, tokens: int) -> int:
        """What is left of an image of `tokens` visual tokens."""
        return min(tokens, self.tokens)

    def entering(self, images: list[int], depth: int) -> list[int]:
        """Visual tokens that enter each of `depth` decoder layers, of a prompt whose images have so many."""
        return [sum(map(self.left, images))] * depth

    @contextmanager
    def applied(self, model) -> Iterator[None]:
        """While open, `model(...)` and `model.generate(...)` reduce the images of the processor's usual inputs.

        `generate` returns the prompt it was given, placeholders and all, followed by the new tokens, so that callers
        slice it as they always do. Nothing of this is left on the model after the block, nor after an exception.
        """
        if "generate" in vars(model):
            raise RuntimeError("a vision-stage method is already applied to this model; leave its block first")
        stock_generate = model.generate

        def reduce_call(module, args, kwargs):
            if args:
                kwargs = {"input_ids": args[0], **kwargs}
            return args[1:], reduced_inputs(module, kwargs, self)

        def generate(inputs=None, **kwargs):
            prompt = kwargs.pop("input_ids", inputs)
            cache = kwargs.get("past_key_values")
            if cache is not None and cache.get_seq_length() > 0 and (prompt == model.config.image_token_id).any():
                # generate() would count cached tokens by the full prompt and feed old ones again.
                raise ValueError("past_key_values: a later turn on the cache of a reduced prompt is not supported yet")
            kwargs = reduced_inputs(model, {"input_ids": prompt, **kwargs}, self)
            out = stock_generate(**kwargs)
            structured = not torch.is_tensor(out)
            sequences = out.sequences if structured else out
            prompts = prompt.repeat_interleave(len(sequences) // len(prompt), 0)
            sequences = torch.cat([prompts, sequences[:, kwargs["input_ids"].shape[1] :]], 1)
            if not structured:
                return sequences
            out.sequences = sequences
            return out

        hook = model.register_forward_pre_hook(reduce_call, with_kwargs=True)
        model.generate = generate
        try:
            yield
        finally:
            hook.remove()
            del model.generate


def reduced_inputs(model, inputs: dict, method: VisionMethod) -> dict:
    """The processor's inputs with features in place of pixels and with as many placeholders as features are left.

    Inputs without `pixel_values` (text, decoding steps, a later turn) come back as they are.
    """
    if inputs.get("pixel_values") is None:
        return inputs
    inputs = dict(inputs)
    if inputs.pop("labels", None) is not None:
        raise ValueError("labels: training through a reduced prompt is not supported; compute the loss from the logits")
    ids, mask = inputs["input_ids"], inputs.get("attention_mask")
    if mask is None:
        if len(ids) > 1:
            raise ValueError(f"attention_mask=None with {len(ids)} prompts: pass the mask that the processor returns")
        mask = torch.ones_like(ids)
    pixels = inputs.pop("pixel_values")
    with _at_projector(model, method, pixels) as reductions:
        features = list(model.base_model.get_image_features(pixels, return_dict=True).pooler_output)
    before = [reductions[0].selected.shape[1]] * len(features)
    ids, mask = shrink(ids, mask, model.config.image_token_id, before, [len(f) for f in features])
    # A fresh object for every call: generate() rewrites it in place for num_beams > 1.
    images = BaseModelOutputWithPooling(pooler_output=features)
    return {**inputs, "input_ids": ids, "attention_mask": mask, "mm_encoder_outputs": {"image": images}}


def shrink(ids, mask, placeholder: int, before: list[int], after: list[int]):
    """Leave the first `after[i]` of the `before[i]` placeholders of image i, images in reading order.

    ids, mask: (B, L) -> (B, L') left-padded anew.
    """
    at = ids == placeholder
    numbered = [torch.arange(b, device=ids.device) < a for b, a in zip(before, after, strict=True)]
    kept = torch.cat(numbered)
    if int(at.sum()) != len(kept):
        raise ValueError(f"the prompts hold {int(at.sum())} image placeholders, the images {len(kept)} visual tokens")
    keep = mask.bool().clone()
    keep[at] &= kept
    index, valid = compact_index(keep)
    return take(ids, index).masked_fill(~valid, 0), valid.to(mask.dtype)


@contextmanager
def _at_projector(model, method: VisionMethod, pixels) -> Iterator[list]:
    """While open, the projector receives what `method` leaves; yields the list of `Crops` that went in."""
    base = model.base_model
    tower = base.vision_tower
    tower = getattr(tower, "vision_model", tower)
    number = model.config.vision_feature_layer
    if not isinstance(number, int):
        raise ValueError(f"vision_feature_layer={number!r}: reduction reads features from one layer")
    layer = tower.encoder.layers[number if number < 0 else number - 1]  # hidden_states[0] is the embedding
    attention, seen, crops = layer.self_attn, {}, []

    def swap(module, args):
        prefix = int(hasattr(tower.embeddings, "class_embedding"))
        given = Crops(**seen, heads=attention.num_heads, prefix=prefix, selected=args[0], pixels=pixels)
        crops.append(given)
        return (method.reduce(given).features.to(args[0].dtype),)

    def see(name):
        return lambda module, args, output: seen.update({name: output})

    hooks = [
        layer.register_forward_hook(see("hidden")),
        attention.q_proj.register_forward_hook(see("queries")),
        attention.k_proj.register_forward_hook(see("keys")),
        base.multi_modal_projector.register_forward_pre_hook(swap),
    ]
    try:
        yield crops
    finally:
        for hook in hooks:
            hook.remove()
