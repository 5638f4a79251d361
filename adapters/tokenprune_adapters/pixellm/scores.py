"""How sure PixelLM is of its masks."""

from __future__ import annotations

from torch import Tensor


def mask_scores(mask_logits: Tensor) -> Tensor:
    """How sure the model is of each mask: the mean sigmoid over the mask's own pixels, [n]; 0 for an empty mask.

    Args:
        mask_logits: float [n, H, W].
    """
    inside = mask_logits > 0
    return (mask_logits.sigmoid() * inside).flatten(1).sum(1) / (inside.flatten(1).sum(1) + 1e-6)
