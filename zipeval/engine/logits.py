"""Watch the logits that a model chooses its answers' tokens by.

Logits that are not numbers, of broken weights or of float16 that overflows, let a model
write nothing at all or anything. An empty answer is an answer to a benchmark; to POPE it
is "yes". So the rows with such logits are reported.

Two numbers of the logits of every answer's first token tell algorithms apart that give the
same answers: a method that merges other tokens moves every logit, and seldom the token
that is the largest.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from zipeval.utils.lazy import torch

NOT_NUMBERS = "the model's logits are not numbers (NaN or infinite)"
NO_NUMBERS = (
    f"in all of the first {{}} samples, {NOT_NUMBERS}. Look at the weights, or choose another model.dtype=, such as "
    "float32 or bfloat16. Nothing of this task was recorded."
)
# Decimals that samples keep: rounding of float32 moves the fifth.
DIGITS = 6


class LogitsWatch:
    """Look at the logits of a model's last position, since the last `clear`.

    The numbers stay on the device until somebody asks, so that nothing waits in the middle of a batch.
    """

    def __init__(self):
        self.clear()

    def clear(self) -> None:
        """Forget the batch before."""
        self._failed: torch.Tensor | None = None
        self._first: torch.Tensor | None = None

    def see(self, module, args, output) -> None:
        """Look at the last position of logits (B, L, V): a forward hook of the model.

        The log-sum-exp of a row is a number unless one of its logits is NaN or infinite, or all are minus infinity, by
        which a token is ruled out.
        """
        logits = output[0] if isinstance(output, tuple) else output.logits
        last = logits[:, -1].float()
        total = last.logsumexp(-1)
        failed = ~total.isfinite()
        # The first call of a batch, or of another one with other prompts.
        is_first = self._failed is None or len(self._failed) != len(failed)
        if is_first:
            self._failed, self._first = failed, torch.stack([last.amax(-1), total], -1)
        else:
            self._failed = self._failed | failed

    def failed(self, prompts: int) -> list[bool]:
        """Tell for each prompt whether its logits were not numbers; beams are neighbours."""
        if self._failed is None:
            return [False] * prompts
        return self._failed.view(prompts, -1).any(1).tolist()

    def digests(self, prompts: int) -> list[dict[str, float]]:
        """Return the largest logit and the log-sum-exp of each prompt's first token.

        Of several beams, the first one counts.
        """
        if self._first is None:
            return [{} for _ in range(prompts)]
        digests = []
        # [prompts, beams, 2] -> [prompts, 2]
        for logit, total in self._first.view(prompts, -1, 2)[:, 0].tolist():
            digest = {"logit": round(logit, DIGITS), "logsumexp": round(total, DIGITS)}
            digests.append(digest)
        return digests


@contextmanager
def watching_logits(model) -> Iterator[LogitsWatch]:
    """Look at the model's logits in this block."""
    watch = LogitsWatch()
    hook = model.register_forward_hook(watch.see)
    try:
        yield watch
    finally:
        hook.remove()
