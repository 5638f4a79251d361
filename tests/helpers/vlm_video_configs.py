"""Tiny configurations of transformers' vision-language models that take videos or packed pages, and their inputs."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch import Tensor
from vlm_configs import (
    CELL,
    CROP,
    END,
    FAKE,
    IMAGE,
    PAD,
    PATCH,
    QWEN_TOKENS,
    QWEN_TOWER,
    START,
    TEXT,
    TEXT_MODEL,
    TOWER,
    VIDEO,
    llava_like,
    mrope,
)
from vlm_inputs import AttentionCall, Pictures, _flat, _idefics3_ids, _processor, modalities, spans_of, wrapped
from vlm_more_configs import HIDDEN, WINDOWS


def video_llava() -> Any:
    """Two towers, one of which is for the frames of videos."""
    return llava_like("VideoLlavaConfig", vision_feature_layer=-2, video_token_index=VIDEO)


def watch_video_llava(config: Any, videos: list[tuple[int, int, int]], draw: torch.Generator) -> AttentionCall:
    """[CLS] and 16 patches of every frame."""
    frames = 2 * videos[0][0]  # every video of a batch has as many
    pixels = torch.randn(len(videos), frames, 3, CROP, CROP, generator=draw)
    return {"pixel_values_videos": pixels}, [[[VIDEO] * (17 * frames)]] * len(videos)


SIZE = {"size": {"shortest_edge": 64, "longest_edge": 4096}, "patch_size": PATCH, "temporal_patch_size": 1}


def paddleocr_vl() -> Any:
    return transformers.PaddleOCRVLConfig(
        text_config={**TEXT_MODEL, "head_dim": 8, **mrope(2, 1, 1)}, vision_config=TOWER, **QWEN_TOKENS
    )


def see_paddleocr_vl(config: Any, pictures: Pictures) -> AttentionCall:
    seen = dict(_processor("PaddleOCRVLImageProcessor")(**SIZE)(images=_flat(pictures), return_tensors="pt"))
    return seen, spans_of(pictures, (seen["image_grid_thw"].prod(1) // 4).tolist(), wrapped)


def video_llama_3() -> Any:
    vision = {key: value for key, value in TOWER.items() if key != "image_size"}
    return transformers.VideoLlama3Config(
        text_config={"model_type": "qwen2", **TEXT_MODEL},
        vision_config=vision,
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        tie_word_embeddings=False,
    )


def see_video_llama_3(config: Any, pictures: Pictures) -> AttentionCall:
    """A token for each patch."""
    seen = dict(_processor("VideoLlama3ImageProcessor")(**SIZE)(images=_flat(pictures), return_tensors="pt"))
    return seen, spans_of(pictures, seen["image_grid_thw"].prod(1).tolist(), wrapped)


def watch_video_llama_3(config: Any, videos: list[tuple[int, int, int]], draw: torch.Generator) -> AttentionCall:
    """A token for 2 x 2 patches, and the time before every frame."""
    grids = torch.tensor([[2 * t, h // PATCH, w // PATCH] for t, h, w in videos])
    seen = {
        "pixel_values_videos": torch.randn(int(grids.prod(1).sum()), 3 * PATCH**2, generator=draw),
        "video_grid_thw": grids,
        "video_merge_sizes": torch.full((len(videos),), 2),
        "video_compression_mask": torch.ones(int(grids.prod(1).sum()) // 4, dtype=torch.bool),
    }
    return seen, [[[TEXT.start, *[VIDEO] * (h * w // 4)] * t] for t, h, w in grids.tolist()]


def hyperclovax_vision_v2() -> Any:
    """Embeddings, attention and residuals are scaled."""
    scales = {"embedding_multiplier": 0.25, "attention_multiplier": 0.5, "residual_multiplier": 0.7}
    return transformers.HyperCLOVAXVisionV2Config(
        text_config={"model_type": "hyperclovax", **TEXT_MODEL, **scales},
        vision_config={"model_type": "qwen2_5_vl_vision", **QWEN_TOWER, **HIDDEN, **WINDOWS},
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        tie_word_embeddings=False,
    )


def ernie4_5_vl_moe() -> Any:
    """Two of four experts for text, and two of four others for images; the first layer has none."""
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}
    experts = {"moe_intermediate_size": [24, 16], "moe_num_experts": 4, "moe_k": 2, "moe_num_shared_experts": 1}
    tower = {key: value for key, value in QWEN_TOWER.items() if key != "temporal_patch_size"}
    return transformers.Ernie4_5_VLMoeConfig(
        text_config={**TEXT_MODEL, "head_dim": 8, **experts, "rope_parameters": rope},
        vision_config={**tower, "hidden_size": 32, "intermediate_size": 48},
        image_start_token_id=START,
        image_end_token_id=END,
        image_token_id=IMAGE,
        video_start_token_id=START,
        video_end_token_id=END,
        video_token_id=VIDEO,
        tie_word_embeddings=False,
    )


def see_ernie4_5_vl_moe(config: Any, pictures: Pictures) -> AttentionCall:
    make = _processor("Ernie4_5_VLMoeImageProcessor")(**SIZE)
    seen = dict(make(images=_flat(pictures), return_tensors="pt"))
    return seen, spans_of(pictures, (seen["image_grid_thw"].prod(1) // 4).tolist(), wrapped)


def watch_ernie4_5_vl_moe(config: Any, videos: list[tuple[int, int, int]], draw: torch.Generator) -> AttentionCall:
    """A token for 2 x 2 patches of two frames."""
    grids = torch.tensor([[2 * t, h // PATCH, w // PATCH] for t, h, w in videos])
    pixels = torch.randn(int(grids.prod(1).sum()), 3 * PATCH**2, generator=draw)
    spans = [[[START, *[VIDEO] * (t * h * w // 8), END]] for t, h, w in grids.tolist()]
    return {"pixel_values_videos": pixels, "video_grid_thw": grids}, spans


def kinds_for_experts(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tokens around an image belong to it."""
    ids, found = inputs["input_ids"], modalities(inputs)
    around = (ids == START) | (ids == END)
    return {**found, "moe_mm_token_type_ids": found["mm_token_type_ids"].masked_fill(around, 1)}


