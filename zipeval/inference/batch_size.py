"""Find how many prompts are answered together: the number that was asked for, or that fits into memory."""

from __future__ import annotations

import sys

import torch

from zipeval.errors import UsageError

# The size that `auto` begins with, and the largest that it grows to.
FIRST, MOST = 32, 256


class BatchSize:
    """Holds the number of prompts that are answered together.

    Where it is to be found, it doubles on a GPU as long as twice the memory would fit.
    Whenever memory runs out, it halves.

    Args:
        setting: a number, or auto.
        device: where prompts are answered.

    Attributes:
        size: the number.
    """

    def __init__(self, setting: int | str, device: str):
        is_auto = setting == "auto"
        self.device = device
        self.size = FIRST if is_auto else setting
        # Only CUDA tells how much memory was in use at most.
        self.growing = is_auto and device.startswith("cuda")

    def halve(self) -> None:
        """Take half of the size, after memory ran out.

        Raises:
            UsageError: if a single prompt does not fit.
        """
        if self.size == 1:
            raise UsageError(
                f"batch_size=1: {self.device} ran out of memory with a single prompt. Run it again with "
                "model.quantization=4bit, or where there is more memory; finished tasks are kept."
            )
        self.size //= 2
        # To grow again would run out of memory again.
        self.growing = False
        message = (
            f"{self.device} ran out of memory: batch_size={self.size} from here on."
        )
        print(message, file=sys.stderr)
        torch.cuda.empty_cache()

    def grow(self, prompts: int) -> None:
        """Double the size if it may still grow, after so many prompts were answered together."""
        # The last batch of a task is smaller, and tells nothing of a full one.
        if not self.growing or prompts != self.size:
            return
        self.growing = self.size < MOST and 2 * peak_share(self.device) < 1
        if self.growing:
            self.size *= 2


def peak_share(device: str) -> float:
    """Return the largest share of a GPU's memory that was in use since the last call."""
    _, total = torch.cuda.mem_get_info(device)
    share = torch.cuda.max_memory_allocated(device) / total
    torch.cuda.reset_peak_memory_stats(device)
    return share
