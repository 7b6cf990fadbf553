"""Logits that are not numbers: broken weights, or float16 that overflows, let a model write nothing at all or anything.

An empty answer is an answer to a benchmark; to POPE it is "yes". So the rows whose logits are not numbers are told.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from zipeval.lazy import torch

NOT_NUMBERS = "the model's logits are not numbers (NaN or infinite)"
NO_NUMBERS = (
    f"in all of {{}} samples, {NOT_NUMBERS}. Look at the weights, or choose another model.dtype=, such as float32 or "
    "bfloat16. Nothing of this task was recorded."
)


class LogitsWatch:
    """Remembers in which rows of a batch the model's logits were not numbers, since the last `clear`."""

    def __init__(self):
        self._failed: torch.Tensor | None = None

    def clear(self) -> None:
        """Forget the batch before."""
        self._failed = None

    def see(self, module, args, output) -> None:
        """Look at the logits (B, L, V) of the last slot, without waiting for the device: a forward hook of the model.

        A logit of minus infinity is a token that is ruled out; a row of nothing else is no distribution.
        """
        logits = output[0] if isinstance(output, tuple) else output.logits
        last = logits[:, -1]
        failed = last.isnan().any(-1) | last.isposinf().any(-1) | last.isneginf().all(-1)
        same_batch = self._failed is not None and len(self._failed) == len(failed)
        self._failed = self._failed | failed if same_batch else failed

    def failed(self, prompts: int) -> list[bool]:
        """Tell of each prompt whether its logits were not numbers; beams of a prompt are its neighbours."""
        if self._failed is None:
            return [False] * prompts
        return self._failed.view(prompts, -1).any(1).tolist()


@contextmanager
def watching_logits(model) -> Iterator[LogitsWatch]:
    """While open, the model's logits are looked at."""
    watch = LogitsWatch()
    hook = model.register_forward_hook(watch.see)
    try:
        yield watch
    finally:
        hook.remove()
