"""What LISA takes in and gives back, as plain data."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from tokenprune.trace import Trace
from tokenprune_adapters.llava_prompt import DecoderInputs
from tokenprune_adapters.llava_vision import TowerRun
from tokenprune_adapters.sam_masks import MaskSizes


@dataclass(frozen=True)
class PreparedImage:
    """An image as both towers want it.

    Args:
        clip_pixels: float32 [1, 3, h, w].
        sam_pixels: float32 [1, 3, square, square].
        sizes: how masks get back to the image.
    """

    clip_pixels: Tensor
    sam_pixels: Tensor
    sizes: MaskSizes


@dataclass(frozen=True)
class EncodedImage:
    """An image after both towers. N image tokens, C tower width, H decoder width.

    Args:
        prepared: what went in.
        tower: the tower's run; `tower.features` are [1, N, C], before the projector.
        image_embeddings: [1, N, H], after the projector: what the decoder gets.
        sam_embedding: [1, channels, grid, grid].
    """

    prepared: PreparedImage
    tower: TowerRun
    image_embeddings: Tensor
    sam_embedding: Tensor


@dataclass(frozen=True)
class LisaInputs:
    """Prompts about one image, ready for the decoder.

    Args:
        prompts: the whole texts.
        encoded: the image.
        sequence: what the decoder gets.
    """

    prompts: list[str]
    encoded: EncodedImage
    sequence: DecoderInputs


@dataclass(frozen=True)
class Segmentation:
    """Masks for the queries about one image: one per [SEG], in order of the queries. n masks, the image is W×H.

    Args:
        masks: bool [n, H, W].
        mask_logits: float32 [n, H, W]; a mask is where they are above 0.
        low_res_logits: [n, h, w], what SAM's mask decoder gives, over its padded square input.
        iou_predictions: [n], SAM's own estimate of each mask's quality. LISA does not train it.
        text: the answer, a string for a single query or prompt, else one for each. Given answers are returned as they
            are.
        query_index: for each mask the query that it belongs to. With generated answers a query may get no mask, or
            several.
        trace: what the strategy did, as `tokenprune.prune` tells it; None without a strategy.
    """

    masks: Tensor
    mask_logits: Tensor
    low_res_logits: Tensor
    iou_predictions: Tensor
    text: str | list[str]
    query_index: list[int]
    trace: Trace | None = None
