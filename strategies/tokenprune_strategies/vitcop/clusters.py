"""ViTCoP's choice of patches, and their clusters: density peaks of the tower's keys among neighbours on the grid."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tokenprune.core.tokens import ImageTokens, Tokens
from tokenprune_strategies.ops.authors_grid import check_authors_grid

SCALE = 8.0  # distance of two keys at which each adds 1/e to the other's density
REACH = 0.6  # how far away on the grid, whose sides are 1, the parent of a patch can be


@dataclass(frozen=True, eq=False)
class Selected:
    """Chosen patches, bool [batch, N], and the clusters of these, int64 [batch, N], different ones in each crop."""

    mask: Tensor
    labels: Tensor


@dataclass(frozen=True, eq=False)
class Clusters:
    """Clusters of n patches.

    Attributes:
        density: float32 [n].
        centres: int64 [count], the best first.
        labels: int64 [n], the place of the cluster's centre in `centres`; −1 where a patch leads to no centre, which is
            a cluster, too.
    """

    density: Tensor
    centres: Tensor
    labels: Tensor


def selected(tokens: Tokens, share: float, *, faithful: bool) -> Selected:
    """The patches of each crop that [CLS] attends to most, as many as its quota, and their clusters.

    Args:
        tokens: with the reads of the stage.
        share: clusters, as a share of the chosen patches.
        faithful: whether to raise OptionError for what the authors' code cannot process.
    """
    mask, labels, rows = torch.zeros_like(tokens.exists), torch.zeros_like(tokens.image), tokens.images_by_row()
    if faithful:
        check_authors_grid("vitcop", tokens, rows, lambda h, w: h == w == 24, "one image of 24 x 24 patches")
    for number, crop in enumerate(crop for row in rows for crop in row if crop.quota):
        order = tokens.cls_attention[crop.row, crop.index].argsort(descending=True, stable=True)
        best = order[: crop.quota].sort().values
        own = crop.row, crop.index[best]
        found = clusters(tokens.keys[own], _places(tokens, crop)[best], max(1, int(crop.quota * share)))
        mask[own], labels[own] = True, found.labels + number * (mask.shape[1] + 1)
    return Selected(mask, labels)


def clusters(keys: Tensor, places: Tensor, count: int) -> Clusters:
    """Cluster patches around the `count` best centres, which are dense and far from any denser patch.

    Args:
        keys: float32 [n, C], n >= 1.
        places: float32 [n, 2], on a grid whose sides are 1.
        count: number of clusters; at most n.
    """
    numbers = torch.arange(len(keys), device=keys.device)
    apart = _distance(keys)
    density = (-((apart / SCALE) ** 2)).exp().sum(1)
    # a patch's parent is the nearest other patch in reach that is at least as dense; if there is none, the first patch
    denser = (density >= density[:, None]) & (_distance(places) <= REACH) & (numbers != numbers[:, None])
    delta, parent = apart.masked_fill(~denser, float("inf")).min(1)
    parent = torch.where(delta.isinf(), 0, parent)
    centres = (delta * density).argsort(descending=True, stable=True)[:count]
    # a patch belongs to the centre that its parents lead to; each round doubles their steps
    parent = parent.scatter(0, centres, centres)
    for _ in range(len(keys).bit_length()):
        parent = parent[parent]
    labels = torch.full_like(parent, -1).scatter(0, centres, numbers[:count])
    return Clusters(density, centres, labels[parent])


def _places(tokens: Tokens, crop: ImageTokens) -> Tensor:
    """float32 [n, 2]: the cells of a crop's tokens on a grid whose sides are 1; one place for all if they have none."""
    cells = tokens.on_host("grid")[crop.row, crop.index_on_host]
    cells = cells - cells.amin(0)
    return (cells.float() / (cells.amax(0) + 1).float()).to(tokens.device, non_blocking=True)


def _distance(rows: Tensor) -> Tensor:
    """float32 [n, n]: Euclidean, with the authors' epsilon, and exactly symmetric, so that ties are exact."""
    apart: Tensor = torch.cdist(rows, rows, compute_mode="donot_use_mm_for_euclid_dist")
    return (apart.square() + 1e-8).sqrt().fill_diagonal_(0)
