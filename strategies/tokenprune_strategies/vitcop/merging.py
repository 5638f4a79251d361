"""ViTCoP's merge at the shallow layer: tokens that each cluster keeps, and groups that become one token each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tokenprune.core.decisions import MergeGroup
from tokenprune.core.tokens import ImageTokens, Tokens
from tokenprune.utils.host_copies import on_host


@dataclass(frozen=True, eq=False)
class Groups:
    """What becomes of an image's n tokens; in the host's memory.

    Attributes:
        kept: int64 [q], tokens that stay as they are, ascending.
        places: int64 [m], the token in the middle of each group, whose place the merged token takes.
        group: int64 [n], the group of each token, −1 for those that are kept.
    """

    kept: Tensor
    places: Tensor
    group: Tensor

    @classmethod
    def whole(cls, size: int) -> Groups:
        """All `size` tokens stay as they are."""
        every = torch.arange(size)
        return cls(every, every[:0], torch.full_like(every, -1))


def merged(tokens: Tokens, norms: Tensor, *, always: bool) -> list[MergeGroup]:
    """The tokens after the merge, image by image; none if no image loses a token, and all stay as they are (ours).

    Args:
        tokens: with the clusters that the first stage noted.
        norms: float32 [batch, N], small = kept.
        always: whether the clusters of images that lose no token are merged, too, as in the authors' code.
    """
    images = tokens.images()
    if not always and all(image.quota == len(image) for image in images):
        return []
    norms, labels = on_host(norms, tokens.memory["labels"])
    groups = []
    for image in (image for image in images if image.quota):
        own = image.row, image.index_on_host
        found = Groups.whole(len(image)) if image.quota == len(image) and not always else None
        groups.append(new_tokens(image, found or grouped(norms[own], labels[own], image.quota)))
    return groups


def grouped(scores: Tensor, labels: Tensor, count: int) -> Groups:
    """Reduce an image to `count` tokens, kept and merged ones together.

    Args:
        scores: float32 [n], small = kept; in the host's memory.
        labels: int64 [n], clusters; in the host's memory.
        count: 1 … n.
    """
    names, label, sizes = torch.unique(labels, return_inverse=True, return_counts=True)
    sums = torch.zeros(len(names), dtype=torch.float32).index_add(0, label, scores.float())
    kept = torch.zeros(len(scores), dtype=torch.bool)
    if len(names) <= count:
        # every cluster keeps its quota of tokens, and the others of it become one
        order = scores.argsort(stable=True)
        for cluster, quota in enumerate(quotas(sizes.tolist(), sums, count)):
            kept[order[label[order] == cluster][:quota]] = True
        group = label.masked_fill(kept, -1)
    else:
        # the clusters of smallest sum become one token each, and all others one together
        group = sums.argsort(stable=True).argsort().clamp(max=count - 1)[label]
    members = [(group == number).nonzero().flatten() for number in range(int(group.max()) + 1)]
    places = [own[len(own) // 2] for own in members]
    return Groups(kept.nonzero().flatten(), torch.stack(places), group)


def quotas(sizes: Sequence[int], sums: Tensor, count: int) -> list[int]:
    """Tokens that each cluster keeps beside its merged one, so that all are `count` together.

    Args:
        sizes: tokens in each of K clusters.
        sums: float [K], sum of the scores in each.
        count: at least K, at most the sum of `sizes`.
    """
    rest, free = count - len(sizes), sum(sizes) - len(sizes)
    found = [min(size - 1, round((size - 1) / max(1, free) * rest)) for size in sizes]
    missing = rest - sum(found)
    # what rounding has left: one more from clusters of small sums, or one less from those of large sums; one pass is
    # enough, since rounding changes a cluster by at most 1/2
    for cluster in sums.argsort(descending=missing < 0, stable=True).tolist():
        if missing > 0 and found[cluster] < sizes[cluster] - 1:
            found[cluster], missing = found[cluster] + 1, missing - 1
        elif missing < 0 and found[cluster] > 0:
            found[cluster], missing = found[cluster] - 1, missing + 1
    return found


def new_tokens(image: ImageTokens, found: Groups) -> MergeGroup:
    """The tokens of an image after the merge; a merged one is its middle token plus the mean of its group."""
    places = torch.cat((found.kept, found.places))
    inside = (found.group == torch.arange(len(found.places))[:, None]).float()
    weights = (places[:, None] == torch.arange(len(image))).float()
    weights[len(found.kept) :] += inside / inside.sum(1, keepdim=True)
    index, weights = (part.to(image.index.device, non_blocking=True) for part in (image.index_on_host[places], weights))
    return MergeGroup(image.row, index, image.index, weights)
