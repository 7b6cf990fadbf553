"""Compaction of a ragged batch: the tensor trick everything that drops tokens relies on."""

from __future__ import annotations

import torch


def compact_index(keep: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Where the kept entries of every row go when rows are squeezed to the right (left padding).

    Args:
        keep: (B, S) bool.

    Returns:
        index (B, L) into S and valid (B, L) bool, L the largest number kept in a row. Kept entries stay in order; a
        padding slot points at some dropped entry and is not valid.
    """
    length = int(keep.sum(1).max())
    order = keep.to(torch.uint8).argsort(dim=1, stable=True)
    index = order[:, keep.shape[1] - length :]
    return index, keep.gather(1, index)


def take(x: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """x (B, S, ...), index (B, L) -> (B, L, ...)."""
    trailing = x.shape[2:]
    return x.gather(1, index.view(*index.shape, *(1,) * len(trailing)).expand(*index.shape, *trailing))
