"""Compact ragged batches: all that drops tokens relies on this."""

from __future__ import annotations

from zipeval.engine.hf_names import PLACEHOLDERS
from zipeval.utils.lazy import torch


def compact_index(
    keep: torch.Tensor, order: torch.Tensor | None = None, length: int | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the places of kept entries when rows are squeezed to the right (left padding).

    Args:
        keep: (B, S) bool.
        order: (B, S) whole numbers from 0 up that kept entries are sorted by; as they stand without it.
        length: L, where the caller knows it. Without it the device is waited for.

    Returns:
        index (B, L) into S and valid (B, L) bool, L the largest number kept in a row. A padding
        slot points at some dropped entry and is not valid.
    """
    if length is None:
        length = int(keep.sum(1).max())
    # A stable sort puts dropped entries first and leaves all others in their order.
    key = keep.to(torch.uint8) if order is None else order.masked_fill(~keep, -1)
    index = key.argsort(dim=1, stable=True)[:, keep.shape[1] - length :]
    return index, keep.gather(1, index)


def take(x: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """Return the entries of x (B, S, ...) that index (B, L) names: (B, L, ...)."""
    trailing = x.shape[2:]
    # gather() wants an index of the shape of its result; expand() copies nothing.
    index_shape = (*index.shape, *(1 for _ in trailing))
    return x.gather(1, index.view(index_shape).expand(*index.shape, *trailing))


def left_padded(
    rows: list[torch.Tensor], padding: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return rows (L_i) of ids as one batch and its attention mask: (B, L), L the longest."""
    pad = torch.nn.utils.rnn.pad_sequence
    ids = pad(rows, batch_first=True, padding_value=padding, padding_side="left")
    mask = pad(
        [torch.ones_like(row) for row in rows], batch_first=True, padding_side="left"
    )
    return ids, mask


def on_device(numbers: list, device: torch.device) -> torch.Tensor:
    """Return numbers that the host knows as a tensor on a device.

    Unlike `torch.tensor(numbers, device=device)` this does not wait for the device.
    """
    return torch.tensor(numbers).to(device, non_blocking=True)


def visual_slots(ids: torch.Tensor, config) -> torch.Tensor:
    """Return where ids (B, S) are placeholders of images and videos: (B, S) bool."""
    slots = torch.zeros_like(ids, dtype=torch.bool)
    for name in PLACEHOLDERS:
        token = getattr(config, name, None)
        if token is not None:
            # A number, not a tensor made of it: decoding steps come by here.
            slots |= ids == token
    return slots
