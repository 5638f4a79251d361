"""A PixelLM-shaped model of full size with random weights, that gives one fixed answer, like `random_lisa`."""

from __future__ import annotations

import torch
from random_lisa import LisaShape, clip, llama, taught, uninitialised
from torch import nn
from transformers import SamConfig, SamVisionConfig

import tokenprune_adapters.bundled as bundled
from tokenprune_adapters.common.tokenizer import LlamaSlowTokenizer
from tokenprune_adapters.pixellm.model import PixelLMModel
from tokenprune_adapters.pixellm.pixel_decoder import PixelDecoder
from tokenprune_adapters.pixellm.tower import resize_tower

SQUARE, CHANNELS = 448, 256


def random_pixellm(shape: LisaShape, dtype: torch.dtype, device: str = "cpu") -> PixelLMModel:
    """A model of that shape. The width of the projected mask features is ours: that of the decoder."""
    added = {token: 32000 + number for number, token in enumerate((*PixelLMModel.seg_tokens, "<im_start>", "<im_end>"))}
    tokenizer = LlamaSlowTokenizer(bundled.lisa_tiny() / "tokenizer.model", added)
    wide = shape.hidden
    with uninitialised(dtype):
        decoder, tower = llama(shape, tokenizer.eos_id), clip(shape)
        vision = SamVisionConfig(image_size=SQUARE, patch_size=14, num_pos_feats=CHANNELS // 2)
        model = PixelLMModel(
            decoder=decoder,
            tower=tower,
            projector=nn.Sequential(nn.Linear(1024, 2 * wide), nn.GELU(), nn.Linear(2 * wide, wide)),
            mask_projector=nn.Sequential(nn.Linear(1024, wide), nn.GELU(), nn.Linear(wide, wide)),
            pixel_decoder=PixelDecoder(SamConfig(vision_config=vision.to_dict()), wide),
            mask_projection=nn.Sequential(nn.Linear(wide, wide), nn.ReLU(), nn.Linear(wide, CHANNELS)),
            square=SQUARE,
            select_layer=-2,
            tokenizer=tokenizer,
            mark_image=True,
            name=f"{shape.name} (random weights)",
        )
    resize_tower(model.tower, SQUARE)
    return taught(model).to(device=device, dtype=dtype)
