"""Clustering by density peaks with nearest neighbours, which SparseVLM applies to the image tokens that it merges."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

NOISE = 1e-6


class Peaks(NamedTuple):
    """Row numbers of the centres, int64 [count], the best first; and the cluster of each row, int64 [n]."""

    centres: Tensor
    cluster: Tensor


def density_peaks(rows: Tensor, count: int, noise: Tensor | None = None) -> Peaks:
    """Cluster rows around the `count` best centres.

    A row's density is exp(−mean of its squared distances to the `count` nearest rows, itself included); the distance is
    L2 / √width. A centre is dense and far from any denser row. Each row joins its nearest centre.

    The logarithms of densities are compared, which do not underflow, and of two equally dense rows the first counts as
    denser (ours). With `noise` the densities are compared after adding 1e-6 · noise, as in the authors' code: noise
    decides if they are equal (always for mutual neighbours, if count = 2) or very small.

    Args:
        rows: [n, width], n >= count.
        count: number of clusters.
        noise: float [n], random numbers from [0, 1), or None.
    """
    distance = torch.cdist(rows.float(), rows.float()) / rows.shape[1] ** 0.5
    distance = (distance + distance.T) / 2  # exactly symmetric, so that ties are exact
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
    cluster[centres] = torch.arange(count, device=rows.device)  # also if two centres are equal
    return Peaks(centres, cluster)


def averages(cluster: Tensor, count: int) -> Tensor:
    """float32 [count, n]: weights of each cluster's average: the sum over (size + 1e-6), as in the authors' code."""
    members = (cluster == torch.arange(count, device=cluster.device)[:, None]).float()
    return members / (members.sum(1, keepdim=True) + NOISE)
