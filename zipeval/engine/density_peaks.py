"""Clustering by fast search and find of density peaks (Rodriguez & Laio, Science 2014), as SparseVLM merges tokens."""

from __future__ import annotations

import torch
from torch.nn.functional import one_hot


def merge(x: torch.Tensor, count: int, noise: torch.Tensor) -> torch.Tensor:
    """(n, D) -> (count, D): the means of `count` clusters.

    Distances and densities are at least in float32: half precision would make different densities equal.

    Args:
        noise: (n,) added to the densities, which tells equal ones apart.
    """
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    distance = torch.cdist(x[None], x[None], compute_mode="donot_use_mm_for_euclid_dist")[0] / x.shape[1] ** 0.5
    nearest = distance.topk(count, largest=False).values  # a token is its own nearest neighbour
    density = (-(nearest**2).mean(1)).exp() + noise
    reach = distance.masked_fill(density <= density[:, None], distance.max()).amin(1)
    centre = (reach * density).topk(count).indices
    member = distance[centre].argmin(0)
    member[centre] = torch.arange(count, device=x.device)
    joined = one_hot(member, count).to(x.dtype)
    return (joined / (joined.sum(0) + 1e-6)).T @ x
