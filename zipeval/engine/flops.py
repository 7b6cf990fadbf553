"""Floating-point operations of reading a prompt: in the decoder from the number of tokens that enter each layer, before
it as they are computed.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager


def formula(lengths: Iterable[int], config) -> int:
    """Sum over layers of 4nd^2 + 2n^2d + 2ndm (VisionZip, section 2.1): a multiply-add is one operation, and the
    feed-forward network has two matrices.

    Args:
        lengths: n of every layer, text and visual tokens.
        config: the decoder's, with d = hidden_size and m = intermediate_size.
    """
    d, m = config.hidden_size, config.intermediate_size
    return sum(4 * n * d**2 + 2 * n**2 * d + 2 * n * d * m for n in lengths)


def exact(lengths: Iterable[int], config) -> int:
    """All matrix products of a Llama-like decoder, two operations a multiply-add: grouped-query attention, a gated
    feed-forward network of three matrices, every query against every key as fused kernels without a mask are counted.

    Embedding, norms, rotary positions, softmax and the output head are left out.
    """
    d, m, heads = (
        config.hidden_size,
        config.intermediate_size,
        config.num_attention_heads,
    )
    width = getattr(config, "head_dim", None) or d // heads
    queries, keys = heads * width, config.num_key_value_heads * width
    weights = 2 * d * queries + 2 * d * keys + 3 * d * m
    return sum(2 * n * weights + 4 * n**2 * queries for n in lengths)


@contextmanager
def before_decoder(model) -> Iterator[dict[str, int]]:
    """Yields `encoder` and `projector`, to which calls of the model inside the block add theirs: convolutions, products
    with weights and every query against every key, two operations a multiply-add, whatever kernel computes them.

    Norms, softmax, and the few features that a token of Mini-Gemini attends to are left out.
    """
    from torch import nn

    from zipeval.engine import hf_names

    base, found = model.base_model, {"encoder": 0, "projector": 0}
    projector, decoder = (
        set(part.modules())
        for part in (hf_names.projector(model), hf_names.decoder(model))
    )

    def count(name, kind):
        def hook(module, args, output):
            found[kind] += 2 * output.numel() * module.weight[0].numel()
            if name.endswith(".q_proj"):  # (N, S, D)
                found[kind] += 4 * output.numel() * output.shape[1]

        return hook

    hooks = [
        module.register_forward_hook(
            count(name, "projector" if module in projector else "encoder")
        )
        for name, module in base.named_modules()
        if isinstance(module, (nn.Linear, nn.Conv2d)) and module not in decoder
    ]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()
