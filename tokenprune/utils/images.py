"""Converts anything that stands for an image to upright RGB, in the same way for models, overlays and datasets.

A path or PIL image with an EXIF orientation is turned upright; masks, image tokens and overlays are in the frame of the
upright picture. Arrays and tensors have no orientation. Transparency is dropped (colours stay as stored). Of several
frames the first one is used, of a PIL image the current one (`image.seek`).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError

from tokenprune.errors import InputError
from tokenprune.utils.files import absent, expanded

ImageInput = Any  # a path, PIL image, numpy array or tensor; spelled out in `to_rgb`

_ORIENTATION = 0x0112  # the EXIF tag
_BITS, _PHOTOMETRIC, _WHITE_IS_ZERO = 258, 262, 0  # TIFF tags, and a value of the second
_SIXTEEN_BIT_FILES = ("PNG", "PPM")  # whose greys of 16 bits PIL may give the mode "I"


def to_rgb(image: ImageInput, *, name: str = "PIL image", upright: bool = True) -> Image.Image:
    """The image as PIL RGB, upright.

    Args:
        image: a path or a PIL image; a numpy array [H, W, 3 or 4] or [H, W]; a torch tensor [3, H, W], [1, H, W],
            [H, W, 3] or [H, W]. Integers of any type are 0…255 and floating-point values 0…1. Greys of 16 bits
            are divided by the largest value of their file's format.
        name: of a PIL image in errors, for example its file name.
        upright: False leaves a file or PIL image as it is stored, without regard to its EXIF orientation (except TIFF,
            which PIL itself turns).

    Raises:
        InputError: no such file, not an image, a damaged one, one that exceeds PIL's limit of pixels, a PIL image of a
            mode whose range is unknown ("F", "I"), or an array of another shape, type or range.
    """
    if isinstance(image, (str, Path)):
        return _from_file(image, upright)
    if isinstance(image, Image.Image):
        return _from_pil(image, name, upright)
    if isinstance(image, torch.Tensor):
        return _from_tensor(image).convert("RGB")
    if isinstance(image, np.ndarray):
        return _from_array(image, "array").convert("RGB")
    raise InputError(
        f"image is a {type(image).__name__}, expected a path, a PIL image, a numpy array or a torch tensor"
    )


def exif_orientation(path: str | Path) -> int:
    """The EXIF orientation of an image file, 1 to 8; 1, upright, if it has none or cannot be read."""
    try:
        with Image.open(expanded(path)) as opened:
            found = opened.getexif().get(_ORIENTATION)
    except Exception:  # `to_rgb` says what is wrong with the file
        return 1
    return found if found in _TURNS else 1


def _from_file(given: str | Path, upright: bool) -> Image.Image:
    path = expanded(given)
    name = f"image {str(path)!r}"
    try:
        with Image.open(path) as opened:
            return _from_pil(opened, name, upright)
    except InputError:
        raise
    except FileNotFoundError:
        raise InputError(f"image {absent(given)}") from None
    except IsADirectoryError:
        raise InputError(f"{name} is a folder, expected an image file; check the path") from None
    except UnidentifiedImageError:
        raise InputError(f"{name} is not an image that PIL can read; give a PNG or JPEG file") from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise InputError(
            f"{name} may be a decompression bomb: it has more pixels than PIL allows ({error}); make it smaller, or "
            "raise PIL.Image.MAX_IMAGE_PIXELS if you trust it"
        ) from error
    except Exception as error:  # what PIL raises on a damaged file differs from format to format
        raise InputError(f"{name} cannot be read ({_brief(error)}); give an intact image file") from error


def _from_pil(image: Image.Image, name: str, upright: bool) -> Image.Image:
    if min(image.size) < 1:
        raise InputError(f"{name} has the size {image.size[0]}×{image.size[1]}, expected at least one pixel")
    try:
        _load(image)
    except Exception as error:  # what PIL raises on a damaged file differs from format to format
        raise InputError(f"{name} cannot be read ({_brief(error)}); give an intact, open image") from error
    grey = _eight_bits(image, name)
    try:
        if "transparency" in grey.info and grey.mode == "P":
            grey = grey.convert("RGBA")  # the same colours; straight to RGB, PIL warns
        found = (_upright(image, grey) if upright else grey).convert("RGB")
        found.info = {}  # above all the orientation, which must not turn it again
        return found
    except Exception as error:
        raise InputError(
            f"{name} of mode {image.mode!r} cannot be turned into RGB ({_brief(error)}); convert it first"
        ) from error


def _load(image: Image.Image) -> None:
    """Read a file's pixels, which PIL does lazily; PIL turns a TIFF upright here."""
    filename = getattr(image, "filename", None)
    if image.format != "TIFF" or not filename:
        image.load()
        return
    image.filename = ""  # type: ignore[attr-defined]  # or PIL maps the file, and scrambles one that is to be turned
    try:
        image.load()
    finally:
        image.filename = filename  # type: ignore[attr-defined]


