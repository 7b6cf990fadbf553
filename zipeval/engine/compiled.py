"""torch.compile for the blocks of a model: at few visual tokens a GPU computes a layer faster than Python launches it.

    with method.applied(model), compiled(model, method):
        model.generate(**inputs)

Blocks are compiled one by one, and their hooks stay outside. The blocks whose projections a method watches, for what it
scores by, stay as they are. There are no CUDA graphs: transformers' growing cache is a new tensor of a new
length at every step, and a graph replays on the addresses and shapes that it was recorded with.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import nn

from zipeval.engine import hf_names
from zipeval.engine.decoder import DecoderMethod
from zipeval.engine.images import TOWERS, tower
from zipeval.engine.vision import VisionMethod, scored

KINDS = 8  # of inputs to a block: prompts and steps, with a mask and without one, a batch of one or more


@contextmanager
def compiled(model, method, backend: str | Callable = "inductor") -> Iterator[None]:
    """While open, all blocks of encoder and decoder run compiled but those that `method` watches.

    Lengths are dynamic: they are compiled for once.

    Args:
        model: its answers stay what they are, up to rounding.
        method: that is applied to it.
        backend: of torch.compile.
    """
    blocks = [*hf_names.decoder(model).layers]
    for kind in _kinds(model):
        blocks += tower(model, kind).encoder.layers
    watched = _watched(model, method)
    before = {
        block: vars(block).get("forward") for block in blocks if block not in watched
    }
    # The blocks of a model share their code, each is compiled for by itself: its number in the cache is a constant.
    limit = KINDS * len(blocks)
    try:
        for block in before:
            block.forward = torch.compile(block.forward, backend=backend, dynamic=True)
        with torch._dynamo.config.patch(
            recompile_limit=limit, accumulated_recompile_limit=limit
        ):
            yield
    finally:
        for block, forward in before.items():
            del block.forward
            if forward is not None:
                block.forward = forward


def _kinds(model) -> list[str]:
    """Of pictures that it has an encoder for."""
    return [
        kind
        for kind, names in TOWERS.items()
        if any(hasattr(model.base_model, name) for name in names)
    ]


def _watched(model, method) -> set[nn.Module]:
    """The blocks whose projections a method looks at."""
    found = set()
    layers = hf_names.decoder(model).layers
    for part in (getattr(method, "first", method), getattr(method, "second", None)):
        if isinstance(part, VisionMethod):
            found |= {scored(model, kind) for kind in _kinds(model)}
        elif isinstance(part, DecoderMethod):
            found |= {layers[layer - 1] for layer in part.layers(len(layers))}
    return found
