"""What prompts really cost: counted from what enters every decoder layer behind all reduction, not from what was asked.

Open it inside the method's block: hooks run in the order in which they were registered.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from zipeval.engine import hf_names
from zipeval.engine.ragged import visual_slots


@dataclass(frozen=True)
class Prefill:
    """One batch of B prompts as the L layers of the decoder read them.

    Attributes:
        text: (B) tokens of a prompt that are neither visual nor padding.
        entered: (B, L) tokens that entered a layer, padding not counted; its keys and values are that many.
    """

    text: list[int]
    entered: list[list[int]]

    def visual(self, row: int) -> list[int]:
        """(L): visual tokens of a prompt that entered each layer; methods leave text alone."""
        return [n - self.text[row] for n in self.entered[row]]


@contextmanager
def ledger(model) -> Iterator[list[Prefill]]:
    """Yields a list to which every prefill inside the block appends what it received, whatever the method claims."""
    layers = hf_names.decoder(model).layers
    prefills: list[Prefill] = []
    text: list[torch.Tensor] = []  # of the prefill in progress
    entered: list[torch.Tensor] = []

    def begin(module, args, kwargs):
        text.clear()
        entered.clear()
        cache = hf_names.given_cache(kwargs)
        if hf_names.is_empty(cache):
            ids, mask = (
                args[0] if args else kwargs["input_ids"],
                kwargs.get("attention_mask"),
            )
            valid = (
                torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()
            )
            text.append((valid & ~visual_slots(ids, model.config)).sum(1))

    def enter(module, args, kwargs):
        if text:
            call = hf_names.LayerCall.read(args, kwargs)
            entered.append(_valid(call.hidden, call.mask))

    def end(module, args, output):
        if text:
            prefills.append(Prefill(text[0].tolist(), torch.stack(entered, 1).tolist()))
            text.clear()

    hooks = [
        model.base_model.register_forward_pre_hook(begin, with_kwargs=True),
        *(layer.register_forward_pre_hook(enter, with_kwargs=True) for layer in layers),
        model.base_model.register_forward_hook(end),
    ]
    try:
        yield prefills
    finally:
        for hook in hooks:
            hook.remove()


def _valid(hidden: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """(B): slots of hidden (B, S, D) that the last one may see, from the mask that the layer was given."""
    if mask is None:
        return torch.full((len(hidden),), hidden.shape[1], device=hidden.device)
    if mask.ndim == 2:  # FlashAttention: (B, S)
        return mask.bool().sum(1)
    last = mask[:, 0, -1]  # SDPA: True where seen; eager: added to the scores
    return (last if last.dtype == torch.bool else last == 0).sum(1).expand(len(hidden))
