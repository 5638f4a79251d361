"""Recognising and loading LISA checkpoints in their original format."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tokenprune_adapters.checkpoint import Part
from tokenprune_adapters.clip import ClipPixels
from tokenprune_adapters.clip_space import ClipSpace
from tokenprune_adapters.lisa.model import LisaModel
from tokenprune_adapters.loading import (
    MASK_PROJECTION,
    PROJECTOR,
    SegmenterAdapter,
    linear,
    mlp,
    open_checkpoint,
    refuse_other_families,
)
from tokenprune_adapters.sam_weights import build_sam

SAM_PREFIX = "model.visual_model."


class LisaAdapter(SegmenterAdapter):
    """LISA checkpoints (7B, 13B, or any size) in the format of their authors."""

    family = "LISA"

    @classmethod
    def loader(cls) -> Callable[..., LisaModel]:
        """`load_lisa`."""
        return load_lisa


def load_lisa(
    source: str | Path,
    vision_tower: str | Path | None = None,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str | None = None,
    device_map: str | dict[str, Any] | None = None,
    attn_implementation: str | None = None,
) -> LisaModel:
    """Read a checkpoint onto transformers' own LLaMA, CLIP and SAM.

    Args:
        source: folder or hub id. Weights may be sharded or not, .bin or safetensors.
        vision_tower: folder or hub id of the CLIP model, which released checkpoints do not hold. By default the folder
            `vision_tower` in the checkpoint, else the name in its config.json.
        dtype: of all weights; by default float32 on a CPU and the stored type elsewhere.
        device: where everything goes; the CPU by default.
        device_map: spread the decoder over devices (needs accelerate); the rest goes where its embedding table is.
        attn_implementation: of decoder and tower, as in transformers.

    Raises:
        CheckpointError: a file or tensor is missing, damaged, unexpected or mis-shaped, the tokenizer or the tower
            does not belong to it, or it is of another family.
        OptionError: an unknown dtype or device, or both device= and device_map=.
    """
    opened = open_checkpoint(source, dtype, device, device_map)
    refuse_other_families(opened, "LISA", SAM_PREFIX + "image_encoder.")
    tokenizer = opened.tokenizer(LisaModel.seg_tokens)
    reads = opened.checkpoint.shape(PROJECTOR + "weight", dims=2)[1]
    tower, tower_folder = opened.tower(vision_tower, reads, attn_implementation)
    sam = build_sam(opened.checkpoint, SAM_PREFIX, opened.config.get("sam_mask_decoder_heads"))
    channels = sam.module.prompt_encoder.hidden_size

    def parts(width: int) -> list[Part[Any]]:
        return [linear(PROJECTOR, reads, width), sam, mlp(MASK_PROJECTION, width, width, channels, nn.ReLU())]

    decoder, projector, _, mask_projection = opened.fill(attn_implementation, parts)
    model = LisaModel(
        decoder=decoder,
        tower=tower,
        projector=projector,
        sam=sam.module,
        mask_projection=mask_projection,
        tokenizer=tokenizer,
        clip_pixels=ClipPixels(tower_folder, tower),
        select_layer=int(opened.config.get("mm_vision_select_layer", -2)),
        mark_image=opened.mark_image,
        name=opened.name,
        clip_space=ClipSpace.find(tower_folder),
    )
    placed: LisaModel = opened.placed(model)
    return placed
