"""The tensor side of PruMerge: outliers, merging weights, and the slots of the merged tokens."""

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
    """float32 [k + 1, N]: what every kept token, and last the extra one, sums up of each token of the image.

    Args:
        attention: float32 [N], of [CLS].
        keys: [N, C], of the patches.
        kept: int64 [k], tokens kept.
    """
    numbers = torch.arange(len(kept), device=kept.device)
    directions = torch.nn.functional.normalize(keys.float(), dim=-1)
    likeness = directions[kept] @ directions.T
    likeness[numbers, kept] = float("-inf")  # a token is not its own neighbour
    near = likeness.topk(min(NEIGHBOURS, len(keys) - 1), dim=1).indices
    weights = torch.zeros(len(kept) + 1, len(keys), dtype=torch.float32, device=kept.device)
    weights[:-1].scatter_(1, near, attention[near])  # x_i + Σ a_j x_j, over kept and other neighbours, not normalised
    weights[numbers, kept] = 1
    weights[-1] = attention  # the extra token: Σ a_j x_j over those that are not kept
    weights[-1, kept] = 0
    return weights


def place(image: ImageTokens, kept: Tensor, weights: Tensor, positions: Positions) -> MergeGroup:
    """Place the new tokens of one image.

    "renumber" takes the image's first slots, in the given order. "keep" leaves every kept token at its own slot and
    puts the extra one at the first dropped slot after the last kept, or else at the last dropped one (ours).

    Args:
        image: of N tokens.
        kept: int64 [k], tokens kept, counted within the image.
        weights: float32 [k or k + 1, N], a row per new token; one row more than kept = the extra token is there.
        positions: the policy.
    """
    slots, origins = kept, image.index[kept]
    if len(weights) > len(kept):
        free = torch.ones(len(image), dtype=torch.bool, device=kept.device)
        free[kept] = False
        free_slots = free.nonzero().flatten()
        behind = free_slots[free_slots > (kept.max() if len(kept) else -1)]
        slots = torch.cat((kept, behind[:1] if len(behind) else free_slots[-1:]))
        origins = torch.cat((origins, origins.new_full((1,), -1)))  # without a place in the image
    if positions == "renumber":
        slots = torch.arange(len(slots), device=slots.device)
    return MergeGroup(image.row, image.index[slots], image.index, weights, origins)


def without_extra(number: int, size: int) -> int:
    """Tokens to select so that `number` come out: one place goes to the extra token, unless one or all are left."""
    return number if number in (0, 1, size) else number - 1
