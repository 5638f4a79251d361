"""Which tokens of an image IVC-Prune keeps."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tokenprune_strategies.ivcprune.numbers import FOREGROUND, authors_target, coordinates_of
from tokenprune_strategies.ivcprune.scores import ValueScores


def selected(options: Any, quota: int, found: ValueScores, means: Tensor) -> Tensor:
    """bool [n]: the tokens of an image that stay.

    Seeds come first, then coordinates, the largest means first, then the other tokens by falling score.

    Args:
        options: of the strategy.
        quota: number of tokens to keep; ignored if `faithful`.
        found: scores and seeds of the image's n tokens.
        means: float32 [n, 2], of cos and of sin.
    """
    size = len(means)
    each = coordinates_of(options, size)
    place = places(means).amin(1)
    by_score = places(found.scores)
    order = torch.where(place < each, place, size + by_score).index_fill(0, found.seeds, -1)
    if options.faithful and options.variant == "llava":
        return (order < size) | (by_score < round(FOREGROUND * size))
    ordered = order.argsort(stable=True).argsort()
    if options.faithful:  # all seeds and coordinates, even if they are more than asked for
        return ordered < (order < size).sum().clamp(min=authors_target(options, size))
    return ordered < quota


def places(values: Tensor) -> Tensor:
    """int64 [n, …]: the place of each value among those of the first axis, by falling value, ties by number."""
    return values.argsort(dim=0, descending=True, stable=True).argsort(dim=0)
