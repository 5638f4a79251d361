"""Tiny configurations of further vision-language models of transformers, and what their image processors give."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
import transformers
from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches
from vlm_configs import (
    ALTERNATING,
    CROP,
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


GRANITE_PINPOINTS = [[16, 32], [32, 16], [32, 32], [16, 48]]


def granite4_vision() -> Any:
    """4 x 4 patches become 2 x 2 tokens; other views of the tower are added before later layers, one before none."""
    text = {**TEXT_MODEL, "num_hidden_layers": 4, "logits_scaling": 2.0, "embedding_multiplier": 3.0}
    return transformers.Granite4VisionConfig(
        text_config=text,
        vision_config={"model_type": "siglip_vision_model", **TOWER, "hidden_size": 64, "vision_use_head": False},
        image_token_index=IMAGE,
        image_grid_pinpoints=GRANITE_PINPOINTS,
        vision_feature_select_strategy="full",
        downsample_rate="1/2",
        deepstack_layer_map=[[-1, 0]],
        spatial_target_layers=[1, 2, 3, 4],
        tie_word_embeddings=False,
    )


def see_granite4_vision(config: Any, pictures: Pictures) -> AttentionCall:
    square = {"height": CROP, "width": CROP}
    make = transformers.LlavaNextImageProcessorPil(
        size={"shortest_edge": CROP}, crop_size=square, image_grid_pinpoints=GRANITE_PINPOINTS
    )
    seen = dict(make(images=[picture for row in pictures for picture in row], return_tensors="pt"))
    model = SimpleNamespace(config=config, layerwise_projectors=(), downsample_rate=config.downsample_rate)
    crops = [
        torch.zeros(image_size_to_num_patches(size, GRANITE_PINPOINTS, CROP), 4, 1) for size in seen["image_sizes"]
    ]
    pack = transformers.Granite4VisionModel.pack_image_features
    packed = iter(pack(model, crops, seen["image_sizes"], "full", image_newline=torch.zeros(1)))
    return seen, [[[IMAGE] * len(next(packed)) for _ in row] for row in pictures]


def _lines(rows: int, columns: int) -> list[int]:
    return [*([*[IMAGE] * columns, BREAK] * rows)[:-1], END]
