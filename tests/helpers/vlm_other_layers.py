"""Tiny vision-language models whose decoders have other layers than full and sliding attention, and their inputs."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import transformers
from PIL import Image
from torch import Tensor
from torch.nn.functional import pad
from vlm_configs import CELL, END, FAKE, IMAGE, PATCH, QWEN_TOKENS, QWEN_TOWER, START, TEXT_MODEL, TOWER, VIDEO, mrope
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


STATES: dict[str, Any] = {
    **TEXT_MODEL,
    "head_dim": 16,
    **mrope(4, 2, 2),
    "layer_types": ["full_attention", "full_attention", "linear_attention", "full_attention"],
    "initializer_range": 0.1,  # more, and the norm of the delta net's small outputs amplifies rounding
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
}
QWEN: dict[str, Any] = {
    "vision_config": {
        **QWEN_TOWER,
        "hidden_size": 32,
        "out_hidden_size": 32,
        "intermediate_size": 48,
        "num_position_embeddings": 36,
    },
    **QWEN_TOKENS,
}


def qwen3_5() -> Any:
    """One layer is a gated delta net, not the first: on short prompts strategies with a budget read that one."""
    return transformers.Qwen3_5Config(text_config=STATES, **QWEN)


def qwen3_5_moe() -> Any:
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
    text = {**STATES, **experts, "shared_expert_intermediate_size": 24}
    return transformers.Qwen3_5MoeConfig(text_config=text, **QWEN)


def lfm2_vl() -> Any:
    layers = ["full_attention", "full_attention", "conv", "full_attention"]
    return transformers.Lfm2VlConfig(
        text_config={"model_type": "lfm2", **TEXT_MODEL, "layer_types": layers, "block_multiple_of": 8},
        vision_config={"model_type": "siglip2_vision_model", **TOWER, "num_patches": 16, "vision_use_head": False},
        image_token_id=IMAGE,
        projector_hidden_size=32,
        tie_embedding=False,
    )


def lfm3_vl() -> Any:
    """With sliding windows and rotary tables for each type of layer; convolutions take none."""
    tower = {key: value for key, value in TOWER.items() if key != "image_size"}
    layers = ["sliding_attention", "full_attention", "conv", "sliding_attention"]
    return transformers.Lfm3VlConfig(
        text_config={"model_type": "lfm3", **TEXT_MODEL, "head_dim": 8, "layer_types": layers, "sliding_window": 12},
        vision_config={**tower, "num_key_value_heads": 2, "layer_types": ["conv", "full_attention", "conv"]},
        projector_hidden_size=32,
        **QWEN_TOKENS,
    )


def _minicpm(kind: str, **more: Any) -> Any:
    return getattr(transformers, kind)(
        text_config={"model_type": "qwen3_5_text", **STATES},
        vision_config=TOWER,
        insert_layer_id=1,
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        tie_word_embeddings=False,
        **more,
    )


def minicpmv4_6() -> Any:
    return _minicpm("MiniCPMV4_6Config")


def minicpmv4_7(newline: int = CELL + 2) -> Any:
    ids = {"slice_start_id": CELL, "slice_end_id": CELL + 1, "newline_id": newline}
    return _minicpm("MiniCPMV4_7Config", image_start_id=START, image_end_id=END, **ids)


def minicpm_ocr() -> Any:
    return _minicpm("MiniCPMOcrConfig")


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


def see_lfm2_vl(config: Any, pictures: Pictures) -> AttentionCall:
    """Patches in rows, padded to the largest picture of the batch."""
    sizes, patches = _patches(pictures, 2 * PATCH)
    most = max(map(len, patches))
    lengths = torch.tensor([len(own) for own in patches])
    seen = {
        "pixel_values": torch.stack([pad(own, (0, 0, 0, most - len(own))) for own in patches]),
        "spatial_shapes": torch.tensor(sizes),
        "pixel_attention_mask": (torch.arange(most) < lengths[:, None]).long(),
    }
    return seen, _wrapped(pictures, [rows * columns // 4 for rows, columns in sizes])


def see_minicpm(config: Any, pictures: Pictures) -> AttentionCall:
    """All patches of the batch beside one another, as one picture of the height of a patch."""
    merge = 4 if config.downsample_mode == "16x" else 2
    larger = [[one.resize((one.width * merge // 2, one.height * merge // 2)) for one in row] for row in pictures]
    sizes, patches = _patches(larger, merge * PATCH)
    packed = torch.cat(patches).unflatten(1, (3, PATCH, PATCH)).permute(1, 2, 0, 3).flatten(2)
    seen = {"pixel_values": packed[None], "target_sizes": torch.tensor(sizes, dtype=torch.int32)}
    return seen, _wrapped(pictures, [rows * columns // merge**2 for rows, columns in sizes])


def _patches(pictures: Pictures, unit: int) -> tuple[list[tuple[int, int]], list[Tensor]]:
    """Rows and columns of patches of each picture, whose sides are rounded to a unit, and its patches."""
    sizes, patches = [], []
    for picture in (picture for row in pictures for picture in row):
        height, width = (max(1, round(side / unit)) * unit for side in (picture.height, picture.width))
        sizes.append((height // PATCH, width // PATCH))
        cut = _pixels(picture.resize((width, height))).unfold(1, PATCH, PATCH).unfold(2, PATCH, PATCH)
        patches.append(cut.permute(1, 2, 0, 3, 4).flatten(0, 1).flatten(1))
    return sizes, patches


def _wrapped(pictures: Pictures, counts: list[int]) -> list[list[list[int]]]:
    left = iter(counts)
    return [[[START, *[IMAGE] * next(left), END] for _ in row] for row in pictures]
