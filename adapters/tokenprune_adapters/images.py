"""What may stand for an image, turned into RGB."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError

from tokenprune.errors import InputError

ImageInput = Any  # a path, PIL image, numpy array or tensor; spelled out in `to_rgb`


def to_rgb(image: ImageInput) -> Image.Image:
    """The image as PIL RGB.

    Args:
        image: a path (turned upright by its EXIF orientation, ours); a PIL image; a numpy array [H, W, 3 or 4] or [H,
            W]; a torch tensor [3, H, W], [1, H, W], [H, W, 3] or [H, W]. Integer values are 0…255, floating-point
            values 0…1.

    Raises:
        InputError: no such file, not an image, or an array of another shape or range.
    """
    if isinstance(image, (str, Path)):
        return _from_file(Path(image))
    if isinstance(image, Image.Image):
        found = image
    elif isinstance(image, torch.Tensor):
        values = image.detach().cpu()
        if values.ndim == 3 and values.shape[0] in (1, 3) and values.shape[-1] not in (3, 4):
            values = values.permute(1, 2, 0)
        found = _from_array(values.float().numpy() if values.is_floating_point() else values.numpy(), "tensor")
    elif isinstance(image, np.ndarray):
        found = _from_array(image, "array")
    else:
        raise InputError(
            f"image is a {type(image).__name__}, expected a path, a PIL image, a numpy array or a torch tensor"
        )
    if min(found.size) < 1:
        raise InputError(f"image has the size {found.size[0]}×{found.size[1]}, expected at least one pixel")
    return found.convert("RGB")


def _from_file(path: Path) -> Image.Image:
    try:
        with Image.open(path) as opened:
            return ImageOps.exif_transpose(opened).convert("RGB")
    except FileNotFoundError:
        raise InputError(f"image {str(path)!r}: no such file; check the path") from None
    except UnidentifiedImageError:
        raise InputError(f"image {str(path)!r} is not an image that PIL can read; give a PNG or JPEG file") from None
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise InputError(f"image {str(path)!r} cannot be read ({error}); give an intact image file") from error


def _from_array(values: np.ndarray[Any, Any], what: str) -> Image.Image:
    if values.ndim == 3 and values.shape[-1] == 1:
        values = values[..., 0]
    if not (values.ndim == 2 or (values.ndim == 3 and values.shape[-1] in (3, 4))) or 0 in values.shape:
        layout = "[3, H, W] or [H, W, 3]" if what == "tensor" else "[H, W, 3]"
        raise InputError(f"image {what} has the shape {list(values.shape)}, expected {layout}")
    if values.dtype == np.bool_:
        raise InputError(f"image {what} holds booleans, expected integers 0…255 or floating-point values 0…1")
    top = 1.0 if np.issubdtype(values.dtype, np.floating) else 255
    low, high = values.min(), values.max()
    if not (low >= 0 and high <= top):
        raise InputError(f"image {what} of type {values.dtype} has values {low}…{high}, expected 0…{top:g}")
    if top == 1.0:
        values = np.round(values * 255.0)
    return Image.fromarray(values.astype(np.uint8))
