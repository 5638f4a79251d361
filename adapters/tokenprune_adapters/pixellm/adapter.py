"""Recognising and loading PixelLM checkpoints in their original format."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import CLIPVisionModel

from tokenprune.errors import CheckpointError
from tokenprune_adapters.common.checkpoint import Part
from tokenprune_adapters.common.load_options import LoadOptions
from tokenprune_adapters.pixellm.model import PixelLMModel
from tokenprune_adapters.pixellm.pixel_decoder import NECK, build_pixel_decoder
from tokenprune_adapters.pixellm.tower import EARLY_LAYER, resize_tower
from tokenprune_adapters.segmentation.loading import MASK_PROJECTION, Opened, SegmenterAdapter, mlp

MASK_PROJECTOR = "model.out_mm_projector."
SQUARE = 448  # the authors' own, where config.json does not say


class PixelLMAdapter(SegmenterAdapter):
    """PixelLM checkpoints (7B, 13B, or any size) in the format of their authors, on LLaMA, CLIP and a pixel decoder of
    SAM's parts.

    Where `attn_implementation` is a flash one the tower runs with "sdpa", since flash attention cannot hide single
    patches.
    """

    family = "PixelLM"
    prefix = NECK

    @classmethod
    def build(cls, opened: Opened[LoadOptions]) -> PixelLMModel:
        """The model of an opened checkpoint, its tower resized.

        Raises:
            CheckpointError: as in `load`, or it is of another kind of PixelLM.
        """
        tokenizer = opened.tokenizer(PixelLMModel.seg_tokens)
        square = int(opened.config.get("resize_vision_tower_size") or SQUARE)
        _refuse_other_settings(opened)
        plan = opened.projector()
        tower, tower_folder = _tower(opened, plan.reads, square)
        mask_hidden = opened.checkpoint.shape(MASK_PROJECTOR + "0.weight", dims=2)[0]
        mask_width = opened.checkpoint.shape(MASK_PROJECTOR + "2.weight", dims=2)[0]
        config: Any = tower.config
        heads = opened.config.get("sam_mask_decoder_heads")
        pixel_part = build_pixel_decoder(opened.checkpoint, square, config.patch_size, mask_width, heads)
        channels = pixel_part.module.prompt_encoder.hidden_size

        def parts(width: int) -> list[Part[Any]]:
            return [
                plan.part(width),
                mlp(MASK_PROJECTOR, plan.reads, mask_hidden, mask_width, nn.GELU()),
                pixel_part,
                mlp(MASK_PROJECTION, width, width, channels, nn.ReLU()),
            ]

        decoder, projector, mask_projector, pixel_decoder, mask_projection = opened.fill(parts)
        return PixelLMModel(
            decoder=decoder,
            tower=tower,
            projector=projector,
            mask_projector=mask_projector,
            pixel_decoder=pixel_decoder,
            mask_projection=mask_projection,
            tokenizer=tokenizer,
            square=square,
            **opened.about(tower_folder),
        )


def _refuse_other_settings(opened: Opened[LoadOptions]) -> None:
    """Refuse settings of the authors' code that are not supported here."""
    for name in ("resize_vision_tower", "pad_train_clip_images"):
        if opened.config.get(name) is False:
            raise CheckpointError(
                f"{opened.folder}/config.json says {name} false; only PixelLMs that were trained with a resized "
                "tower and padded pictures are supported"
            )


def _tower(opened: Opened[LoadOptions], reads: int, square: int) -> tuple[CLIPVisionModel, Path]:
    """The tower, resized in float32 and then converted, and its folder."""
    attention = opened.options.attn_implementation
    options = replace(opened.options, attn_implementation="sdpa" if attention and "flash" in attention else attention)
    tower, folder = replace(opened, dtype=torch.float32, options=options).tower(reads, resized=square)
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
