"""Record what prompts really cost.

Counted is what enters every decoder layer behind all reduction, not what a method was
asked for.

Open it inside the method's block: hooks run in the order in which they were registered.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from zipeval import moved
from zipeval.engine import hf_names
from zipeval.engine.ragged import visual_slots


@dataclass(frozen=True)
class Prefill:
    """Hold one batch of B prompts as the L layers of the decoder read them.

    Attributes:
        text: (B) tokens of a prompt that are neither visual nor padding.
        entered: (B, L) tokens that entered a layer, padding not counted; its keys and values are that many.
    """

    text: list[int]
    entered: list[list[int]]

    def visual(self, row: int) -> list[int]:
        """Return the visual tokens of a prompt that entered each layer; text is left alone."""
        return [n - self.text[row] for n in self.entered[row]]


@contextmanager
def record_prefill(model) -> Iterator[list[Prefill]]:
    """Yield a list to which every prefill inside the block is added.

    It is counted from what layers get, whatever the method claims.
    """
    layers = hf_names.decoder(model).layers
    prefills: list[Prefill] = []
    text: list[torch.Tensor] = []  # of the prefill in progress
    entered: list[torch.Tensor] = []

    def begin(module, args, kwargs):
        text.clear()
        entered.clear()
        is_prefill = hf_names.is_empty(hf_names.given_cache(kwargs))
        if not is_prefill:
            return
        ids = hf_names.given_ids(args, kwargs)
        is_text = ~visual_slots(ids, model.config)
        mask = kwargs.get("attention_mask")
        if mask is not None:
            is_text = is_text & mask.bool()
        text.append(is_text.sum(1))

    def enter(module, args, kwargs):
        # There is text while a prefill is in progress, and not in a decoding step.
        if text:
            call = hf_names.LayerCall.read(args, kwargs)
            entered.append(_count_valid(call.hidden, call.mask))

    def end(module, args, output):
        # Only now the host waits for the device, which has all of the prompt to do.
        if text:
            prefills.append(Prefill(text[0].tolist(), torch.stack(entered, 1).tolist()))
            text.clear()

    hooks = [
        model.base_model.register_forward_pre_hook(begin, with_kwargs=True),
        model.base_model.register_forward_hook(end),
    ]
    for layer in layers:
        hooks.append(layer.register_forward_pre_hook(enter, with_kwargs=True))
    try:
        yield prefills
    finally:
        for hook in hooks:
            hook.remove()


def _count_valid(hidden: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """Return the number of slots that the last one may see: (B).

    Args:
        hidden: (B, S, D).
        mask: the one that the layer was given.
    """
    if mask is None:
        return torch.full((len(hidden),), hidden.shape[1], device=hidden.device)
    # FlashAttention takes a mask (B, S).
    if mask.ndim == 2:
        return mask.bool().sum(1)
    # The others take (B or 1, 1, S, S): SDPA's is True where a slot is seen, the eager
    # one's is added to the scores.
    last = mask[:, 0, -1]
    is_seen = last if last.dtype == torch.bool else last == 0
    return is_seen.sum(1).expand(len(hidden))


# Names of before, for a release.
__getattr__ = moved.renamed(__name__)
