"""The names that transformers gives to arguments, attributes and functions that zipeval uses.

This is the only file that knows them. An argument that was renamed is read under each of
its names and passed under the name that the installed version takes. A name that is not
there raises IncompatibleError: a hook that silently reads nothing would let a model answer
as if no token had been dropped.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from functools import cache as remember
from typing import Any, NoReturn

from zipeval.errors import IncompatibleError
from zipeval.utils.lazy import torch

# The oldest and the newest transformers that the tests run on.
TESTED = ("5.18.0", "5.24.0")
# As in pyproject.toml.
ALLOWED = "transformers>=5.18,<5.25"

# The key-value cache, as an argument and as a field of outputs: since 5.24, and before.
CACHE = ("cache", "past_key_values")
# Encoder outputs that stand in for pixels, by kind of picture.
FEATURES = "mm_encoder_outputs"
SIZES = "image_sizes"
# By kind of picture: what processors call the pixels (5.23 renamed Video-LLaVA's images), and models the encoder.
PIXELS = {
    "image": ("pixel_values", "pixel_values_images"),
    "video": ("pixel_values_videos",),
}
TOWERS = {"image": ("vision_tower", "image_tower"), "video": ("video_tower",)}
PLACEHOLDERS = ("image_token_id", "video_token_id")  # of a configuration

MODEL_ARGUMENTS = ("input_ids", "attention_mask", "position_ids", FEATURES)
LAYER_ARGUMENTS = ("attention_mask", "position_ids", "position_embeddings")


def incompatible(problem: str) -> NoReturn:
    """Raise IncompatibleError with a problem, the versions, and the next command."""
    import transformers

    raise IncompatibleError(
        f"transformers {transformers.__version__}: {problem}. zipeval is tested with {TESTED[0]} to {TESTED[1]}. "
        f"`pip install '{ALLOWED}'` installs one of these, `zipeval doctor` checks what is installed."
    )


# ------------------------------------------------------------------------------------------------------------ models


def decoder(model) -> torch.nn.Module:
    """Return the language model without its head: `layers`, `rotary_emb`, `config`."""
    return model.base_model.language_model


def positions(model) -> int | None:
    """Return the number of positions that the language model was made for, if it tells."""
    return getattr(decoder(model).config, "max_position_embeddings", None)


def projector(model) -> torch.nn.Module:
    """Return the module that projects features of the encoder into the language model."""
    return model.base_model.multi_modal_projector


def hidden_states_of(layer: int) -> dict[str, Any]:
    """Return the arguments with which an encoder returns the hidden states of a layer.

    Where it can, it returns no others. Before 5.23 it returns those of all layers, which takes more memory.
    """
    from transformers.utils import output_capturing

    selects = hasattr(output_capturing, "select_hidden_states")
    return {"output_hidden_states": layer if selects else True}


def check_arguments(model, layer) -> None:
    """Check that a model and its decoder layers take the arguments that zipeval uses.

    Raises:
        IncompatibleError: if one of them is not there. A model would swallow it among its other options.
    """
    for module, names in ((model, MODEL_ARGUMENTS), (layer, LAYER_ARGUMENTS)):
        taken = _arguments(type(module))
        missing = [name for name in names if name not in taken]
        if not taken.intersection(CACHE):
            missing.append(CACHE[0])
        if missing:
            incompatible(
                f"{type(module).__name__} has no argument {', '.join(missing)}"
            )


def _arguments(module_class: type) -> frozenset[str]:
    """Return the names of the arguments of `forward`.

    They are those of the first class that does not merely pass them on.
    """
    for base in module_class.__mro__:
        if "forward" in vars(base):
            names = _named_parameters(vars(base)["forward"])
            if names:
                return names
    return frozenset()


@remember
def _named_parameters(function) -> frozenset[str]:
    """Return the names of a function's parameters, without `self`, `*args` and `**kwargs`."""
    parameters = inspect.signature(function).parameters.values()
    passed_on = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    names = {each.name for each in parameters if each.kind not in passed_on}
    return frozenset(names - {"self"})


def check_cache_is_growing(cache) -> None:
    """Raise ValueError for a static cache: it has as many entries in every layer."""
    from transformers import StaticCache

    if isinstance(cache, StaticCache):
        raise ValueError(
            "cache: a static cache has as many entries in every layer; use the default cache"
        )


# ------------------------------------------------------------------------------------- calls and key-value caches


def given_ids(args: tuple, kwargs: dict[str, Any]) -> torch.Tensor | None:
    """Return the ids among the arguments of a model; None where embeddings stand for them."""
    return args[0] if args else kwargs.get("input_ids")


