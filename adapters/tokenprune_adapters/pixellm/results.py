"""What PixelLM takes in, as plain data."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from tokenprune_adapters.pixellm.tower import PixelTowerRun
from tokenprune_adapters.segmentation.sam.masks import MaskSizes


@dataclass(frozen=True)
class PreparedImage:
    """An image as the tower wants it.

    Args:
        pixels: float32 [1, 3, square, square], zero-padded on the right and at the bottom.
        sizes: how masks get back to the image.
    """

    pixels: Tensor
    sizes: MaskSizes


@dataclass(frozen=True)
class EncodedImage:
    """An image after the tower. N = 256 image tokens, H decoder width.

    Args:
        prepared: what went in.
        tower: the tower's run.
        image_embeddings: [1, N, H], after the projector, padded cells included.
        image_valid: bool [1, N], False for padded cells; None where there are none.
        mask_features: [2, C, side, side], what the masks of both levels are drawn on.
    """

    prepared: PreparedImage
    tower: PixelTowerRun
    image_embeddings: Tensor
    image_valid: Tensor | None
    mask_features: Tensor
