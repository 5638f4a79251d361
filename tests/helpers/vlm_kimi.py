"""A tiny Kimi K2.5, and what its image processor gives for pictures."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch import Tensor
from vlm_configs import END, IMAGE, PATCH, START, TEXT_MODEL, VIDEO
from vlm_inputs import AttentionCall, Pictures, see_qwen


def kimi_k25() -> Any:
    """Latent attention, keys wider than values; the first layer is dense, the others have four experts."""
    return transformers.Kimi_K25Config(
        text_config={
            "model_type": "deepseek_v3",
            **TEXT_MODEL,
            "num_key_value_heads": 4,
            "q_lora_rank": 16,
            "kv_lora_rank": 16,
            "qk_nope_head_dim": 8,
            "qk_rope_head_dim": 8,
            "v_head_dim": 12,
            "n_routed_experts": 4,
            "n_group": 2,
            "topk_group": 1,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 24,
            "first_k_dense_replace": 1,
            "num_mtp_layers": 0,
        },
        vision_config={
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "patch_size": PATCH,
            "pos_emb_height": 6,
            "pos_emb_width": 6,
            "initializer_range": 0.2,
        },
        projection_hidden_size=32,
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        vision_start_token_id=START,
        vision_end_token_id=END,
        tie_word_embeddings=False,
    )


def see_kimi(config: Any, pictures: Pictures) -> AttentionCall:
    """As Qwen2-VL's, but patches in row-major order, each [3, height, width]; its own processor needs torchvision."""
    seen, spans = see_qwen(config, pictures)
    sizes = seen["image_grid_thw"].prod(1).tolist()
    rows = []
    for (_, high, wide), patches in zip(
        seen["image_grid_thw"].tolist(), torch.split(seen["pixel_values"], sizes), strict=True
    ):
        blocks = patches.reshape(high // 2, wide // 2, 2, 2, 3, 2, PATCH, PATCH)[:, :, :, :, :, 0]  # one frame of two
        rows.append(blocks.transpose(1, 2).flatten(0, 3))
    return {"pixel_values": torch.cat(rows), "image_grid_thw": seen["image_grid_thw"]}, spans


def row_major_places(inputs: dict[str, Tensor]) -> Tensor:
    """[P, 2]: (row, column) of each patch in its picture."""
    grids = inputs["image_grid_thw"].tolist()
    return torch.cat([torch.cartesian_prod(torch.arange(high), torch.arange(wide)) for _, high, wide in grids])
