"""Floating-point operations of reading a prompt, from the number of tokens that enter each decoder layer."""

from __future__ import annotations

from collections.abc import Iterable


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
    d, m, heads = config.hidden_size, config.intermediate_size, config.num_attention_heads
    width = getattr(config, "head_dim", None) or d // heads
    queries, keys = heads * width, config.num_key_value_heads * width
    weights = 2 * d * queries + 2 * d * keys + 3 * d * m
    return sum(2 * n * weights + 4 * n**2 * queries for n in lengths)
