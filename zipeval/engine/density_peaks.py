"""Clustering by fast search and find of density peaks (Rodriguez & Laio, Science 2014), as SparseVLM merges tokens."""

from __future__ import annotations

from zipeval.engine.ragged import on_device, take
from zipeval.utils.lazy import torch


def merge(
    x: torch.Tensor, sizes: list[int], counts: list[int], noise: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The means of clusters in each of B sets of points.

    Distances and densities are at least in float32: half precision would make different densities equal.

    Args:
        x: (B, R, D), of which the first `sizes[b]` are the b-th set.
        sizes: (B), R the largest.
        counts: (B) clusters to make, up to M, and no more than points.
        noise: (B, R) added to the densities, which tells equal ones apart.

    Returns:
        (B, M, D), and which of these there are, (B, M) bool.
    """
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    size, count = (on_device(numbers, x.device)[:, None] for numbers in (sizes, counts))
    clusters = torch.arange(max(counts), device=x.device)
    point, made = torch.arange(x.shape[1], device=x.device) < size, clusters < count
    pair = point[:, :, None] & point[:, None]
    distance = (
        torch.cdist(x, x, compute_mode="donot_use_mm_for_euclid_dist")
        / x.shape[2] ** 0.5
    )
    furthest = distance.masked_fill(~pair, 0).amax((1, 2), keepdim=True)
    distance = distance.masked_fill(~pair, float("inf"))
    nearest = distance.topk(len(clusters), largest=False).values.masked_fill(
        ~made[:, None], 0
    )  # itself is one
    density = (-(nearest**2).sum(2) / count.clamp(min=1)).exp() + noise
    density = density.masked_fill(~point, float("-inf"))
    reach = torch.where(density[:, None] > density[..., None], distance, furthest).amin(
        2
    )
    peak = (reach * density).masked_fill(~point, float("-inf"))
    centre = peak.topk(len(clusters)).indices
    towards = take(distance, centre).scatter(
        2, centre[..., None], -1
    )  # a centre is its own, equal points or not
    member = towards.masked_fill(~made[..., None], float("inf")).argmin(1)
    joined = ((member[..., None] == clusters) & point[..., None]).to(x.dtype)
    return (joined / (joined.sum(1, keepdim=True) + 1e-6)).mT @ x, made
