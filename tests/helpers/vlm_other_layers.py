"""Tiny vision-language models whose decoders have other layers than full and sliding attention, and their inputs."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import transformers
from PIL import Image
from torch import Tensor
from vlm_configs import CELL, END, FAKE, IMAGE, PATCH, START, TEXT_MODEL, TOWER
from vlm_inputs import AttentionCall, Pictures

TILE = 6 * PATCH


def llama4() -> Any:
    """Chunks of 12 positions; every other layer has neither them nor a rotary embedding."""
    text = {**TEXT_MODEL, "head_dim": 8, "intermediate_size_mlp": 48, "intermediate_size": 24}
    return transformers.Llama4Config(
        text_config={
            **text,
            "num_local_experts": 2,
            "interleave_moe_layer_step": 4,
            "no_rope_layer_interval": 2,
            "attention_chunk_size": 12,
        },
        vision_config={
            **TOWER,
            "intermediate_size": 128,
            "image_size": TILE,
            "vision_output_dim": 32,
            "projector_input_dim": 32,
            "projector_output_dim": 32,
        },
        image_token_index=IMAGE,
        boi_token_index=START,
        eoi_token_index=END,
    )


def see_llama4(config: Any, pictures: Pictures) -> AttentionCall:
    """As its processor: tiles in rows, with separators, then the whole picture; a small one has no tiles."""
    pixels: list[Tensor] = []
    spans: list[list[list[int]]] = []
    for row in pictures:
        spans.append([])
        for picture in row:
            rows, columns = (max(1, round(side / TILE)) for side in (picture.height, picture.width))
            count = rows * columns if rows * columns > 1 else 0
            whole = _pixels(picture.resize((columns * TILE, rows * TILE)))
            tiles = whole.unfold(1, TILE, TILE).unfold(2, TILE, TILE).permute(1, 2, 0, 3, 4).flatten(0, 1)
            pixels += [*tiles[:count], _pixels(picture.resize((TILE, TILE)))]
            spans[-1].append(_llama4_ids(count, columns))
    return {"pixel_values": torch.stack(pixels)}, spans


def _llama4_ids(count: int, columns: int) -> list[int]:
    tile = [IMAGE] * (TILE // PATCH // 2) ** 2
    ends = [CELL + 1 if (number + 1) % columns == 0 else CELL for number in range(count)]
    return [START, *(token for end in ends for token in (*tile, end)), FAKE, *tile, END]


def _pixels(picture: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1) / 127.5 - 1
