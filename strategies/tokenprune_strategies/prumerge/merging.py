"""PruMerge's tensor operations: outliers, merging weights, and slots of merged tokens."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from tokenprune.core.decisions import MergeGroup
from tokenprune.core.stage import Positions
from tokenprune.core.tokens import ImageTokens

NEIGHBOURS = 32


def outlier_share(attention: Tensor) -> float:
    """The share of float [N] that lies above Q3 + 1.5 · IQR, numpy's percentiles."""
    values = attention.detach().cpu().numpy()
    low, high = np.percentile(values, (25, 75))
    return float((values > high + 1.5 * (high - low)).mean())


def merge_weights(attention: Tensor, keys: Tensor, kept: Tensor) -> Tensor:
    """float32 [k + 1, N]: the weights with which each kept token, and finally the extra one, sums the image's tokens.

    Args:
        attention: float32 [N], attention of [CLS].
        keys: [N, C], keys of the patches.
        kept: int64 [k], kept tokens.
    """
    numbers = torch.arange(len(kept), device=kept.device)
    directions = torch.nn.functional.normalize(keys.float(), dim=-1)
    likeness = directions[kept] @ directions.T
    likeness[numbers, kept] = float("-inf")  # a token is not its own neighbour
    near = likeness.topk(min(NEIGHBOURS, len(keys) - 1), dim=1).indices
    weights = torch.zeros(len(kept) + 1, len(keys), dtype=torch.float32, device=kept.device)
    weights[:-1].scatter_(1, near, attention[near])  # x_i + Σ a_j x_j, over kept and other neighbours, not normalised
    weights[numbers, kept] = 1
    weights[-1] = attention  # the extra token: Σ a_j x_j over tokens that are not kept
    weights[-1, kept] = 0
    return weights


def place(image: ImageTokens, kept: Tensor, weights: Tensor, positions: Positions) -> MergeGroup:
    """Assign slots to the new tokens of one image.

    "renumber" uses the image's first slots, in the order of `kept`. "keep" leaves each kept token at its slot, and puts
    the extra one at the first dropped slot after the last kept one, or else at the last dropped slot (ours).

    Args:
        image: image of N tokens.
        kept: int64 [k], kept tokens, numbered within the image.
        weights: float32 [k or k + 1, N], a row for each new token; k + 1 = there is an extra token.
        positions: the position policy.
    """
    slots, origins = kept, image.index[kept]
    if len(weights) > len(kept):
        free = torch.ones(len(image), dtype=torch.bool, device=kept.device)
        free[kept] = False
        numbers = torch.arange(len(image), device=kept.device)
        last = kept.amax(0, keepdim=True) if len(kept) else -1
        behind = torch.where(free & (numbers > last), numbers, len(image)).amin(0, keepdim=True)
        last_free = torch.where(free, numbers, -1).amax(0, keepdim=True)
        slots = torch.cat((kept, torch.where(behind < len(image), behind, last_free)))
        origins = torch.cat((origins, origins.new_full((1,), -1)))  # without origin
    if positions == "renumber":
        slots = torch.arange(len(slots), device=slots.device)
    return MergeGroup(image.row, image.index[slots], image.index, weights, origins)


def without_extra(number: int, size: int) -> int:
    """Number of tokens to select for a result of `number`: one less for the extra token, unless one or all remain."""
    return number if number in (0, 1, size) else number - 1
