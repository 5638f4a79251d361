"""VisionZip's tensor operations: dominant and contextual tokens of a crop, and slots of an image's new tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import normalize

from tokenprune.core.decisions import MergeGroup
from tokenprune.core.stage import Positions
from tokenprune.core.tokens import ImageTokens
from tokenprune_strategies.ops.before_projector import slots_of
from tokenprune_strategies.ops.others import without


@dataclass(frozen=True, eq=False)
class Zipped:
    """The reduced form of a crop of n patches.

    Attributes:
        crop: the crop.
        cls: whether [CLS] is kept.
        dominant: int64 [d], patches that are kept unchanged, ascending.
        targets: int64 [c], patches that others are merged into, ascending.
        weights: float32 [c, n], the weights with which each target sums patches.
    """

    crop: ImageTokens
    cls: bool
    dominant: Tensor
    targets: Tensor
    weights: Tensor


def zip_crop(crop: ImageTokens, attention: Tensor, keys: Tensor, contextual: int) -> Zipped:
    """Reduce a crop to its quota of tokens, [CLS] included; with a quota of all or none there is no [CLS].

    Args:
        crop: crop of n patches.
        attention: float32 [n], attention of [CLS].
        keys: float32 [n, C], mean over heads.
        contextual: number of contextual tokens in the quota; less than the quota.
    """
    size, share = len(attention), crop.quota
    every = torch.arange(size, device=attention.device)
    if share in (0, size):
        return Zipped(crop, False, every[:share], every[:0], attention.new_zeros(0, size))
    # (1) dominant: [CLS], and the patches with the highest [CLS] attention, in image order
    order = attention.argsort(descending=True, stable=True)
    best = share - contextual - 1
    dominant, rest = order[:best].sort().values, order[best:].sort().values
    # (2) contextual: every step-th of the rest is a target …
    targets = rest[:: max(1, len(rest) // max(1, contextual))][:contextual]
    weights = attention.new_zeros(contextual, size)
    if contextual:
        # … and every other one joins the target with the most similar key
        others = without(rest, targets, size)
        joined = (normalize(keys[others], dim=-1) @ normalize(keys[targets], dim=-1).T).argmax(1)
        weights[joined, others] = 1
        weights /= weights.sum(1, keepdim=True).clamp(min=1)
        weights[every[:contextual], targets] = 1  # its own state *plus* the mean of those that joined it
    return Zipped(crop, True, dominant, targets, weights)


def new_tokens(zipped: Sequence[Zipped], positions: Positions) -> MergeGroup:
    """The new tokens of one image, from its reduced crops; [CLS] has origin −1.

    With one crop, the order is [CLS], dominant, contextual tokens; with several crops, dominant tokens in image order,
    [CLS] of each crop, contextual tokens. For the slots see `slots_of`.
    """
    dominant = torch.cat([one.crop.index[one.dominant] for one in zipped]).sort().values
    merged = torch.cat([one.crop.index[one.targets] for one in zipped])
    none = merged.new_full((sum(one.cls for one in zipped),), -1)
    origins = torch.cat((none, dominant, merged) if len(zipped) == 1 else (dominant, none, merged))
    members = torch.cat([one.crop.index for one in zipped])
    weights = (origins[:, None] == members).float()  # each token is itself; [CLS], with origin −1, has no members
    new, old = len(origins) - len(merged), 0
    for one in zipped:  # contextual tokens come last, crop by crop
        weights[new : new + len(one.targets), old : old + len(one.crop)] = one.weights
        new, old = new + len(one.targets), old + len(one.crop)
    first = 0 if len(zipped) == 1 else len(dominant)
    slots = slots_of(origins, members, range(first, first + len(none)), positions)
    return MergeGroup(zipped[0].crop.row, slots, members, weights, origins)
