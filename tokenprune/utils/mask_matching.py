"""Masks against targets where one answer holds several: PixelLM's multi-target protocol."""

from __future__ import annotations

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from torch.nn import functional

from tokenprune.errors import InputError


def match_masks(mask_logits: Tensor, targets: Tensor) -> list[tuple[int, int]]:
    """Pair masks with targets one to one so that the total cost is least (Hungarian algorithm).

    The cost of a pair is what PixelLM's evaluation takes: mean binary cross-entropy plus dice loss, 1 − (2 Σ p·t + 1) /
    (Σ p + Σ t + 1). Taken over all pixels (ours; the authors sample 12 544 random points).

    Args:
        mask_logits: float [n, H, W], as `Segmentation.mask_logits`.
        targets: bool [m, H, W], or 0 and 1.

    Returns:
        min(n, m) pairs (mask, target), ascending by mask. Whatever is left over has no partner.

    Raises:
        InputError: shapes that do not fit, logits that are not finite, or targets of other values than 0 and 1.
    """
    if mask_logits.dim() != 3 or targets.dim() != 3 or mask_logits.shape[1:] != targets.shape[1:]:
        raise InputError(
            f"masks of shape {list(mask_logits.shape)} and targets of shape {list(targets.shape)} cannot be matched; "
            "expected [n, H, W] and [m, H, W] of one image"
        )
    if not bool(torch.isfinite(mask_logits).all()):
        raise InputError("mask_logits: some are NaN or infinite, expected finite numbers")
    if not bool(((targets == 0) | (targets == 1)).all()):
        raise InputError("targets: some values are neither 0 nor 1; give bool, such as targets == 255 or targets == 1")
    logits = mask_logits.flatten(1).float()
    wanted = targets.flatten(1).to(logits)
    cost = _cross_entropy(logits, wanted) + _dice(logits.sigmoid(), wanted)
    masks, partners = linear_sum_assignment(cost.cpu().numpy())
    return list(zip(masks.tolist(), partners.tolist(), strict=True))


def _cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """[n, m]: mean over pixels."""
    total = functional.softplus(-logits) @ targets.T + functional.softplus(logits) @ (1 - targets).T
    return total / max(logits.shape[1], 1)


def _dice(masks: Tensor, targets: Tensor) -> Tensor:
    """[n, m]."""
    return 1 - (2 * masks @ targets.T + 1) / (masks.sum(1)[:, None] + targets.sum(1) + 1)
