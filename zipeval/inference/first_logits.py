"""Keep two numbers of the logits from which the first token of every answer was chosen.

They tell algorithms apart that give the same answers: a method that merges other tokens moves every logit, and seldom
the token that is the largest.
"""

from __future__ import annotations

import torch
from transformers import LogitsProcessor

DIGITS = 6  # decimals that samples keep: rounding of float32 moves the fifth


class FirstLogits(LogitsProcessor):
    """Observe the first step of `generate` and change nothing.

    Attributes:
        summary: (B, 2) the largest logit of each prompt's last position and the log-sum-exp of all of them. It stays on
            the device: reading it would make the device wait in the middle of a batch.
    """

    def __init__(self) -> None:
        self.summary: torch.Tensor | None = None

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Return the scores (B, vocabulary) as they are."""
        if self.summary is None:
            logits = scores.float()
            self.summary = torch.stack([logits.amax(-1), logits.logsumexp(-1)], -1)
        return scores

    def digests(self, prompts: int) -> list[dict[str, float]]:
        """Return the digest of each of so many prompts; of a prompt's beams the first one's."""
        if self.summary is None:  # nothing was generated
            return [{} for _ in range(prompts)]
        beams = len(self.summary) // prompts
        rows = self.summary[::beams].tolist()
        return [{"logit": round(logit, DIGITS), "logsumexp": round(total, DIGITS)} for logit, total in rows]
