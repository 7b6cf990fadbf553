"""What prompts really cost: counted from what enters the model behind all reduction, not from what was asked for."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass


@dataclass(frozen=True)
class Prefill:
    """One batch of prompts as the model read them.

    Attributes:
        visual_tokens: per prompt.
        prompt_tokens: per prompt, visual ones included, padding not.
    """

    visual_tokens: list[int]
    prompt_tokens: list[int]


@contextmanager
def ledger(model) -> Iterator[list[Prefill]]:
    """Yields a list to which every prefill inside the block appends what it received, whatever the method claims."""
    entries: list[Prefill] = []

    def count(module, args, kwargs):
        cache = kwargs.get("past_key_values")
        if cache is not None and cache.get_seq_length() > 0:
            return
        ids = args[0] if args else kwargs["input_ids"]
        mask = kwargs.get("attention_mask")
        valid = ids.new_ones(ids.shape) if mask is None else mask
        visual = ((ids == model.config.image_token_id) & valid.bool()).sum(1)
        entries.append(Prefill(visual.tolist(), valid.sum(1).tolist()))

    hook = model.base_model.register_forward_pre_hook(count, with_kwargs=True)
    try:
        yield entries
    finally:
        hook.remove()
