"""What the values of a mask mean: the one rule for targets, predictions, metrics, overlays and data sets.

A target mask is bool, or numbers of which 0 is background, 1 is foreground and 255, beside a 1, marks pixels that do
not count, as ReasonSeg and the referring sets have it. A target of 0 and 255 alone is refused: an image file of a mask,
whose white is 255, and an empty target with pixels that do not count look the same. A prediction has no pixels that do
not count, so that there 0 and 255 are background and foreground.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from tokenprune.errors import InputError

IGNORE = 255
Mask = NDArray[Any]
_MEANING = f"expected bool, or 0 for background, 1 for foreground and {IGNORE} for pixels that do not count"


def foreground(mask: Mask) -> NDArray[np.bool_]:
    """bool, of the same shape: neither background nor ignored.

    Raises:
        InputError: see `target_problem`.
    """
    _check(mask)
    return mask if mask.dtype == np.bool_ else mask == 1


def ignored(mask: Mask) -> NDArray[np.bool_]:
    """bool, of the same shape: pixels that do not count.

    Raises:
        InputError: see `target_problem`.
    """
    _check(mask)
    return np.zeros(mask.shape, dtype=np.bool_) if mask.dtype == np.bool_ else mask == IGNORE


def predicted(mask: Mask) -> NDArray[np.bool_]:
    """bool, of the same shape: the foreground of a model's mask, of bool, 0 and 1, or 0 and 255.

    Raises:
        InputError: other values, 1 and 255 together, or no numpy array.
    """
    problem = _kind_problem(mask)
    if not problem and mask.dtype != np.bool_:
        others = mask[(mask != 0) & (mask != mask.max(initial=0))]
        if others.size or mask.max(initial=0) not in (0, 1, IGNORE):
            problem = f"{_shown(mask)}, expected bool, 0 and 1, or 0 and {IGNORE}; give logits > 0, or labels == one"
    if problem:
        raise InputError(f"a predicted mask {problem}")
    return mask if mask.dtype == np.bool_ else mask != 0


def target_problem(mask: object) -> str:
    """What is wrong with a target mask and the cure, as the rest of a sentence; empty where nothing is.

    Wrong are values other than 0, 1 and 255, 255 without any 1, and what is no numpy array of numbers or bool.
    """
    problem = _kind_problem(mask)
    if problem or not isinstance(mask, np.ndarray) or mask.dtype == np.bool_:
        return problem
    ones, marked = mask == 1, mask == IGNORE
    if not ((mask == 0) | ones | marked).all():
        return f"{_shown(mask)}, {_MEANING}; give bool, such as labels == 2"
    if marked.any() and not ones.any():
        return (
            f"has {IGNORE} and no 1, so that {IGNORE} may mean foreground or pixels that do not count; where it is the "
            f"foreground, give bool: mask == {IGNORE}; where nothing is meant, replace {IGNORE} by 0"
        )
    return ""


def _check(mask: object) -> None:
    problem = target_problem(mask)
    if problem:
        raise InputError(f"a target mask {problem}")


def _kind_problem(mask: object) -> str:
    if not isinstance(mask, np.ndarray):
        return f"is a {type(mask).__name__}, expected a numpy array; {_MEANING}"
    if mask.dtype.kind not in "buif":
        return f"is of type {mask.dtype}, {_MEANING}"
    return ""


def _shown(mask: Mask) -> str:
    values = np.unique(mask[(mask != 0) & (mask != 1) & (mask != IGNORE)])
    shown = ", ".join(str(value) for value in values[:3].tolist()) or f"1 and {IGNORE}"
    return f"has the values {shown}" + (", …" if len(values) > 3 else "")
