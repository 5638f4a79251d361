"""CSP's clustering modules: they choose N_c image tokens that represent all others in the first layers."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Literal, NamedTuple

import torch
from torch import Tensor

from tokenprune.core.apportion import apportion
from tokenprune.core.decisions import top_mask
from tokenprune.core.options import tokens_of
from tokenprune.core.reads import ClsAttention, Pixels, Read, TowerFeatures
from tokenprune.core.stage import Shape
from tokenprune.core.tokens import ImageTokens, Tokens
from tokenprune_strategies.csp.instance_masks import instance_labels, segment
from tokenprune_strategies.ops.even_and_random import evenly, grid_mask, random_scores

if TYPE_CHECKING:
    from tokenprune_strategies.csp.csp import CSP

Clustering = Literal["uniform", "grid", "random", "cls_attention", "seg_first", "kmeans"]
"""uniform: tokens i · floor(N / N_c); random; cls_attention: those that [CLS] attends to most in the tower; seg_first:
from each instance, in proportion to its area; and, ours, grid: evenly spaced rows and columns; kmeans: those nearest to
the cluster centres of tower features."""


class Clusters(NamedTuple):
    """Representatives, bool [batch, N], and the region of each token, int64 [batch, N]."""

    representatives: Tensor
    regions: Tensor


def reads_of(options: CSP.Options, shape: Shape) -> tuple[Read, ...]:
    """The reads of the clustering module."""
    attention = ClsAttention(heads="joint" if options.faithful else "mean")
    if options.clustering is None:
        return shape.offered(attention)
    if options.clustering == "cls_attention":
        return (attention,)
    if options.clustering == "kmeans" or (options.clustering == "seg_first" and options.segmenter is None):
        return (TowerFeatures(),)
    return (Pixels(),) if options.clustering == "seg_first" else ()


def cluster(options: CSP.Options, tokens: Tokens, reads: Sequence[Read]) -> Clusters:
    """Choose representatives, and divide the image into regions if the clustering module does so.

    Args:
        options: of the strategy.
        tokens: all image tokens.
        reads: of the stage, which tell whether the tower has a [CLS] token if no module was chosen.
    """
    regions = torch.zeros_like(tokens.image)
    kind = options.clustering or ("cls_attention" if reads else "grid")
    if kind == "uniform":
        return Clusters(_strided(tokens), regions)
    if kind == "grid":
        return Clusters(grid_mask(tokens), regions)
    if kind == "random":
        return Clusters(_top(random_scores(tokens, options.seed), tokens), regions)
    if kind == "cls_attention":
        return Clusters(_top(tokens.cls_attention.masked_fill(~tokens.exists, float("-inf")), tokens), regions)
    chosen = torch.zeros_like(tokens.exists)
    for image, count in _counted(options, tokens):
        if kind == "kmeans":
            labels, picked = k_means(tokens.features[image.row, image.index], count, options.seed)
        else:
            labels = _instances(options, tokens, image)
            picked = sample_instances(labels, count, published=options.faithful)
        regions[image.row, image.index] = labels.to(tokens.device)
        chosen[image.row, image.index[picked.to(tokens.device)]] = True
    return Clusters(chosen, regions)


def _counted(options: CSP.Options, tokens: Tokens) -> Iterator[tuple[ImageTokens, int]]:
    """Each image with its part of N_c, which a stage of `seg_first` as published does not declare."""
    for images in tokens.images_by_row():
        sizes = [len(image) for image in images]
        given = options.faithful and options.clustering == "seg_first"
        shares = apportion(tokens_of(options.representatives, sum(sizes)), sizes) if given else []
        yield from zip(images, shares or [image.quota for image in images], strict=True)


def nearest_representative(tokens: Tokens, clusters: Clusters) -> Tensor:
    """int64 [batch, N]: the representative of each token, the nearest on the grid in its region (ours).

    If the region has no representative, it is the nearest one in the image, else in the row. Without grid cells, the
    distance is the difference of token numbers.

    Args:
        tokens: images and grid cells.
        clusters: representatives and regions.
    """
    chosen, regions = clusters
    numbers = torch.arange(chosen.shape[1], device=chosen.device).expand_as(chosen)
    placed = (tokens.grid >= 0).all(2)
    cells = torch.where(placed[..., None], tokens.grid, torch.stack((numbers, numbers * 0), 2)).double()
    distance = torch.cdist(cells, cells)
    far = 2 * distance.max() + 1  # other regions are farther than any cell, other images than any region
    other_image = tokens.image[:, :, None] != tokens.image[:, None, :]
    distance = distance + far * ((regions[:, :, None] != regions[:, None, :]) + 2 * other_image.double())
    return distance.masked_fill(~chosen[:, None, :], float("inf")).argmin(2)


def k_means(features: Tensor, count: int, seed: int) -> tuple[Tensor, Tensor]:
    """K-means labels int64 [n], and `count` token numbers int64: the token nearest to each cluster's centre.

    If duplicate features result in fewer clusters, evenly spaced other tokens are added.

    Args:
        features: [n, C].
        count: number of clusters.
        seed: random seed of the initial centres.
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


def sample_instances(labels: Tensor, count: int, *, published: bool = False) -> Tensor:
    """`count` token numbers, int64: from each instance in proportion to its tokens, at least one, evenly spaced.

    Rounding by largest remainders, and even spacing in raster order, are ours. If there are more instances than
    `count`, only the largest get a token.

    Args:
        labels: int64 [n], the instance of each token.
        count: tokens to pick.
        published: max(1, ⌊count · tokens of the instance / n⌋) of each instead, which may be more or fewer in all.
    """
    members = [(labels == label).nonzero().flatten() for label in sorted(set(labels.tolist()))]
    if published:
        shares = [max(1, count * len(member) // len(labels)) for member in members]
    else:
        shares = apportion(count, [len(member) for member in members], least=1)
    picked = [member[evenly(share, len(member))] for member, share in zip(members, shares, strict=True)]
    return torch.cat(picked).sort().values if picked else labels.new_zeros(0)


def _strided(tokens: Tokens) -> Tensor:
    """bool [batch, N]: token i · floor(N / N_c) for i = 0 … N_c − 1."""
    stride = (tokens.counts // tokens.target.clamp(min=1)).clamp(min=1)[:, None]
    numbers = torch.arange(tokens.exists.shape[1], device=tokens.device)
    return tokens.exists & (numbers % stride == 0) & (numbers // stride < tokens.target[:, None])


def _top(scores: Tensor, tokens: Tokens) -> Tensor:
    return top_mask(scores, tokens.target)


def _instances(options: CSP.Options, tokens: Tokens, image: ImageTokens) -> Tensor:
    """int64 [n]: the instance of each token of an image."""
    if options.segmenter is None:
        features = tokens.features[image.row, image.index]
        return k_means(features, min(options.regions, len(image)), options.seed)[0]
    pictures = tokens.pixels[image.row].reshape(-1, *tokens.pixels.shape[-3:])
    picture = pictures[min(image.image, len(pictures) - 1)].cpu().numpy()
    known = tokens.memory.setdefault("masks", {})  # several queries about one picture need its masks once
    if (key := picture.tobytes()) not in known:
        known[key] = segment(options.segmenter, picture)
    cells = tokens.on_host("grid")[image.row, image.index_on_host]
    return instance_labels(known[key], cells, tokens.grid_size(image))
