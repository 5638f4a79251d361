"""Tiny configurations of further vision-language models of transformers, and what their image processors give."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from vlm_configs import (
    ALTERNATING,
    END,
    FAKE,
    IMAGE,
    PATCH,
    QWEN_TOKENS,
    QWEN_TOWER,
    TEXT_MODEL,
    TOWER,
    llava_like,
    mrope,
)
from vlm_inputs import AttentionCall, Pictures

BREAK = FAKE


PIXTRAL = {"model_type": "pixtral", **TOWER, "head_dim": 8, "image_size": 64}


def llava_pixtral() -> Any:
    return llava_like(tower=PIXTRAL, vision_feature_layer=-1, vision_feature_select_strategy="full")


def mistral3() -> Any:
    return transformers.Mistral3Config(
        text_config={"model_type": "mistral", **TEXT_MODEL, "head_dim": 8, "sliding_window": None},
        vision_config=PIXTRAL,
        image_token_index=IMAGE,
        spatial_merge_size=2,
        tie_word_embeddings=False,
    )


def see_mistral3(config: Any, pictures: Pictures) -> AttentionCall:
    """Of any size, padded to the largest of the batch; text ends each line of tokens."""
    images = [picture for row in pictures for picture in row]
    side = PATCH * getattr(config, "spatial_merge_size", 1)
    make = transformers.PixtralImageProcessorPil(size={"longest_edge": 20 * side // PATCH}, patch_size=side)
    seen = dict(make(images=images, return_tensors="pt"))
    sizes = iter((torch.as_tensor(seen["image_sizes"]) // side).tolist())
    return seen, [[_lines(*next(sizes)) for _ in row] for row in pictures]


def cohere_compass() -> Any:
    """Sliding layers have M-RoPE and full ones no rotary embedding; DeepStack as in `qwen3_vl`."""
    rotary = mrope(4, 2, 2)["rope_parameters"]
    return transformers.CohereCompassConfig(
        text_config={
            **TEXT_MODEL,
            "head_dim": 16,
            "layer_types": ALTERNATING,
            "sliding_window": 12,
            "rope_parameters": {"sliding_attention": rotary, "full_attention": None},
            "logit_scale": 0.5,
        },
        vision_config={
            **QWEN_TOWER,
            "hidden_size": 32,
            "out_hidden_size": 32,
            "intermediate_size": 48,
            "num_position_embeddings": 36,
            "deepstack_visual_indexes": [0, 2],
        },
        **QWEN_TOKENS,
    )


def _lines(rows: int, columns: int) -> list[int]:
    return [*([*[IMAGE] * columns, BREAK] * rows)[:-1], END]
