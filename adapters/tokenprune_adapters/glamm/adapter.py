"""Recognising and loading GLaMM checkpoints in their original format."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tokenprune.errors import OptionError
from tokenprune_adapters.checkpoint import Part
from tokenprune_adapters.clip import ClipPixels
from tokenprune_adapters.clip_space import ClipSpace
from tokenprune_adapters.glamm.model import GlammModel
from tokenprune_adapters.glamm.prompts import PHRASE_END, PHRASE_START
from tokenprune_adapters.loading import (
    MASK_PROJECTION,
    PROJECTOR,
    SegmenterAdapter,
    mlp,
    open_checkpoint,
    refuse_other_families,
)
from tokenprune_adapters.sam_weights import build_sam

SAM_PREFIX = "model.grounding_encoder."
REGION_ENCODER = "model.region_encoder."


class GlammAdapter(SegmenterAdapter):
    """GLaMM checkpoints in the format of their authors."""

    family = "GLaMM"

    @classmethod
    def loader(cls) -> Callable[..., GlammModel]:
        """`load_glamm`."""
        return load_glamm


def load_glamm(
    source: str | Path,
    vision_tower: str | Path | None = None,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str | None = None,
    device_map: str | dict[str, Any] | None = None,
    attn_implementation: str | None = None,
    template_seed: int = 0,
) -> GlammModel:
    """Read a checkpoint onto transformers' own LLaMA, CLIP and SAM.

    The region encoder, which works only on boxes that are given, is left out; `GlammModel.left_out` says so.

    Args:
        source: folder or hub id. Weights may be sharded or not, .bin or safetensors.
        vision_tower: folder or hub id of the CLIP model, which released checkpoints do not hold. By default the folder
            `vision_tower` in the checkpoint, else the name in its config.json.
        dtype: of all weights; by default float32 on a CPU and the stored type elsewhere.
        device: where everything goes; the CPU by default.
        device_map: spread the decoder over devices (needs accelerate); the rest goes where its embedding table is.
        attn_implementation: of decoder and tower, as in transformers.
        template_seed: seed of the question and answer templates.

    Raises:
        CheckpointError: a file or tensor is missing, damaged, unexpected or mis-shaped, the tokenizer or the tower
            does not belong to it, or it is of another family.
        OptionError: an unknown dtype or device, both device= and device_map=, or a seed that is no whole number.
    """
    if not isinstance(template_seed, int):
        raise OptionError(f"template_seed={template_seed!r} found, expected a whole number")
    opened = open_checkpoint(source, dtype, device, device_map)
    refuse_other_families(opened, "GLaMM", SAM_PREFIX + "image_encoder.")
    tokenizer = opened.tokenizer([*GlammModel.seg_tokens, PHRASE_START, PHRASE_END])
    hidden, reads = opened.checkpoint.shape(PROJECTOR + "0.weight", dims=2)
    tower, tower_folder = opened.tower(vision_tower, reads, attn_implementation)
    sam = build_sam(opened.checkpoint, SAM_PREFIX, opened.config.get("sam_mask_decoder_heads"))
    channels = sam.module.prompt_encoder.hidden_size

    def parts(width: int) -> list[Part[Any]]:
        projector = mlp(PROJECTOR, reads, hidden, width, nn.GELU())
        return [projector, sam, mlp(MASK_PROJECTION, width, width, channels, nn.ReLU())]

    decoder, projector, _, mask_projection = opened.fill(
        attn_implementation, parts, ignore=lambda name: name.startswith(REGION_ENCODER)
    )
    has_regions = any(name.startswith(REGION_ENCODER) for name in opened.checkpoint.names())
    model = GlammModel(
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
        template_seed=template_seed,
        left_out=[REGION_ENCODER.removesuffix(".")] if has_regions else [],
    )
    placed: GlammModel = opened.placed(model)
    return placed
