"""Pictures that are embedded in a page: small, and as few bytes as their content allows."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

IMAGE_SIDE, MASK_SIDE = 480, 320  # at most, in pixels of the longer side
QUALITY = 80


def image_uri(image: NDArray[np.uint8]) -> str:
    """An RGB image [H, W, 3] as a JPEG of at most 480 pixels a side."""
    picture = Image.fromarray(image)
    picture.thumbnail((IMAGE_SIDE, IMAGE_SIDE), Image.Resampling.LANCZOS)
    return _uri(picture, "jpeg", quality=QUALITY, optimize=True)


def mask_uri(mask: NDArray[np.bool_]) -> str:
    """A mask [H, W] as a PNG of one bit a pixel, of at most 320 pixels a side; white inside."""
    height, width = mask.shape
    scale = min(1.0, MASK_SIDE / max(height, width))
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    picture = Image.fromarray(mask.astype(np.uint8) * 255).resize(size, Image.Resampling.NEAREST)
    return _uri(picture.point(lambda value: value, mode="1"), "png", optimize=True)


def packed_cells(cells: Iterable[int], size: int) -> str:
    """Numbers of grid cells as bits in base64: bit 7 of the first byte is cell 0.

    Args:
        cells: numbers from 0.
        size: how many cells the grid has.
    """
    bits = np.zeros(size, dtype=np.bool_)
    bits[list(cells)] = True
    return base64.b64encode(np.packbits(bits).tobytes()).decode()


def _uri(picture: Image.Image, kind: str, **options: Any) -> str:
    with io.BytesIO() as buffer:
        picture.save(buffer, format=kind, **options)
        return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"