def granite_docling() -> Any:
    """Tower blocks 0 and 2 are added to the image tokens behind decoder layers 0 and 1 (DeepStack)."""
    scales = {
        "embedding_multiplier": 0.5,
        "attention_multiplier": 0.5,
        "residual_multiplier": 0.7,
        "logits_scaling": 2.0,
    }
    return transformers.GraniteDoclingConfig(
        text_config={**TEXT_MODEL, **scales},
        vision_config={**TOWER, "out_hidden_size": 32, "scale_factor": 2, "deepstack_visual_indexes": [0, 2]},
        density_router_hidden_size=16,
        image_token_id=IMAGE,
        pad_token_id=PAD,
        tie_word_embeddings=False,
    )


def see_granite_docling(config: Any, pictures: Pictures) -> AttentionCall:
    """Tiles, row by row, and the whole picture if there are several."""
    make = _processor("GraniteDoclingImageProcessor")(size={"height": CROP, "width": CROP}, max_patches=4)
    seen = make(images=pictures, return_tensors="pt")
    spans = [
        [_idefics3_ids(*shape) if shape != (1, 1) else [FAKE, CELL, *[IMAGE] * 4] for shape in zip(*row, strict=True)]
        for row in zip(seen["rows"], seen["cols"], strict=True)
    ]
    return {name: seen[name] for name in ("pixel_values", "pixel_attention_mask")}, spans


def hunyuan_vl(*sections: int) -> Any:
    """Axes: position, width, height, number of the image."""
    rope = {"rope_type": "dynamic", "rope_theta": 10000.0, "alpha": 1000.0, "factor": 1.0}
    tower = {key: value for key, value in TOWER.items() if key != "image_size"}
    return transformers.HunYuanVLConfig(
        text_config={
            **TEXT_MODEL,
            "head_dim": 8,
            "rope_parameters": {**rope, "mrope_section": list(sections or (1, 1, 1, 1))},
        },
        vision_config={**tower, "max_image_size": 64},
        image_token_id=IMAGE,
        im_start_id=START,
        im_end_id=END,
        tie_word_embeddings=False,
    )


def see_hunyuan_vl(config: Any, pictures: Pictures) -> AttentionCall:
    """A separator behind each row, one before the picture and one behind it."""
    seen = dict(_processor("HunYuanVLImageProcessor")(**SIZE)(images=_flat(pictures), return_tensors="pt"))
    counts = [h // 2 * (w // 2 + 1) + 2 for _, h, w in seen["image_grid_thw"].tolist()]
    return seen, spans_of(pictures, counts, wrapped)
