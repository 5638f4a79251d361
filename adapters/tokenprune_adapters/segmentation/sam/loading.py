"""Loading of the parts that LISA and GLaMM share: a LLaMA decoder, a CLIP tower, and SAM in the checkpoint."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from tokenprune_adapters.clip.tower import PREPROCESSOR, ClipPixels
from tokenprune_adapters.clip.tower_checks import is_openai
from tokenprune_adapters.common.checkpoint import Part
from tokenprune_adapters.segmentation.loading import MASK_PROJECTION, Opened, mlp
from tokenprune_adapters.segmentation.sam.weights import build_sam


def sam_segmenter_parts(
    opened: Opened[Any],
    sam_prefix: str,
    ignore: Callable[[str], bool] = lambda name: False,
) -> dict[str, Any]:
    """The arguments of a `SamSegmenter` except its tokenizer, loaded from a checkpoint.

    Args:
        opened: the checkpoint.
        sam_prefix: prefix of the names of SAM's tensors.
        ignore: as in `Opened.fill`.

    Raises:
        CheckpointError: see `Opened.projector`, `Opened.tower`, `ClipPixels`, `build_sam` and `Opened.fill`.
    """
    projector = opened.projector()
    tower, tower_folder = opened.tower(projector.reads)
    clip_pixels = ClipPixels(tower_folder, tower)
    clip_pixels.check(opened.home(PREPROCESSOR), is_openai(opened.config))
    sam = build_sam(opened.checkpoint, sam_prefix, opened.config.get("sam_mask_decoder_heads"))
    channels = sam.module.prompt_encoder.hidden_size

    def parts(width: int) -> list[Part[Any]]:
        return [projector.part(width), sam, mlp(MASK_PROJECTION, width, width, channels, nn.ReLU())]

    decoder, filled, _, mask_projection = opened.fill(parts, ignore)
    return {
        "decoder": decoder,
        "tower": tower,
        "projector": filled,
        "sam": sam.module,
        "mask_projection": mask_projection,
        "clip_pixels": clip_pixels,
        **opened.about(tower_folder),
    }
