"""SAM's preprocessing and postprocessing: images to encoder inputs, prompt embeddings to masks of the image's size."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional
from transformers import SamModel

from tokenprune.errors import OptionError
from tokenprune.utils.arguments import listed, shown, whole_number

PIXEL_MEAN = (123.675, 116.28, 103.53)
PIXEL_STD = (58.395, 57.12, 57.375)
MaskSize = Literal["image", "low"] | tuple[int, int]
PATCHES_AT_ONCE = 8192  # limits memory: two images of SAM's own size, whose global attention has a bias of patches²
MASKS_AT_ONCE = 16  # limits memory: the mask decoder copies the image embedding for each mask


@dataclass(frozen=True)
class MaskSizes:
    """Sizes for resizing a mask from the encoder's square to the image.

    Args:
        original: (height, width) of the image.
        resized: (height, width) after resizing its longest side to `square`.
        square: side of the zero-padded encoder input, in pixels.
    """

    original: tuple[int, int]
    resized: tuple[int, int]
    square: int


def resized_size(height: int, width: int, square: int) -> tuple[int, int]:
    """(height, width) of an image whose longest side has been resized to `square` pixels."""
    scale = square / max(height, width)
    return max(int(height * scale + 0.5), 1), max(int(width * scale + 0.5), 1)


def preprocess(image: Image.Image, square: int) -> tuple[Tensor, MaskSizes]:
    """The encoder input of an RGB image (Kirillov et al., 2023).

    The longest side is resized to `square` pixels (PIL, bilinear), values are normalised, then the right and bottom
    are padded with zeros.

    Returns:
        Pixels float32 [1, 3, square, square], and the sizes to undo it.
    """
    width, height = image.size
    resized = resized_size(height, width, square)
    values = np.array(image.resize((resized[1], resized[0]), Image.Resampling.BILINEAR))
    pixels = torch.from_numpy(values).permute(2, 0, 1).float()
    mean = torch.tensor(PIXEL_MEAN).view(3, 1, 1)
    std = torch.tensor(PIXEL_STD).view(3, 1, 1)
    pixels = (pixels - mean) / std
    pixels = functional.pad(pixels, (0, square - resized[1], 0, square - resized[0]))
    return pixels[None], MaskSizes((height, width), resized, square)


def embed_image(sam: SamModel, pixels: Tensor) -> Tensor:
    """Image embeddings [B, channels, grid, grid] of encoder inputs [B, 3, square, square]."""
    config: Any = sam.config.vision_config
    images = max(PATCHES_AT_ONCE // (config.image_size // config.patch_size) ** 2, 1)
    parts = [sam.vision_encoder(part).last_hidden_state for part in torch.split(pixels, images)]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def low_res_logits(
    sam: SamModel, image_embeddings: Tensor, prompts: Tensor, owners: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """One mask for each prompt embedding, which replaces SAM's point and box embeddings.

    Args:
        sam: the model.
        image_embeddings: [B, channels, grid, grid], of B images.
        prompts: [n, channels].
        owners: int64 [n], the image of each prompt; None if there is one image.

    Returns:
        Mask logits [n, 4 · grid, 4 · grid] and predicted IoU [n].
    """
    positions = sam.get_image_wide_positional_embeddings().to(image_embeddings)
    _, dense = sam.prompt_encoder(input_points=None, input_labels=None, input_boxes=None, input_masks=None)
    masks, scores = [], []
    for start in range(0, len(prompts), MASKS_AT_ONCE):
        chunk = prompts[start : start + MASKS_AT_ONCE]
        # The decoder takes as many prompts for each image as for any other: several prompts of one image, or one prompt
        # of each of several images, which are repeated where they have more.
        embeddings, sparse = image_embeddings, chunk[None, :, None, :]
        if owners is not None:
            embeddings, sparse = image_embeddings[owners[start : start + MASKS_AT_ONCE]], chunk[:, None, None, :]
        mask, score = sam.mask_decoder(
            image_embeddings=embeddings,
            image_positional_embeddings=positions,
            sparse_prompt_embeddings=sparse,
            dense_prompt_embeddings=dense.to(image_embeddings),
            multimask_output=False,
        )
        masks.append(mask[:, :, 0].flatten(0, 1))
        scores.append(score[:, :, 0].flatten(0, 1))
    if not masks:
        side = 4 * image_embeddings.shape[-1]
        return prompts.new_zeros(0, side, side), prompts.new_zeros(0)
    return torch.cat(masks), torch.cat(scores)


LARGEST_MASK = 2**28
"""Pixels of a mask that may be asked for; its logits have a gigabyte then."""


def checked_mask_size(size: object) -> MaskSize:
    """A size of masks that a user asked for, see `masks_at`.

    Raises:
        OptionError: something else.
    """
    if isinstance(size, str) and size in ("image", "low"):
        return size  # type: ignore[return-value]
    sides = listed(size)
    if isinstance(size, str) or len(sides) != 2:
        raise OptionError(f"mask_size={shown(size)} found, expected 'image', 'low' or (height, width) in pixels")
    height, width = (whole_number("mask_size", side, 1) for side in sides)
    if height * width > LARGEST_MASK:
        raise OptionError(
            f"mask_size={shown((height, width))} found, expected at most {LARGEST_MASK:,} pixels (16384 × 16384)"
        )
    return height, width


def masks_at(
    low_res: Tensor, sizes: MaskSizes, size: MaskSize = "image", keep_logits: bool = True
) -> tuple[Tensor, Tensor | None]:
    """Masks, bool [n, H, W], and their logits.

    Args:
        low_res: low-resolution logits [n, h, w].
        sizes: of the image.
        size: "image" for that of the image; (H, W) for another size of the whole image; "low" for that of `low_res`,
            over the padded square, without any resizing.
        keep_logits: False to return None for the logits, float32 [n, H, W] ("low": `low_res` itself). They are then
            computed for one mask after the other.
    """
    if size == "low":
        return low_res > 0, low_res if keep_logits else None
    wanted = sizes if size == "image" else replace(sizes, original=size)
    if keep_logits:
        logits = to_original_size(low_res, wanted)
        return logits > 0, logits
    masks = low_res.new_empty((len(low_res), *wanted.original), dtype=torch.bool)
    for mask, logits in zip(masks, low_res, strict=True):
        torch.gt(to_original_size(logits[None], wanted)[0], 0, out=mask)
    return masks, None


def to_original_size(logits: Tensor, sizes: MaskSizes) -> Tensor:
    """Mask logits float32 [n, H, W] at the image's size, from low-resolution logits [n, h, w].

    Resized (bilinear) to the encoder's square, cropped to remove the padding, resized (bilinear) to the image. A pixel
    is in the mask if its logit is above 0.
    """
    square = (sizes.square, sizes.square)
    if not len(logits):
        return logits.new_zeros((0, *sizes.original), dtype=torch.float32)
    full = functional.interpolate(logits[:, None].float(), square, mode="bilinear", align_corners=False)
    full = full[..., : sizes.resized[0], : sizes.resized[1]]
    return functional.interpolate(full, sizes.original, mode="bilinear", align_corners=False)[:, 0]
