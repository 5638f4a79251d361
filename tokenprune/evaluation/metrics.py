"""Mask metrics of referring and reasoning segmentation: gIoU, cIoU, mIoU by target size, agreement.

gIoU and cIoU are those of the field (ReasonSeg, refCOCO): an empty union counts as 1.0, label 255 is ignored.
Masks are numpy arrays [H, W]; what their values mean is said in `tokenprune.utils.masks`.
"""

from __future__ import annotations

from collections.abc import Sequence

from tokenprune.errors import InputError
from tokenprune.utils.masks import Mask, foreground, ignored, predicted

EPSILON = 1e-5  # in the denominator of every expression's IoU, as the field's evaluation code has it

# COCO calls an object small below 32² pixels and large above 96²; turned into shares of a 640 × 480 image, so that they
# carry to other sizes (ours).
SMALL_SHARE = 32**2 / (640 * 480)
LARGE_SHARE = 96**2 / (640 * 480)
SIZES = ("small", "medium", "large")


def overlap(prediction: Mask, target: Mask) -> tuple[int, int]:
    """Pixels in the intersection and in the union, without those that the target marks as ignored.

    Raises:
        InputError: two shapes, or values that mean nothing or two things (see `tokenprune.utils.masks`).
    """
    if prediction.shape != target.shape:
        found = f"prediction {list(prediction.shape)}, target {list(target.shape)}"
        raise InputError(f"masks of two shapes: {found}; resize one of them")
    inside, wanted, counted = predicted(prediction), foreground(target), ~ignored(target)
    both = inside & wanted & counted
    either = (inside | wanted) & counted
    return int(both.sum()), int(either.sum())


def expression_iou(intersection: int, union: int) -> float:
    """I / (U + 1e-5); 1.0 where the union is empty."""
    return intersection / (union + EPSILON) if union else 1.0


def giou(overlaps: Sequence[tuple[int, int]]) -> float:
    """Mean over expressions of their IoU, from their (intersection, union).

    Raises:
        InputError: no expression.
    """
    if not overlaps:
        raise InputError("gIoU of no expressions is not defined; give at least one")
    return sum(expression_iou(*pair) for pair in overlaps) / len(overlaps)


def ciou(overlaps: Sequence[tuple[int, int]]) -> float:
    """Sum of intersections over sum of unions; 1.0 where every union is empty (ours, in line with gIoU).

    Raises:
        InputError: no expression.
    """
    if not overlaps:
        raise InputError("cIoU of no expressions is not defined; give at least one")
    union = sum(pair[1] for pair in overlaps)
    return sum(pair[0] for pair in overlaps) / union if union else 1.0


def size_of(target: Mask) -> str | None:
    """The size bucket of a target by its share of the image's pixels; None for an empty target."""
    share = float(foreground(target).mean()) if target.size else 0.0
    if share == 0:
        return None
    return SIZES[0] if share < SMALL_SHARE else SIZES[1] if share < LARGE_SHARE else SIZES[2]


def miou_by(groups: Sequence[str | None], overlaps: Sequence[tuple[int, int]]) -> dict[str, float]:
    """Mean IoU of every group that has expressions, in order of first appearance; None is left out."""
    found: dict[str, list[tuple[int, int]]] = {}
    for group, pair in zip(groups, overlaps, strict=True):
        if group is not None:
            found.setdefault(group, []).append(pair)
    return {group: giou(pairs) for group, pairs in found.items()}


def agreement(masks: Sequence[Mask], reference: Sequence[Mask]) -> float:
    """gIoU of a strategy's masks against the unpruned model's: 1.0 = the strategy changes no mask."""
    return giou([overlap(mask, predicted(other)) for mask, other in zip(masks, reference, strict=True)])
