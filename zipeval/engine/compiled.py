"""torch.compile for the blocks of a model.

At few visual tokens a GPU computes a layer faster than Python launches it.

    with method.applied(model), compile_blocks(model, method):
        model.generate(**inputs)

Blocks are compiled one by one, and their hooks stay outside. The blocks whose
projections a method watches, for what it scores by, stay as they are. There are no CUDA
graphs: transformers' growing cache is a new tensor of a new length at every step, and a
graph replays on the addresses and shapes that it was recorded with.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import nn

from zipeval import moved
from zipeval.engine import hf_names
from zipeval.engine.images import TOWERS, tower
from zipeval.engine.method import stages_of
from zipeval.engine.vision import scored_layer

# Kinds of inputs to a block: prompts and steps, with a mask and without one, a batch of
# one or more.
KINDS = 8


@contextmanager
def compile_blocks(
    model, method, backend: str | Callable = "inductor"
) -> Iterator[None]:
    """Run all blocks of encoder and decoder compiled but those that `method` watches.

    Lengths are dynamic: they are compiled for once. The model's answers stay what they
    are, up to rounding.

    Args:
        model: a model under `method`.
        method: the method that is applied to it.
        backend: of torch.compile.
    """
    blocks = [*hf_names.decoder(model).layers]
    for kind in _picture_kinds(model):
        blocks += tower(model, kind).encoder.layers
    watched = _watched_blocks(model, method)
    # A block that somebody gave a `forward` of its own gets it back in the end.
    originals = {}
    for block in blocks:
        if block not in watched:
            originals[block] = vars(block).get("forward")
    # The blocks of a model share their code, and each is compiled for by itself: its
    # number in the cache is a constant.
    limit = KINDS * len(blocks)
    limits = torch._dynamo.config.patch(
        recompile_limit=limit, accumulated_recompile_limit=limit
    )
    try:
        for block in originals:
            block.forward = torch.compile(block.forward, backend=backend, dynamic=True)
        with limits:
            yield
    finally:
        for block, forward in originals.items():
            del block.forward
            if forward is not None:
                block.forward = forward


def _picture_kinds(model) -> list[str]:
    """Return the kinds of pictures that a model has an encoder for."""
    kinds = []
    for kind, names in TOWERS.items():
        if any(hasattr(model.base_model, name) for name in names):
            kinds.append(kind)
    return kinds


def _watched_blocks(model, method) -> set[nn.Module]:
    """Return the blocks whose projections a method looks at."""
    stages = stages_of(method)
    watched = set()
    if stages.vision is not None:
        watched |= {scored_layer(model, kind) for kind in _picture_kinds(model)}
    if stages.decoder is not None:
        layers = hf_names.decoder(model).layers
        # Scores before a layer come from the attention of the layer above.
        watched |= {layers[number - 1] for number in stages.decoder.layers(len(layers))}
    return watched


# Names of before, for a release.
__getattr__ = moved.renamed(__name__)
