"""Mask metrics of referring and reasoning segmentation: gIoU, cIoU, mIoU by target size, agreement.

gIoU and cIoU are those of the field (ReasonSeg, refCOCO): an empty union counts as 1.0, label 255 is ignored.
Masks are numpy arrays [H, W]; `tokenprune.utils.masks` defines their values.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import inf
from numbers import Real
from typing import Any

from tokenprune.errors import InputError
from tokenprune.utils.arguments import instance, listed, shown
from tokenprune.utils.masks import Mask, foreground, ignored, predicted

EPSILON = 1e-5  # in the denominator of every expression's IoU, as in the usual evaluation code

# COCO calls an object small below 32² pixels and large above 96²; as shares of a 640 × 480 image, for images
# of other sizes (ours).
SMALL_SHARE = 32**2 / (640 * 480)
LARGE_SHARE = 96**2 / (640 * 480)
SIZES = ("small", "medium", "large")


def overlap(prediction: Mask, target: Mask) -> tuple[int, int]:
    """Pixels in the intersection and in the union, without those that the target ignores.

    Raises:
        InputError: not numpy arrays, of different shapes, or with invalid or ambiguous values (see
            `tokenprune.utils.masks`).
    """
    inside, wanted, counted = predicted(prediction), foreground(target), ~ignored(target)
    if inside.shape != wanted.shape:
        found = f"prediction {list(inside.shape)}, target {list(wanted.shape)}"
        raise InputError(f"masks of two shapes: {found}; resize one of them")
    both = inside & wanted & counted
    either = (inside | wanted) & counted
    return int(both.sum()), int(either.sum())


def expression_iou(intersection: int, union: int) -> float:
    """I / (U + 1e-5); 1.0 if the union is empty. Raises InputError for arguments that are not pixel counts."""
    _check_pair((intersection, union))
    return intersection / (union + EPSILON) if union else 1.0


def giou(overlaps: Sequence[tuple[int, int]]) -> float:
    """Mean over expressions of their IoU, from their (intersection, union).

    Raises:
        InputError: no expression, or something other than pairs.
    """
    pairs = _pairs("gIoU", overlaps)
    return sum(expression_iou(*pair) for pair in pairs) / len(pairs)


def ciou(overlaps: Sequence[tuple[int, int]]) -> float:
    """Sum of intersections over sum of unions; 1.0 if every union is empty (ours, consistent with gIoU).

    Raises:
        InputError: no expression, or something other than pairs.
    """
    pairs = _pairs("cIoU", overlaps)
    union = sum(pair[1] for pair in pairs)
    return sum(pair[0] for pair in pairs) / union if union else 1.0


def predicted_pixels(prediction: Mask, target: Mask) -> int:
    """Pixels of the prediction, without those that the target ignores; errors as for `overlap`."""
    inside, counted = predicted(prediction), ~ignored(target)
    return int((inside & counted).sum())


def precision_at(ious: Sequence[float], threshold: float) -> float:
    """P@X: the share of expressions whose IoU is at least the threshold. Raises InputError for no expression."""
    values: list[float] = listed(ious)
    if not values:
        raise InputError("P@X of no expressions is not defined; give at least one")
    for value in (*values, threshold):
        if not isinstance(value, Real) or not 0 <= float(value) <= 1:
            raise InputError(f"{shown(value)} found, expected IoUs and a threshold in [0, 1]")
    return sum(value >= threshold for value in values) / len(values)


def target_accuracy(has_target: Sequence[bool], is_empty: Sequence[bool]) -> tuple[float | None, float | None]:
    """N-acc and T-acc of generalised referring: the share of queries without a target that are answered with an empty
    mask, and of those with one that are answered with a mask that is not empty; None where there is no such query.

    Args:
        has_target: of each query.
        is_empty: whether its predicted mask is.
    """
    both = _together("has_target and is_empty", has_target, is_empty)
    without = [empty for target, empty in both if not target]
    with_one = [not empty for target, empty in both if target]
    return _share(without), _share(with_one)


def _share(flags: list[bool]) -> float | None:
    return sum(flags) / len(flags) if flags else None


def size_of(target: Mask) -> str | None:
    """The size bucket of a target by its share of the image's pixels; None for an empty target; errors as `overlap`."""
    wanted = foreground(target)
    share = float(wanted.mean()) if wanted.size else 0.0
    if share == 0:
        return None
    return SIZES[0] if share < SMALL_SHARE else SIZES[1] if share < LARGE_SHARE else SIZES[2]


def miou_by(groups: Sequence[str | None], overlaps: Sequence[tuple[int, int]]) -> dict[str, float]:
    """Mean IoU of every group that has expressions, in order of first appearance; None is left out.

    Raises:
        InputError: groups that are not texts, something other than pairs, or a different number of them.
    """
    found: dict[str, list[tuple[int, int]]] = {}
    for group, pair in _together("groups and overlaps", groups, overlaps):
        if group is not None:
            found.setdefault(instance("group", group, str, "a text or None", InputError), []).append(pair)
    return {group: giou(pairs) for group, pairs in found.items()}


def agreement(masks: Sequence[Mask], reference: Sequence[Mask]) -> float:
    """gIoU of a strategy's masks against the unpruned model's: 1.0 = the strategy changes no mask.

    Raises:
        InputError: as `overlap` and `giou`, or different numbers of masks and references.
    """
    both = _together("masks and reference", masks, reference)
    return giou([overlap(mask, predicted(other)) for mask, other in both])


def _pairs(metric: str, overlaps: Any) -> list[tuple[int, int]]:
    pairs = listed(overlaps)
    if not pairs:
        raise InputError(f"{metric} of no expressions is not defined; give at least one")
    for pair in pairs:
        _check_pair(pair)
    return pairs


def _check_pair(pair: Any) -> None:
    numbers = pair if isinstance(pair, (tuple, list)) else ()
    if len(numbers) != 2 or not all(isinstance(number, Real) and 0 <= float(number) < inf for number in numbers):
        raise InputError(f"{shown(pair)} found, expected numbers of pixels (intersection, union), as overlap() gives")


def _together(what: str, some: Any, others: Any) -> list[tuple[Any, Any]]:
    first, second = listed(some), listed(others)
    if len(first) != len(second):
        raise InputError(f"{what}: found {len(first)} and {len(second)}, expected as many")
    return list(zip(first, second, strict=True))