def generation_setting(model, inputs: dict[str, Any], name: str) -> Any:
    """Return a setting of a `generate`: an argument comes before the configuration."""
    config = inputs.get("generation_config") or model.generation_config
    return inputs.get(name, getattr(config, name, None))


def given_cache(inputs: dict[str, Any]):
    """Return the cache among the arguments of a call, under whichever name, if any."""
    for name in CACHE:
        if inputs.get(name) is not None:
            return inputs[name]
    return None


def cache_argument(model, cache) -> dict[str, Any]:
    """Return a cache as an argument of `model(...)` and `model.generate(...)`."""
    return _named(_arguments(type(model)), type(model).__name__, cache)


def returned_cache(output):
    """Return the cache in a model's output; None where it kept none.

    Raises:
        IncompatibleError: if the output has no field of a known name.
    """
    # The second name is not asked for where the first is there: transformers would warn.
    for name in CACHE:
        if hasattr(output, name):
            return getattr(output, name)
    incompatible(f"{type(output).__name__} has no {CACHE[0]}")


def is_empty(cache) -> bool:
    """Tell whether nothing is cached yet."""
    return cache is None or bool(cache.get_seq_length() == 0)


def prompts_in(cache) -> int:
    """Return the number of prompts whose keys are in a cache."""
    return cache.layers[0].keys.shape[0]


def bytes_in(cache) -> int:
    """Return the size of a cache's keys and values."""
    return sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)


def _named(taken: frozenset[str], where: str, cache) -> dict[str, Any]:
    """Return a cache under the name that a function takes it by."""
    for name in CACHE:
        if name in taken:
            return {name: cache}
    incompatible(f"{where} has no argument {CACHE[0]}")


# --------------------------------------------------------------------------------------------------- decoder layers


@dataclass(frozen=True)
class LayerCall:
    """Hold the arguments that a decoder calls a layer with.

    Attributes:
        hidden: (B, L, D).
        cache: None where nothing is cached.
        mask: None where attention is merely causal.
        positions: (1 or B, L).
        rotary: cos and sin, (1 or B, L, head_dim) each.
    """

    hidden: torch.Tensor
    cache: Any
    mask: torch.Tensor | None
    positions: torch.Tensor | None
    rotary: tuple[torch.Tensor, torch.Tensor]

    @classmethod
    def read(cls, args: tuple, kwargs: dict[str, Any]) -> LayerCall:
        """Return the arguments that a forward pre-hook of a layer was given.

        Raises:
            IncompatibleError: if an argument has no name that is known.
        """
        missing = [name for name in LAYER_ARGUMENTS if name not in kwargs]
        if not args:
            missing.append("hidden_states, without a name")
        if not kwargs.keys() & set(CACHE):
            missing.append(CACHE[0])
        if missing:
            by_name = ", ".join(sorted(kwargs)) or "nothing"
            incompatible(
                f"a decoder layer is called without {', '.join(missing)} (it gets {by_name} by name)"
            )
        mask, positions, rotary = (kwargs[name] for name in LAYER_ARGUMENTS)
        return cls(args[0], given_cache(kwargs), mask, positions, rotary)


def layer_arguments(
    mask: torch.Tensor | None, rotary: tuple | None = None
) -> dict[str, Any]:
    """Return the arguments that replace a decoder's own in a layer behind a reduction.

    FlashAttention takes positions with gaps for a packed batch, and the rotary embedding is
    computed already: they are left out.
    """
    mask_name, positions_name, rotary_name = LAYER_ARGUMENTS
    replaced = {mask_name: mask, positions_name: None}
    return replaced if rotary is None else {**replaced, rotary_name: rotary}


def causal_mask(
    config, hidden: torch.Tensor, valid: torch.Tensor | None, cache, layer: int
) -> torch.Tensor | None:
    """Return the mask of a layer for hidden states (B, L, D) and what its cache holds.

    Args:
        valid: (B, entries and L) bool, False for padding; None where there is none.
    """
    from transformers.masking_utils import create_causal_mask

    return create_causal_mask(
        config=config,
        inputs_embeds=hidden,
        attention_mask=valid,
        layer_idx=layer,
        # Else it would look for padding, which is there, and wait for the device.
        allow_is_causal_skip=valid is None,
        **_named(_named_parameters(create_causal_mask), "create_causal_mask", cache),
    )


def rotary_embeddings(
    decoder, hidden: torch.Tensor, positions: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return cos and sin (B, L, head_dim) of positions (B, L)."""
    return decoder.rotary_emb(hidden, position_ids=positions)


def rotate_half(x: torch.Tensor) -> torch.Tensor:
    """Return x (..., d) as Llama's rotary embedding turns it."""
    from transformers.models.llama.modeling_llama import rotate_half

    return rotate_half(x)
