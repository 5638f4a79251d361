"""Tokens made before the projector, from sums of the tower's features and from its [CLS] rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from tokenprune.core.decisions import Merge
from tokenprune.core.stage import Positions
from tokenprune.core.tokens import Tokens


def slots_of(origins: Tensor, members: Tensor, cls: range, positions: Positions) -> Tensor:
    """int64 [k]: the slots that the new tokens of an image take.

    "renumber" uses the image's first slots, in the order of `origins`. "keep" leaves tokens at their own slots, and
    puts [CLS] at the first free ones (ours).

    Args:
        origins: int64 [k], the token that each new one stands for, −1 for [CLS].
        members: int64 [n], the image's tokens in any order.
        cls: which of `origins` are [CLS].
        positions: the position policy.
    """
    image = members.sort().values
    if positions == "renumber":
        return image[: len(origins)]
    taken = (image[:, None] == origins).any(1)
    slots = origins.clone()
    slots[cls.start : cls.stop] = image[taken.int().argsort(stable=True)[: len(cls)]]
    return slots


def projected(merged: Merge, tokens: Tokens, cls: Sequence[tuple[int, int]] = ()) -> Merge:
    """The merge with its values: sums of the tower's features, and [CLS] rows, through the projector.

    Args:
        merged: of all images.
        tokens: whose reads are `TowerFeatures`, `Projector` and, for [CLS], `ClsFeatures`.
        cls: for each [CLS], in the order of the new tokens, its batch row and any token of its crop; [CLS] are all new
            tokens without an origin, or none.
    """
    features = tokens.features.masked_fill(~tokens.exists[..., None], 0)  # padding may contain NaN
    rows = merged.weights @ features.float()
    if cls:
        assert merged.origin is not None
        where = (merged.index >= 0) & (merged.origin < 0)
        found = torch.stack([tokens.cls_features[row, token] for row, token in cls]).to(rows)
        number = (where.flatten().cumsum(0) - 1).clamp(min=0).view_as(where)
        rows = torch.where(where[..., None], found[number], rows)
    return replace(merged, values=tokens.project(rows.to(features.dtype)))
