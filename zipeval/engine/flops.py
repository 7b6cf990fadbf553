"""Count the floating-point operations of reading a prompt.

In the decoder they follow from the number of tokens that enter each layer; before it
they are counted as they are computed.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager


def formula(lengths: Iterable[int], config) -> int:
    """Return the sum over layers of 4nd^2 + 2n^2d + 2ndm (VisionZip, section 2.1).

    A multiply-add is one operation there, and the feed-forward network has two matrices.

    Args:
        lengths: n of every layer, text and visual tokens.
        config: the decoder's, with d = hidden_size and m = intermediate_size.
    """
    d, m = config.hidden_size, config.intermediate_size
    return sum(4 * n * d**2 + 2 * n**2 * d + 2 * n * d * m for n in lengths)


def exact(lengths: Iterable[int], config) -> int:
    """Return the operations of all matrix products of a Llama-like decoder.

    A multiply-add is two operations. Counted are grouped-query attention, a gated
    feed-forward network of three matrices, and every query against every key, as fused
    kernels without a mask compute them. Embedding, norms, rotary positions, softmax and
    the output head are left out.

    Args:
        lengths: n of every layer, text and visual tokens.
        config: the decoder's.
    """
    hidden, heads = config.hidden_size, config.num_attention_heads
    # Some configurations leave head_dim out, others have it as None.
    head_dim = getattr(config, "head_dim", None) or hidden // heads
    query_width = heads * head_dim
    key_width = config.num_key_value_heads * head_dim

    query_and_output = 2 * hidden * query_width
    key_and_value = 2 * hidden * key_width
    feed_forward = 3 * hidden * config.intermediate_size
    weights = query_and_output + key_and_value + feed_forward

    total = 0
    for length in lengths:
        products_with_weights = 2 * length * weights
        # Queries with keys, and attention weights with values.
        attention = 4 * length**2 * query_width
        total += products_with_weights + attention
    return total


@contextmanager
def before_decoder(model) -> Iterator[dict[str, int]]:
    """Yield `encoder` and `projector`, to which calls of the model add their operations.

    Counted are convolutions, products with weights and every query against every key,
    two operations a multiply-add, whatever kernel computes them. Norms, softmax, and the
    few features that a token of Mini-Gemini attends to are left out.
    """
    from torch import nn

    from zipeval.engine import hf_names

    counts = {"encoder": 0, "projector": 0}
    projector = set(hf_names.projector(model).modules())
    decoder = set(hf_names.decoder(model).modules())

    def count(part: str, is_query: bool):
        def hook(module, args, output):
            # Each output element is a product of as many terms as a unit has weights.
            counts[part] += 2 * output.numel() * module.weight[0].numel()
            if is_query:
                # [images, tokens, width]: attention itself, queries with keys and
                # weights with values, is no module of its own that could be hooked.
                counts[part] += 4 * output.numel() * output.shape[1]

        return hook

    hooks = []
    for name, module in model.base_model.named_modules():
        has_weights = isinstance(module, (nn.Linear, nn.Conv2d))
        if not has_weights or module in decoder:
            continue
        part = "projector" if module in projector else "encoder"
        hook = count(part, is_query=name.endswith(".q_proj"))
        hooks.append(module.register_forward_hook(hook))
    try:
        yield counts
    finally:
        for hook in hooks:
            hook.remove()
