"""Hold what commands share that is about the terminal."""

from __future__ import annotations

import os
import sys


def hush() -> None:
    """Let what is still printed go nowhere, as nobody reads it."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def hide_bars() -> None:
    """Libraries' own would interleave with ours. Those of downloads stay: they may take an hour."""
    for name in ("TQDM_DISABLE", "HF_DATASETS_DISABLE_PROGRESS_BARS"):
        os.environ.setdefault(name, "1")
