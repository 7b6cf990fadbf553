"""The settings of `zipeval tune`, apart from what it imports: `zipeval tune --help` prints them at once."""

from __future__ import annotations

from dataclasses import dataclass, replace

from zipeval.errors import UsageError
from zipeval.utils import ranks

GLOBAL_BATCH = 256  # conversations to a step, of LLaVA-1.5's projector stage


@dataclass(frozen=True)
class Settings:
    """Say how the projector is trained; the defaults are the paper's where it says, and else LLaVA-1.5's projector stage.

    Attributes:
        data (FILE.json): instructions, a list of {id, image, conversations: [{from: human or gpt, value}]}.
        images (DIR): directory that their images are below.
        out (DIR): directory of the result; without it, where VisionZip‡ looks for it.
        fraction (SHARE): share of the conversations about an image that is used, drawn by the seed.
        epochs (N): passes over them.
        lr (NUMBER): the highest learning rate; it rises over the first 3% of the steps and falls as a cosine.
        batch_size (N): conversations that one process reads at once.
        accumulate (N): batches to one step; without it, as many as make at most 256 conversations over all processes.
    """

    data: str = ""
    images: str = ""
    out: str | None = None
    fraction: float = 0.1
    epochs: int = 1
    lr: float = 1e-3
    batch_size: int = 16
    accumulate: int | None = None

    def __post_init__(self):
        for name in ("data", "images"):
            if not getattr(self, name):
                raise UsageError(
                    f"{name}=: not given. Set data=FILE.json and images=DIR, LLaVA's instructions."
                )
        if not 0 < self.fraction <= 1:
            raise UsageError(
                f"fraction={self.fraction}: expected a share above 0, up to 1, such as fraction=0.1."
            )
        if not 0 < self.lr < float("inf"):
            raise UsageError(
                f"lr={self.lr}: expected a learning rate above 0, such as lr=1e-3."
            )
        for name in ("epochs", "batch_size", "accumulate"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UsageError(f"{name}={value}: expected a whole number from 1 up.")

    def resolved(self) -> Settings:
        """Return the settings with the number of batches to a step."""
        together = self.batch_size * ranks.here().count
        return replace(
            self, accumulate=self.accumulate or max(1, GLOBAL_BATCH // together)
        )
