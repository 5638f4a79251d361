"""CSP's clustering modules: N_c image tokens that stand for all in the first layers."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from tokenprune.core.decisions import top_index
from tokenprune.core.reads import ClsAttention, Pixels, Read, TowerFeatures
from tokenprune.core.state import as_mask
from tokenprune.core.tokens import Tokens
from tokenprune_strategies.csp.instance_masks import instance_labels, segment
from tokenprune_strategies.ops.allocation import apportion, evenly, grid_mask, images_of, random_scores

if TYPE_CHECKING:
    from tokenprune_strategies.csp.csp import CSP

Clustering = Literal["uniform", "grid", "random", "cls_attention", "seg_first", "kmeans"]
"""uniform: token i · floor(N / N_c); random: seeded; cls_attention: most attended by [CLS] in the tower; seg_first:
per instance, by its area; and, ours, grid: even rows and columns; kmeans: nearest to the centres of tower features."""


def reads_of(options: CSP.Options) -> tuple[Read, ...]:
    """What the clustering module looks at."""
    if options.clustering == "cls_attention":
        return (ClsAttention(),)
    if options.clustering == "kmeans" or (options.clustering == "seg_first" and options.segmenter is None):
        return (TowerFeatures(),)
    return (Pixels(),) if options.clustering == "seg_first" else ()


def cluster(options: CSP.Options, tokens: Tokens) -> tuple[Tensor, Tensor]:
    """Representatives, bool [batch, N], and regions, int64 [batch, N]: tokens of one region share representatives."""
    regions = torch.zeros_like(tokens.image)
    if options.clustering == "uniform":
        return _strided(tokens), regions
    if options.clustering == "grid":
        return grid_mask(tokens, tokens.target), regions
    if options.clustering == "random":
        return _top(random_scores(tokens, options.seed), tokens), regions
    if options.clustering == "cls_attention":
        return _top(tokens.cls_attention.masked_fill(~tokens.exists, float("-inf")), tokens), regions
    chosen = torch.zeros_like(tokens.exists)
    for row, target in enumerate(tokens.target.tolist()):
        images = images_of(tokens, row)
        shares = apportion(target, [len(image) for image in images])
        for number, (image, share) in enumerate(zip(images, shares, strict=True)):
            if options.clustering == "kmeans":
                labels, picked = k_means(tokens.features[row, image], share, options.seed)
            else:
                labels = _instances(options, tokens, row, number, image)
                picked = sample_instances(labels, share)
            regions[row, image] = labels.to(tokens.device)
            chosen[row, image[picked.to(tokens.device)]] = True
    return chosen, regions


def nearest_representative(tokens: Tokens, chosen: Tensor, regions: Tensor) -> Tensor:
    """int64 [batch, N]: the representative of every token: the nearest on the grid, of its own region (ours).

    Where the region has no representative it is the nearest one of the image, and then of the row. Tokens without a
    grid cell are as near as their numbers are.

    Args:
        tokens: gives images and grid cells.
        chosen: bool [batch, N], the representatives.
        regions: int64 [batch, N].
    """
    numbers = torch.arange(chosen.shape[1], device=chosen.device).expand_as(chosen)
    placed = (tokens.grid >= 0).all(2)
    cells = torch.where(placed[..., None], tokens.grid, torch.stack((numbers, numbers * 0), 2)).double()
    distance = torch.cdist(cells, cells)
    far = 2 * distance.max() + 1
    other_image = tokens.image[:, :, None] != tokens.image[:, None, :]
    distance = distance + far * ((regions[:, :, None] != regions[:, None, :]) + 2 * other_image.double())
    return distance.masked_fill(~chosen[:, None, :], float("inf")).argmin(2)


def k_means(features: Tensor, count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Labels int64 [n] and `count` token numbers int64: of each k-means cluster the token nearest to its centre.

    Where features repeat so often that there are fewer clusters, evenly spaced other tokens fill up.

    Args:
        features: [n, C].
        count: clusters.
        seed: of the first centres.
    """
    from sklearn.cluster import KMeans  # type: ignore[import-untyped,unused-ignore]
    from sklearn.exceptions import ConvergenceWarning  # type: ignore[import-untyped,unused-ignore]

    values = features.detach().float().cpu()
    if count == 0:
        return torch.zeros(len(values), dtype=torch.int64), torch.zeros(0, dtype=torch.int64)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        fitted = KMeans(min(count, len(values)), n_init=1, random_state=seed).fit(values.numpy())
    labels = torch.from_numpy(fitted.labels_).long()
    distance = (values - torch.from_numpy(fitted.cluster_centers_).float()[labels]).square().sum(1)
    picked = torch.stack(
        [torch.where(labels == label, distance, torch.inf).argmin() for label in sorted(set(labels.tolist()))]
    )
    rest = torch.ones(len(values), dtype=torch.bool)
    rest[picked] = False
    others = rest.nonzero().flatten()
    missing = min(count, len(values)) - len(picked)
    return labels, torch.cat((picked, others[evenly(missing, len(others))])).sort().values


def sample_instances(labels: Tensor, count: int) -> Tensor:
    """`count` token numbers, int64: from every instance by its share of tokens, at least one, evenly spaced in it.

    Rounding by largest remainders, and sampling evenly in raster order, are ours. Where there are more instances than
    `count`, the largest get a token.

    Args:
        labels: int64 [n], the instance of every token.
        count: tokens to pick.
    """
    members = [(labels == label).nonzero().flatten() for label in sorted(set(labels.tolist()))]
    shares = apportion(count, [len(member) for member in members], least=1)
    picked = [member[evenly(share, len(member))] for member, share in zip(members, shares, strict=True)]
    return torch.cat(picked).sort().values if picked else labels.new_zeros(0)


def _strided(tokens: Tokens) -> Tensor:
    stride = (tokens.counts // tokens.target.clamp(min=1)).clamp(min=1)[:, None]
    numbers = torch.arange(tokens.exists.shape[1], device=tokens.device)
    return tokens.exists & (numbers % stride == 0) & (numbers // stride < tokens.target[:, None])


def _top(scores: Tensor, tokens: Tokens) -> Tensor:
    return as_mask(top_index(scores, tokens.target), scores.shape[1])


def _instances(options: CSP.Options, tokens: Tokens, row: int, number: int, image: Tensor) -> Tensor:
    if options.segmenter is None:
        features = tokens.features[row, image]
        return k_means(features, min(options.regions, len(image)), options.seed)[0]
    pictures = tokens.pixels[row].reshape(-1, *tokens.pixels.shape[-3:])
    masks = segment(options.segmenter, pictures[min(number, len(pictures) - 1)].cpu().numpy())
    return instance_labels(masks, tokens.grid[row, image].cpu())
