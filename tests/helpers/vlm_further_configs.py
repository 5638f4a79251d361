"""Tiny configurations of further vision-language models of transformers, and what their image processors give."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import transformers
from PIL import Image
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
    START,
    TEXT,
    TEXT_MODEL,
    TOWER,
    VIDEO,
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


def cosmos3_edge() -> Any:
    return transformers.Cosmos3EdgeConfig(
        text_config={**TEXT_MODEL, "head_dim": 16, **mrope(4, 2, 2)},
        vision_config={
            **{key: value for key, value in TOWER.items() if key != "image_size"},
            "num_patches": 36,
            "spatial_merge_size": 2,
        },
        projector_hidden_size=48,
        **QWEN_TOKENS,
    )


def see_cosmos3_edge(config: Any, pictures: Pictures) -> AttentionCall:
    size = {"shortest_edge": 64, "longest_edge": 4096}
    make = transformers.Cosmos3EdgeImageProcessorPil(patch_size=PATCH, merge_size=2, size=size)
    seen = dict(make(images=[picture for row in pictures for picture in row], return_tensors="pt"))
    counts = iter((seen["image_grid_thw"].prod(1) // 4).tolist())
    return seen, [[[START, *[IMAGE] * next(counts), END] for _ in row] for row in pictures]


def watch_cosmos3_edge(config: Any, videos: list[tuple[int, int, int]], draw: torch.Generator) -> AttentionCall:
    """Every frame stands alone, behind its time."""
    grids = torch.tensor([[t, h // PATCH, w // PATCH] for t, h, w in videos])
    pixels = torch.randn(int(grids.prod(1).sum()), 3 * PATCH**2, generator=draw)
    spans = [[[TEXT.start, START, *[VIDEO] * (h * w // 4), END] * t] for t, h, w in grids.tolist()]
    return {"pixel_values_videos": pixels, "video_grid_thw": grids}, spans


def step3p7() -> Any:
    """Sliding layers have fewer heads, and full ones rotate half of each; the last two layers have four experts."""
    return transformers.Step3p7Config(
        text_config={
            **TEXT_MODEL,
            "head_dim": 8,
            "layer_types": ALTERNATING,
            "sliding_window": 12,
            "num_sliding_attention_heads": 2,
            "rope_theta": [10000.0, 50000.0] * 2,
            "partial_rotary_factors": [1.0, 0.5] * 2,
            "mlp_layer_types": ["dense", "dense", "sparse", "sparse"],
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 24,
            "share_expert_dim": 24,
        },
        vision_config={**TOWER, "image_size": 48, "mlp_ratio": 1.5, "layer_scale_init_value": 1.0},
        image_token_id=IMAGE,
    )


def see_step3p7(config: Any, pictures: Pictures) -> AttentionCall:
    """A crop for each 16 pixels of width, 2 x 2 tokens each, and the whole picture, 3 x 3."""
    whole, crops, counts, spans = [], [], [], []
    crop, end = [START, *[IMAGE] * 4, END], [START, *[IMAGE] * 9, END]
    for row in pictures:
        spans.append([])
        for picture in row:
            counts.append(picture.width // 16)
            for place in range(counts[-1]):
                crops.append(_pixels(picture.crop((16 * place, 0, 16 * place + 16, picture.height)), 32))
            whole.append(_pixels(picture, 48))
            spans[-1].append([*crop * counts[-1], *end])
    seen = {"pixel_values": torch.stack(whole), "pixel_values_local": torch.stack(crops)}
    return {**seen, "num_local_patches": torch.tensor(counts)}, spans


def molmo2() -> Any:
    tower = {"hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 8}
    tower |= {"intermediate_size": 48, "initializer_range": 0.1}
    return transformers.Molmo2Config(
        text_config={**TEXT_MODEL, "head_dim": 8, "additional_vocab_size": 0},
        vision_config={**tower, "num_hidden_layers": 3, "image_size": [CROP, CROP], "patch_size": PATCH},
        adapter_config={**tower, "vision_feature_layer": [-1, -2], "text_hidden_size": 32},
        image_patch_id=IMAGE,
        initializer_range=0.2,
    )


def see_molmo2(config: Any, pictures: Pictures) -> AttentionCall:
    """The whole picture and tiles of it, 2 x 2 patches for each token; text ends each line of the tiles' tokens."""
    crops, pooling, grids, spans = [], [], [], []
    inside = torch.arange(16).view(4, 4)
    for row in pictures:
        spans.append([])
        for picture in row:
            rows, columns = picture.height // CROP, picture.width // CROP
            tiles = picture.resize((columns * CROP, rows * CROP))
            boxes = [
                (CROP * c, CROP * r, CROP * c + CROP, CROP * r + CROP) for r in range(rows) for c in range(columns)
            ]
            first = 16 * len(crops)
            crops += [_pixels(picture, CROP), *(_pixels(tiles.crop(box), CROP) for box in boxes)]
            numbers = torch.arange(rows * columns).view(rows, 1, columns, 1)
            places = (16 * numbers + inside.view(1, 4, 1, 4)).reshape(4 * rows, 4 * columns)
            for grid in (first + inside, first + 16 + places):
                blocks = grid.unfold(0, 2, 2).unfold(1, 2, 2)  # [rows, columns, 2, 2]
                pooling.append(blocks.reshape(-1, 4))
            grids.append((2, 2, 2 * rows, 2 * columns))
            line = [*[IMAGE] * (2 * columns), BREAK]
            spans[-1].append([START, *[IMAGE] * 4, END, START, *line * (2 * rows), END])
    pixels = torch.stack(crops).unfold(2, PATCH, PATCH).unfold(3, PATCH, PATCH)  # [crops, 3, rows, columns, …]
    seen = {"pixel_values": pixels.permute(0, 2, 3, 4, 5, 1).flatten(3).flatten(1, 2)}
    return {**seen, "image_token_pooling": torch.cat(pooling), "image_grids": torch.tensor(grids)}, spans


def one_block(inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Images, and what frames them, attend to each other both ways."""
    return {**inputs, "mm_token_type_ids": (inputs["input_ids"] >= IMAGE).int()}


def _pixels(picture: Image.Image, side: int) -> torch.Tensor:
    pixels: torch.Tensor = torch.from_numpy(np.array(picture.resize((side, side))) / 127.5 - 1)
    return pixels.float().movedim(2, 0)


def _lines(rows: int, columns: int) -> list[int]:
    return [*([*[IMAGE] * columns, BREAK] * rows)[:-1], END]
