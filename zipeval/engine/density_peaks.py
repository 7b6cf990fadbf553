"""Cluster by fast search and find of density peaks (Rodriguez & Laio, Science 2014).

SparseVLM merges tokens so.
"""

from __future__ import annotations

from zipeval.engine.ragged import on_device, take
from zipeval.utils.lazy import torch


def merge(
    x: torch.Tensor, sizes: list[int], counts: list[int], noise: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the means of clusters in each of B sets of points.

    Distances and densities are at least in float32: half precision would make different densities equal.

    Args:
        x: (B, R, D), of which the first `sizes[b]` are the b-th set.
        sizes: (B), R the largest.
        counts: (B) clusters to make, up to M, and no more than points.
        noise: (B, R) added to the densities, which tells equal ones apart.

    Returns:
        The means (B, M, D), and which of these there are, (B, M) bool.
    """
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    size = on_device(sizes, x.device)[:, None]
    count = on_device(counts, x.device)[:, None]
    clusters = torch.arange(max(counts), device=x.device)
    is_point = torch.arange(x.shape[1], device=x.device) < size  # [B, R]
    is_cluster = clusters < count  # [B, M]
    is_pair = is_point[:, :, None] & is_point[:, None]  # [B, R, R]

    distance = torch.cdist(x, x, compute_mode="donot_use_mm_for_euclid_dist")
    distance = distance / x.shape[2] ** 0.5
    furthest = distance.masked_fill(~is_pair, 0).amax((1, 2), keepdim=True)
    distance = distance.masked_fill(~is_pair, float("inf"))

    # Density: of as many nearest neighbours as clusters; a point itself is one of them.
    nearest = distance.topk(len(clusters), largest=False).values
    nearest = nearest.masked_fill(~is_cluster[:, None], 0)
    density = (-(nearest**2).sum(2) / count.clamp(min=1)).exp() + noise
    density = density.masked_fill(~is_point, float("-inf"))

    # Centres are dense, and far from all points that are denser.
    is_denser = density[:, None] > density[..., None]
    reach = torch.where(is_denser, distance, furthest).amin(2)
    peak = (reach * density).masked_fill(~is_point, float("-inf"))
    centre = peak.topk(len(clusters)).indices  # [B, M]

    # Every point joins the nearest centre; a centre is its own, equal points or not.
    to_centre = take(distance, centre).scatter(2, centre[..., None], -1)  # [B, M, R]
    to_centre = to_centre.masked_fill(~is_cluster[..., None], float("inf"))
    member = to_centre.argmin(1)
    joined = ((member[..., None] == clusters) & is_point[..., None]).to(x.dtype)
    # [B, R, M]; the official code's 1e-6 keeps a cluster of nothing from dividing by 0.
    weights = joined / (joined.sum(1, keepdim=True) + 1e-6)
    return weights.mT @ x, is_cluster
