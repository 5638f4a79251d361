"""Clustering by density peaks with nearest neighbours, as SparseVLM clusters the image tokens that it merges."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

NOISE = 1e-6


class Peaks(NamedTuple):
    """Centres, int64 [count], row numbers, the best first; and the cluster of every row, int64 [n]."""

    centres: Tensor
    cluster: Tensor


def density_peaks(rows: Tensor, count: int, noise: Tensor | None = None) -> Peaks:
    """Cluster rows around the `count` best centres.

    A row's density is exp(−mean of its squared distances to the `count` nearest rows, itself included), distances being
    L2 / √width. A centre is dense and far from any denser row. Every row joins its nearest centre.

    Densities are compared by their logarithms, which do not underflow, and of two equally dense rows the first counts
    as denser (ours). With `noise` they are compared as they are, each with 1e-6 of its draw added, as the authors do:
    where densities are equal (always so between mutual neighbours, if count = 2) or too small, the draw decides.

    Args:
        rows: [n, width], n >= count.
        count: clusters.
        noise: float [n] of draws from [0, 1), or None.
    """
    distance = torch.cdist(rows.float(), rows.float()) / rows.shape[1] ** 0.5
    distance = (distance + distance.T) / 2  # equal both ways to the last bit, so that ties are ties
    density = -distance.topk(count, largest=False).values.square().mean(1)
    if noise is None:
        order = torch.arange(len(rows), device=rows.device)
        denser = (density > density[:, None]) | ((density == density[:, None]) & (order < order[:, None]))
    else:
        density = density.exp() + NOISE * noise.to(density)
        denser = density > density[:, None]
    apart = torch.where(denser, distance, float("inf")).amin(1)
    apart = torch.where(apart.isinf(), distance.max(), apart)
    score = apart.log() + density if noise is None else apart * density
    centres = score.argsort(descending=True, stable=True)[:count]
    cluster = distance[:, centres].argmin(1)
    cluster[centres] = torch.arange(count, device=rows.device)  # also where two centres are copies of each other
    return Peaks(centres, cluster)


def averages(cluster: Tensor, count: int) -> Tensor:
    """float32 [count, n]: the weights that make each cluster's sum over (its size + 1e-6), the authors' average."""
    members = (cluster == torch.arange(count, device=cluster.device)[:, None]).float()
    return members / (members.sum(1, keepdim=True) + NOISE)
