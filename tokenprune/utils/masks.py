"""The meaning of mask values, for targets, predictions, metrics, overlays and datasets.

A target mask is bool, or numbers: 0 is background, 1 is foreground and 255, together with 1, is ignored, as in
ReasonSeg and the referring datasets. A plain array of only 0 and 255 is refused as a target: a mask from an image file,
whose white is 255, and an empty target with ignored pixels look the same. `with_ignored` makes the second one, which is
accepted. A prediction has no ignored pixels: 0 and 255 are background and foreground. `read_mask` reads a target from
an image file.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from tokenprune.errors import InputError, OptionError
from tokenprune.utils.files import expanded

IGNORE = 255
Mask = NDArray[Any]
_MEANING = f"expected bool, or 0 for background, 1 for foreground and {IGNORE} for pixels that do not count"


class LabelMask(np.ndarray[Any, np.dtype[np.uint8]]):
    """uint8 [H, W] in which 255 is always ignored: 0 is background, 1 foreground, and there may be no 1.

    `with_ignored` makes it. What is computed from it is a plain array, of which 0 and 255 alone are refused as before.
    """

    def __array_wrap__(self, array: Any, context: Any = None, return_scalar: bool = False) -> Any:
        """The result of a computation, as a plain array: its values have another meaning."""
        plain = np.asarray(array)
        return plain if plain.ndim else plain[()]


def with_ignored(target: NDArray[np.bool_], ignored: NDArray[np.bool_]) -> Mask:
    """A target mask [H, W] with ignored pixels: a `LabelMask`, or bool if no pixel is ignored.

    Args:
        target: bool [H, W].
        ignored: bool [H, W]; pixels in both are ignored.
    """
    if not ignored.any():
        return target
    values = target.astype(np.uint8)
    values[ignored] = IGNORE
    return values.view(LabelMask)


def foreground(mask: Mask) -> NDArray[np.bool_]:
    """bool, of the same shape: neither background nor ignored.

    Raises:
        InputError: see `target_problem`.
    """
    _check(mask)
    return mask if mask.dtype == np.bool_ else np.asarray(mask == 1)


def ignored(mask: Mask) -> NDArray[np.bool_]:
    """bool, of the same shape: ignored pixels.

    Raises:
        InputError: see `target_problem`.
    """
    _check(mask)
    return np.zeros(mask.shape, dtype=np.bool_) if mask.dtype == np.bool_ else np.asarray(mask == IGNORE)


def predicted(mask: Mask) -> NDArray[np.bool_]:
    """bool, of the same shape: the foreground of a model's mask of bool, of 0 and 1, or of 0 and 255.

    Raises:
        InputError: other values, 1 and 255 together, or not a numpy array.
    """
    problem = _kind_problem(mask)
    if not problem and mask.dtype != np.bool_:
        others = mask[(mask != 0) & (mask != mask.max(initial=0))]
        if others.size or mask.max(initial=0) not in (0, 1, IGNORE):
            problem = f"{_shown(mask)}, expected bool, 0 and 1, or 0 and {IGNORE}; give logits > 0, or labels == one"
    if problem:
        raise InputError(f"a predicted mask {problem}")
    return mask if mask.dtype == np.bool_ else mask != 0


def read_mask(
    path: str | Path, *, size: tuple[int, int] | None = None, white: Literal["target", "ignore"] = "target"
) -> Mask:
    """A target mask [H, W] from an image file: grey, of 1 bit, or with a palette of greys; upright by EXIF.

    A file of 0 and 255, or of 0 and 1, gives bool: its target is where it is not black. The meaning of white in a file
    where 1 is the target does not follow from every file: `white` states it for all files of a dataset.

    Args:
        path: of the file.
        size: (height, width) of the image that the mask belongs to.
        white: "target"; or "ignore" for files in which 1 is the target and 255 marks ignored pixels, as in a
            `LabelMask`. Such a file may have an empty target.

    Raises:
        InputError: no such file, not an image, colours, transparency, other values (from JPEG compression, or numbers
            of instances), 1 and 255 without `white="ignore"`, or another size.
        OptionError: another value of `white`.
    """
    if white not in ("target", "ignore"):
        raise OptionError(f"white={white!r} found, expected 'target' or 'ignore'")
    name = f"mask {str(path)!r}"
    values = _greys(expanded(path), name)
    if size is not None and values.shape != tuple(size):
        found, wanted = (f"{width}×{height}" for height, width in (values.shape, size))
        raise InputError(f"{name} is {found}, expected {wanted}, the size of its image; resize it with NEAREST")
    others = np.unique(values[(values != 0) & (values != 1) & (values != IGNORE)])
    if others.size:
        shown = ", ".join(map(str, others[:3].tolist())) + (", …" if others.size > 3 else "")
        raise InputError(
            f"{name} has the values {shown}, expected 0 and {IGNORE}, or 0 and 1; JPEG and resizing make values in "
            "between: save masks as PNG, resized with NEAREST; numbers of instances want a file for each"
        )
    ones = values == 1
    marked = bool((values == IGNORE).any())
    if white == "ignore":
        return with_ignored(ones, values == IGNORE)
    if marked and ones.any():
        raise InputError(
            f"{name} has 1 and {IGNORE}; where {IGNORE} marks pixels that do not count, read all masks of the dataset "
            'with read_mask(path, white="ignore"), where both are the target, save them as 0 and 255'
        )
    target: Mask = values != 0
    return target


def _greys(path: Path, name: str) -> NDArray[np.uint8]:
    """The pixels of an 8-bit greyscale file, upright."""
    from PIL import Image, ImageOps

    cure = "save it as a PNG of 8-bit greys: Image.fromarray(numpy.uint8(target) * 255)"
    try:
        with Image.open(path) as opened:
            image = ImageOps.exif_transpose(opened)
            transparent = "A" in image.getbands() or "transparency" in image.info
            pixels = np.asarray(image.convert("RGB") if image.mode == "P" else image)
    except FileNotFoundError:
        raise InputError(f"{name}: no such file; check the path") from None
    except Exception as error:  # what PIL raises on a damaged file differs from format to format
        why = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise InputError(f"{name} cannot be read ({why}); give an intact image file") from error
    if transparent:
        raise InputError(f"{name} of mode {image.mode} has transparency, which may be the mask or not; {cure}")
    if image.mode in ("P", "RGB") and (pixels == pixels[..., :1]).all():
        pixels = pixels[..., 0]
    if image.mode == "1":
        return pixels.astype(np.uint8)
    if pixels.ndim != 2 or pixels.dtype != np.uint8:
        held = "colours" if pixels.ndim == 3 else "greys of another depth"
        raise InputError(f"{name} of mode {image.mode} has {held}, expected greys of 8 bits; {cure}")
    return pixels


def target_problem(mask: object) -> str:
    """What is wrong with a target mask and what to do, as the rest of a sentence; empty for a valid one.

    Invalid are values other than 0, 1 and 255, 255 without any 1 unless in a `LabelMask`, and anything but a numpy
    array of numbers or bool.
    """
    problem = _kind_problem(mask)
    if problem or not isinstance(mask, np.ndarray) or mask.dtype == np.bool_:
        return problem
    ones, marked = mask == 1, mask == IGNORE
    if not ((mask == 0) | ones | marked).all():
        return f"{_shown(mask)}, {_MEANING}; give bool, such as labels == 2"
    if marked.any() and not ones.any() and not isinstance(mask, LabelMask):
        return (
            f"has {IGNORE} and no 1, so that {IGNORE} may mean foreground or pixels that do not count; where it is the "
            f"foreground, give bool: mask == {IGNORE}; where it does not count, tokenprune.utils.masks.with_ignored"
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