def _upright(source: Image.Image, image: Image.Image) -> Image.Image:
    """`image`, turned as the EXIF block of `source` says."""
    try:
        orientation = source.getexif().get(_ORIENTATION)
    except Exception:  # a damaged block has no orientation; viewers show such a picture as stored
        return image
    return image.transpose(_TURNS[orientation]) if orientation in _TURNS else image


_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def _eight_bits(image: Image.Image, name: str) -> Image.Image:
    """Greys of more bits, which PIL's own conversion would clip at 255, scaled to 8; other images as they are."""
    if image.mode not in ("I", "F") and not image.mode.startswith("I;"):
        return image
    tags: Any = getattr(image, "tag_v2", {})
    if image.mode.startswith("I;16"):
        top = 2 ** int(tags.get(_BITS, (16,))[0]) - 1
    elif image.mode == "I" and image.format in _SIXTEEN_BIT_FILES:
        top = 65535
    else:
        raise InputError(
            f"{name} has the mode {image.mode!r}, which does not define the value of white; give an array of floats "
            "0…1 (the values divided by white's), or of integers 0…255"
        )
    values = np.asarray(image).astype(np.float64) / top
    if tags.get(_PHOTOMETRIC) == _WHITE_IS_ZERO:
        values = 1 - values
    return _bytes(values)


def _from_tensor(image: torch.Tensor) -> Image.Image:
    try:
        shape = tuple(image.shape)
    except RuntimeError as error:  # of a nested tensor
        raise InputError(f"image tensor has no shape ({_brief(error)}); give one image, [3, H, W]") from error
    if len(shape) == 3 and shape[0] in (1, 3) and shape[-1] in (3, 4):
        raise InputError(
            f"image tensor of the shape {list(shape)} may be [{shape[0]}, H, W] or [H, W, {shape[-1]}]; give a numpy "
            "array, which is always [H, W, channels]"
        )
    try:
        values = image.detach().cpu()
        array = (values.float() if values.is_floating_point() else values).numpy()
    except (RuntimeError, TypeError, NotImplementedError) as error:  # sparse, quantised, without data …
        raise InputError(f"image tensor cannot be read ({_brief(error)}); give a dense tensor with data") from error
    if array.ndim == 3 and shape[0] in (1, 3):
        array = array.transpose(1, 2, 0)
    return _from_array(array, "tensor")


def _from_array(values: np.ndarray[Any, Any], what: str) -> Image.Image:
    if values.ndim == 3 and values.shape[-1] == 1:
        values = values[..., 0]
    if not (values.ndim == 2 or (values.ndim == 3 and values.shape[-1] in (3, 4))) or 0 in values.shape:
        layout = "[3, H, W] or [H, W, 3]" if what == "tensor" else "[H, W, 3]"
        channels_first = values.ndim == 3 and values.shape[0] in (1, 3, 4)
        cure = "; put the channels last: .transpose(1, 2, 0)" if channels_first and what == "array" else ""
        cure = "; give one image at a time" if values.ndim == 4 else cure
        raise InputError(f"image {what} has the shape {list(values.shape)}, expected {layout}{cure}")
    if values.dtype.kind not in "uif":
        held = {"b": "booleans", "c": "complex numbers"}.get(values.dtype.kind, f"values of type {values.dtype}")
        raise InputError(f"image {what} holds {held}, expected integers 0…255 or floating-point values 0…1")
    floating = values.dtype.kind == "f"
    top = 1 if floating else 255
    low, high = values.min(), values.max()
    if not (low >= 0 and high <= top):
        found = f"image {what} of type {values.dtype} has values {low}…{high}, expected 0…{top}"
        raise InputError(f"{found}; {_cure(low, high, floating)}")
    return _bytes(values) if floating else Image.fromarray(values.astype(np.uint8))


def _cure(low: Any, high: Any, floating: bool) -> str:
    if not (np.isfinite(low) and np.isfinite(high)):
        return "replace values that are not finite"
    if low < 0:
        return "undo what moved its values below 0, such as a normalization"
    return "divide it by the value of white" + (", such as 255" if floating else ", such as 65535, for floats 0…1")


def _bytes(values: np.ndarray[Any, Any]) -> Image.Image:
    """Values 0…1 as an image of 8 bits."""
    return Image.fromarray(np.round(values.astype(np.float64) * 255).astype(np.uint8))


def _brief(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:200]
