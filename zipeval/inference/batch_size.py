"""How many prompts are answered together: what was asked for or what fits, and half of it whenever memory runs out."""

from __future__ import annotations

import sys

import torch

from zipeval.errors import UsageError

FIRST, MOST = 32, 256


class BatchSize:
    """Doubles on a GPU as long as twice the memory would fit, if it is to be found.

    Args:
        asked: a number, or auto.
        device: where prompts are answered.

    Attributes:
        now: the size.
    """

    def __init__(self, asked: int | str, device: str):
        self.device, self.growing = (
            device,
            asked == "auto" and device.startswith("cuda"),
        )
        self.now = FIRST if asked == "auto" else asked

    def halve(self) -> None:
        """After memory ran out.

        Raises:
            UsageError: if a single prompt does not fit.
        """
        if self.now == 1:
            raise UsageError(
                f"batch_size=1: {self.device} ran out of memory with a single prompt. Run it again with "
                "model.quantization=4bit, or where there is more memory; finished tasks are kept."
            )
        self.now, self.growing = self.now // 2, False
        print(
            f"{self.device} ran out of memory: batch_size={self.now} from here on.",
            file=sys.stderr,
        )
        torch.cuda.empty_cache()

    def answered(self, prompts: int) -> None:
        """After so many prompts were answered together."""
        if self.growing and prompts == self.now:
            self.growing = self.now < MOST and 2 * peak_share(self.device) < 1
            self.now *= 2 if self.growing else 1


def peak_share(device: str) -> float:
    """Of a GPU's memory, what was in use at most since it was asked last."""
    share = torch.cuda.max_memory_allocated(device) / torch.cuda.mem_get_info(device)[1]
    torch.cuda.reset_peak_memory_stats(device)
    return share
