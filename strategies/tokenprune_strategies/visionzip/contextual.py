"""The tensor side of VisionZip: dominant and contextual tokens of a crop, and where an image's new tokens go."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import normalize

from tokenprune.core.stage import Positions


@dataclass(frozen=True)
class Zipped:
    """What is left of a crop of n patches.

    Attributes:
        cls: whether [CLS] is passed on.
        dominant: int64 [d], patches passed on as they are, ascending.
        targets: int64 [c], patches that others are merged into, ascending.
        weights: float32 [c, n], what every target sums up.
    """

    cls: bool
    dominant: Tensor
    targets: Tensor
    weights: Tensor


def zip_crop(attention: Tensor, keys: Tensor, share: int, contextual: int) -> Zipped:
    """Reduce a crop to `share` tokens; all of them or none are taken as they are.

    Args:
        attention: float32 [n], of [CLS].
        keys: float32 [n, C], mean over heads.
        share: tokens to end up with, [CLS] included.
        contextual: how many of them are merged ones, fewer than `share`.
    """
    size = len(attention)
    every = torch.arange(size, device=attention.device)
    if share in (0, size):
        return Zipped(False, every[:share], every[:0], attention.new_zeros(0, size))
    order = attention.argsort(descending=True, stable=True)
    best = share - contextual - 1
    dominant, rest = order[:best].sort().values, order[best:].sort().values
    targets = rest[:: max(1, len(rest) // max(1, contextual))][:contextual]
    weights = attention.new_zeros(contextual, size)
    if contextual:
        others = rest[~torch.isin(rest, targets)]
        joined = (normalize(keys[others], dim=-1) @ normalize(keys[targets], dim=-1).T).argmax(1)
        weights[joined, others] = 1
        weights /= weights.sum(1, keepdim=True).clamp(min=1)
        weights[every[:contextual], targets] = 1
    return Zipped(True, dominant, targets, weights)


def line_up(
    crops: Sequence[Tensor], zipped: Sequence[Zipped], size: int, positions: Positions
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The new tokens of one image: slots int64 [m] ascending, origins int64 [m] (−1 for [CLS]), for each [CLS] a token
    of its crop (−1 for all others), weights float32 [m, size].

    Of one crop [CLS] comes first, then dominant and contextual tokens; of several crops their [CLS] come between the
    two. "renumber" takes the image's first slots in this order. "keep" leaves tokens at their own slots and puts [CLS]
    at the first ones that became free (ours).

    Args:
        crops: int64 [n], token numbers of each crop within the row.
        zipped: what is left of them.
        size: tokens of the row.
        positions: the policy.
    """
    pairs = list(zip(crops, zipped, strict=True))
    dominant = torch.cat([crop[left.dominant] for crop, left in pairs]).sort().values
    whole = torch.cat([crop[: left.cls] for crop, left in pairs])
    merged = torch.cat([crop[left.targets] for crop, left in pairs])
    none = torch.full_like(whole, -1)
    origins = torch.cat((none, dominant, merged) if len(crops) == 1 else (dominant, none, merged))
    marks = torch.full_like(origins, -1)
    marks[origins < 0] = whole
    weights = zipped[0].weights.new_zeros(len(origins), size)
    own = (origins >= 0).nonzero().flatten()
    weights[own, origins[own]] = 1
    start = len(origins) - len(merged)
    for crop, left in pairs:
        weights[start : start + len(left.targets), crop] = left.weights
        start += len(left.targets)
    image = torch.cat(list(crops)).sort().values
    if positions == "renumber":
        return image[: len(origins)], origins, marks, weights
    slots = origins.clone()
    slots[origins < 0] = image[~torch.isin(image, origins)][: len(whole)]
    slots, order = slots.sort()
    return slots, origins[order], marks[order], weights[order]
