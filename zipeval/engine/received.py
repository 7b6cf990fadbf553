"""Compute the attention that patches receive in an encoder.

It comes from what `q_proj` and `k_proj` of a layer give; SDPA stays on. Where the encoder
has a CLS token it is the attention of CLS, which gathers what the image is about; where
there is none (SigLIP), that of all tokens on average (VisionZip, section 2.2).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from zipeval import moved
from zipeval.engine.images import cls_tokens, tower
from zipeval.utils.lazy import torch

# Rows of an attention map that are held at a time.
ROWS = 64


def attention_received(
    queries: torch.Tensor, keys: torch.Tensor, heads: int, prefix: int
) -> torch.Tensor:
    """Return the softmaxed attention that each of P patches gets: (N, H, P) float32.

    Args:
        queries, keys: (N, S, H * d) of a layer's self-attention, bias included.
        heads: H.
        prefix: S - P, tokens before the patches: 1 with CLS, else 0.
    """
    # In float32: a product of float16 overflows where the model's own attention, which
    # adds up in float32, does not. [images, heads, tokens, width of a head]
    queries, keys = (
        x.float().unflatten(-1, (heads, -1)).transpose(1, 2) for x in (queries, keys)
    )
    rows = queries[:, :, :1] if prefix else queries
    total = 0
    for block in rows.split(ROWS, 2):
        scores = block @ keys.mT * keys.shape[-1] ** -0.5
        total = total + scores.softmax(-1, dtype=torch.float32).sum(2)
    return total[..., prefix:] / rows.shape[2]


@contextmanager
def record_attention(model, kind: str = "image") -> Iterator[list[torch.Tensor]]:
    """Yield a list to which every layer through which crops pass adds a tensor.

    It is what their patches receive, (N, P), averaged over heads.
    """
    by_layer, hooks, prefix = [], [], cls_tokens(model)

    def watch(attention) -> None:
        projected = {}

        def remember(name):
            return lambda module, args, output: projected.update({name: output})

        def finish(module, args, output):
            scores = attention_received(
                **projected, heads=module.num_heads, prefix=prefix
            )
            by_layer.append(scores.mean(1))

        hooks.append(attention.q_proj.register_forward_hook(remember("queries")))
        hooks.append(attention.k_proj.register_forward_hook(remember("keys")))
        hooks.append(attention.register_forward_hook(finish))

    try:
        for layer in tower(model, kind).encoder.layers:
            watch(layer.self_attn)
        yield by_layer
    finally:
        for hook in hooks:
            hook.remove()


# Names of before, for a release.
__getattr__ = moved.renamed(__name__)
