"""Dividing a number of tokens over the images of a row (ours: the papers do not specify it)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from tokenprune.core.tokens import Tokens


def apportion(total: int, sizes: Sequence[int], least: int = 0) -> list[int]:
    """Divide `total` tokens over parts by size, with largest remainders; the result sums to min(total, Σ sizes).

    Args:
        total: tokens to distribute.
        sizes: tokens in each part; no part gets more than it has.
        least: minimum of every part that is not empty; if `total` is too small, the largest parts get it.
    """
    available = sum(sizes)
    total = max(0, min(total, available))
    quotas = [total * size / available if available else 0.0 for size in sizes]
    shares = [min(size, max(least, int(quota))) for size, quota in zip(sizes, quotas, strict=True)]
    parts = range(len(sizes))
    while sum(shares) > total:
        part = max((i for i in parts if shares[i]), key=lambda i: (shares[i] > least, shares[i] - quotas[i]))
        shares[part] -= 1
    while sum(shares) < total:
        part = max((i for i in parts if shares[i] < sizes[i]), key=lambda i: quotas[i] - shares[i])
        shares[part] += 1
    return shares


def top_by_image(tokens: Tokens, scores: Tensor) -> Tensor:
    """bool [batch, N]: the highest of float [batch, N] in every image, as many as its quota of `tokens.target`.

    Ties go to the lower number.
    """
    mask = torch.zeros_like(tokens.exists)
    for image in tokens.images():
        best = scores[image.row, image.index].argsort(descending=True, stable=True)[: image.quota]
        mask[image.row, image.index[best]] = True
    return mask
