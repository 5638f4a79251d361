"""Recognising and loading PixelLM checkpoints in their original format."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import CLIPVisionModel

from tokenprune.errors import CheckpointError
from tokenprune_adapters.checkpoint import Part
from tokenprune_adapters.clip_space import ClipSpace
from tokenprune_adapters.loading import (
    MASK_PROJECTION,
    PROJECTOR,
    Opened,
    SegmenterAdapter,
    mlp,
    open_checkpoint,
    refuse_other_families,
)
from tokenprune_adapters.pixellm.model import PixelLMModel
from tokenprune_adapters.pixellm.pixel_decoder import NECK, build_pixel_decoder
from tokenprune_adapters.pixellm.tower import EARLY_LAYER, resize_tower

MASK_PROJECTOR = "model.out_mm_projector."
SQUARE = 448  # the authors' own, where config.json does not say


class PixelLMAdapter(SegmenterAdapter):
    """PixelLM checkpoints (7B, 13B, or any size) in the format of their authors."""

    family = "PixelLM"

    @classmethod
    def loader(cls) -> Callable[..., PixelLMModel]:
        """`load_pixellm`."""
        return load_pixellm


def load_pixellm(
    source: str | Path,
    vision_tower: str | Path | None = None,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str | None = None,
    device_map: str | dict[str, Any] | None = None,
    attn_implementation: str | None = None,
) -> PixelLMModel:
    """Read a checkpoint onto transformers' own LLaMA and CLIP, and a pixel decoder of SAM's parts.

    Args:
        source: folder or hub id. Weights may be sharded or not, .bin or safetensors.
        vision_tower: folder or hub id of the CLIP model, which released checkpoints do not hold. By default the folder
            `vision_tower` in the checkpoint, else the name in its config.json.
        dtype: of all weights; by default float32 on a CPU and the stored type elsewhere.
        device: where everything goes; the CPU by default.
        device_map: spread the decoder over devices (needs accelerate); the rest goes where its embedding table is.
        attn_implementation: of decoder and tower, as in transformers. Where it is a flash one the tower runs with
            "sdpa", since flash attention cannot hide single patches.

    Raises:
        CheckpointError: a file or tensor is missing, damaged, unexpected or mis-shaped, the tokenizer or the tower
            does not belong to it, or it is of another family or another kind of PixelLM.
        OptionError: an unknown dtype or device, or both device= and device_map=.
    """
    opened = open_checkpoint(source, dtype, device, device_map)
    refuse_other_families(opened, "PixelLM", NECK)
    tokenizer = opened.tokenizer(PixelLMModel.seg_tokens)
    square = int(opened.config.get("resize_vision_tower_size") or SQUARE)
    hidden, reads = opened.checkpoint.shape(PROJECTOR + "0.weight", dims=2)
    tower, tower_folder = _tower(opened, vision_tower, reads, attn_implementation, square)
    mask_hidden = opened.checkpoint.shape(MASK_PROJECTOR + "0.weight", dims=2)[0]
    mask_width = opened.checkpoint.shape(MASK_PROJECTOR + "2.weight", dims=2)[0]
    config: Any = tower.config
    heads = opened.config.get("sam_mask_decoder_heads")
    pixel_part = build_pixel_decoder(opened.checkpoint, square, config.patch_size, mask_width, heads)
    channels = pixel_part.module.prompt_encoder.hidden_size

    def parts(width: int) -> list[Part[Any]]:
        return [
            mlp(PROJECTOR, reads, hidden, width, nn.GELU()),
            mlp(MASK_PROJECTOR, reads, mask_hidden, mask_width, nn.GELU()),
            pixel_part,
            mlp(MASK_PROJECTION, width, width, channels, nn.ReLU()),
        ]

    decoder, projector, mask_projector, pixel_decoder, mask_projection = opened.fill(attn_implementation, parts)
    model = PixelLMModel(
        decoder=decoder,
        tower=tower,
        projector=projector,
        mask_projector=mask_projector,
        pixel_decoder=pixel_decoder,
        mask_projection=mask_projection,
        tokenizer=tokenizer,
        square=square,
        select_layer=int(opened.config.get("mm_vision_select_layer", -2)),
        mark_image=opened.mark_image,
        name=opened.name,
        clip_space=ClipSpace.find(tower_folder),
    )
    placed: PixelLMModel = opened.placed(model)
    return placed


def _tower(
    opened: Opened, vision_tower: str | Path | None, reads: int, attn_implementation: str | None, square: int
) -> tuple[CLIPVisionModel, Path]:
    """The tower, resized in float32 and then converted, and its folder."""
    attention = "sdpa" if attn_implementation and "flash" in attn_implementation else attn_implementation
    tower, folder = replace(opened, dtype=torch.float32).tower(vision_tower, reads, attention)
    config: Any = tower.config
    if square % config.patch_size:
        raise CheckpointError(
            f"vision tower {folder} has patches of {config.patch_size} pixels, which do not divide the "
            f"{square} pixels that {opened.folder}/config.json gives as resize_vision_tower_size; "
            "pass vision_tower= the folder of the tower that the checkpoint was trained with"
        )
    if config.num_hidden_layers + 1 < -EARLY_LAYER:
        raise CheckpointError(
            f"vision tower {folder} has {config.num_hidden_layers} layers, but PixelLM reads the hidden states number "
            f"{EARLY_LAYER}; pass vision_tower= the folder of the tower that the checkpoint was trained with"
        )
    resize_tower(tower, square)
    converted: Any = tower
    converted.to(opened.dtype)
    return tower, folder
