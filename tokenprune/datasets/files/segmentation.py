"""COCO's segmentations: polygons and run lengths, drawn by pycocotools as the field does."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tokenprune.errors import InputError
from tokenprune.utils.arguments import shown
from tokenprune.utils.extras import install_extra

NEEDED = 6  # numbers of a polygon: pycocotools takes one of four for a box
FARTHEST = 100_000  # pixels: pycocotools' memory grows with the length of a polygon's sides


def drawn(segmentation: Any, height: int, width: int) -> NDArray[np.bool_]:
    """bool [height, width]: the union of the parts of an annotation.

    Args:
        segmentation: polygons, a list of [x, y, x, y, …]; run lengths, {"size": [H, W], "counts": …}, compressed or
            not; or a list of such.
        height, width: of the image, in pixels.

    Raises:
        InputError: of another form; a polygon of fewer than three points, or of numbers that are not finite; run
            lengths for another size; or pycocotools is not installed.
    """
    union = np.zeros((height, width), dtype=np.bool_)
    for part in parts_of(segmentation):
        union |= part_drawn(part, height, width)
    return union


def summed(segmentation: Any, height: int, width: int) -> NDArray[np.uint32]:
    """uint32 [height, width]: how many parts of an annotation cover each pixel; errors as for `drawn`."""
    total = np.zeros((height, width), dtype=np.uint32)  # an annotation may have hundreds of parts
    for part in parts_of(segmentation):
        total += part_drawn(part, height, width)
    return total


def parts_of(segmentation: Any) -> list[Any]:
    """The parts of an annotation, polygons or run lengths. Raises InputError for another form."""
    if isinstance(segmentation, Mapping):
        return [segmentation]
    if isinstance(segmentation, (list, tuple)):
        return list(segmentation)
    raise InputError(f"segmentation of type {type(segmentation).__name__} found, expected polygons or run lengths")


def part_drawn(part: Any, height: int, width: int) -> NDArray[np.bool_]:
    """bool [height, width] of one polygon or one mask of run lengths; errors as for `drawn`."""
    coder = _coder()
    try:
        if isinstance(part, Mapping):
            size, counts = list(part["size"]), part["counts"]
            if size != [height, width]:
                raise InputError(f"run lengths for {size} found, expected {[height, width]}, the image's size")
            _check_runs(counts, height * width)
            runs = part if isinstance(counts, (str, bytes)) else coder.frPyObjects(part, height, width)
        else:
            points = np.asarray(part, dtype=np.float64)
            if points.ndim != 1 or len(points) < NEEDED or len(points) % 2 or not np.isfinite(points).all():
                raise InputError(f"polygon {str(part)[:60]} found, expected x, y of at least three points")
            if np.abs(points).max() > FARTHEST:
                far = f"{points[np.abs(points).argmax()]:g}"
                raise InputError(f"polygon {str(part)[:60]} has the coordinate {far}, expected pixels of the image")
            (runs,) = coder.frPyObjects([points.tolist()], height, width)
        found: NDArray[np.uint8] = coder.decode(runs)
    except InputError:
        raise
    except Exception as error:  # what pycocotools raises on damaged run lengths differs
        why = " ".join(f"{type(error).__name__}: {error}".split())[:120]
        raise InputError(f"segmentation {str(part)[:60]} cannot be drawn ({why})") from error
    return found.astype(np.bool_)


def _check_runs(counts: Any, pixels: int) -> None:
    """Refuse run lengths that are not those of all pixels: pycocotools decodes the rest from unset memory."""
    lengths = _unpacked(counts) if isinstance(counts, (str, bytes)) else [_whole(count) for count in counts]
    for place, length in enumerate(lengths):
        if length < 0:
            raise InputError(f"run length {place} is {length}, expected none below 0; get the annotation again")
    if sum(lengths) != pixels:
        raise InputError(f"run lengths of {sum(lengths)} pixels found, expected {pixels}, those of the image")


def _whole(count: Any) -> int:
    if isinstance(count, bool) or not isinstance(count, (int, float)) or count != int(count):
        raise InputError(f"run length {shown(count)} found, expected whole numbers of pixels; get the annotation again")
    return int(count)


def _unpacked(text: str | bytes) -> list[int]:
    """COCO's compressed run lengths: five bits a character, lowest first; from the fourth on, added to the second last.

    Of a character minus 48, the bit 32 says that another one follows, and 16, in the last one, that it is negative.
    """
    found: list[int] = []
    value = shift = 0
    for character in text.encode("latin-1") if isinstance(text, str) else text:
        bits = character - 48
        value |= (bits & 31) << shift
        shift += 5
        if bits & 32:
            continue
        if bits & 16:
            value -= 1 << shift
        found.append(value + found[-2] if len(found) > 2 else value)
        value = shift = 0
    if shift:
        raise InputError("compressed run lengths end within a number; get the annotation again")
    return found


def check_installed() -> None:
    """Check, before anything is read, that masks can be drawn. Raises InputError if pycocotools is not installed."""
    _coder()


def _coder() -> Any:
    try:
        from pycocotools import mask
    except ImportError:
        raise InputError(f"pycocotools, which draws COCO's masks, is not installed; {install_extra('data')}") from None
    return mask
