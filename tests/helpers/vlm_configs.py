"""Tiny configurations of transformers' vision-language models: four decoder layers, towers of two to four."""

from __future__ import annotations

from typing import Any

import transformers

VOCABULARY = 128
PAD, BOS = 0, 1
TEXT = range(3, 90)
IMAGE, VIDEO, START, END, FAKE, GLOBAL, CELL = 100, 101, 102, 103, 104, 105, 110
SPECIAL = [PAD, *range(100, VOCABULARY)]
PATCH, CROP = 4, 16

TEXT_MODEL: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.2,
    "pad_token_id": PAD,
    "bos_token_id": BOS,
    "eos_token_id": None,
    "tie_word_embeddings": False,
}
TOWER: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "image_size": CROP,
    "patch_size": PATCH,
    "initializer_range": 0.2,
}
QWEN_TOWER: dict[str, Any] = {
    "depth": 4,
    "num_heads": 4,
    "patch_size": PATCH,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
    "initializer_range": 0.2,
}
QWEN_TOKENS: dict[str, Any] = {
    "image_token_id": IMAGE,
    "video_token_id": VIDEO,
    "vision_start_token_id": START,
    "vision_end_token_id": END,
    "tie_word_embeddings": False,
}
SMALL_CROP = 12
PINPOINTS = [[12, 24], [24, 12], [24, 24], [12, 36]]


def llava_like(kind: str = "LlavaConfig", tower: dict[str, Any] | None = None, **more: Any) -> Any:
    vision = {"model_type": "clip_vision_model", "projection_dim": 32, "initializer_factor": 4.0, **TOWER}
    return getattr(transformers, kind)(
        text_config={"model_type": "llama", **TEXT_MODEL},
        vision_config=tower or vision,
        image_token_index=IMAGE,
        tie_word_embeddings=False,
        **more,
    )


def llava() -> Any:
    return llava_like(vision_feature_layer=-2, vision_feature_select_strategy="default", image_seq_length=16)


def llava_siglip() -> Any:
    tower = {"model_type": "siglip_vision_model", **TOWER, "vision_use_head": False}
    return llava_like(tower=tower, vision_feature_layer=-1, vision_feature_select_strategy="full", image_seq_length=16)


def llava_next() -> Any:
    config = llava_like("LlavaNextConfig", image_grid_pinpoints=PINPOINTS, vision_feature_layer=-2)
    config.vision_config.image_size = SMALL_CROP
    return config


def llava_onevision() -> Any:
    return transformers.LlavaOnevisionConfig(
        text_config={"model_type": "qwen2", **TEXT_MODEL},
        vision_config={
            "model_type": "siglip_vision_model",
            **TOWER,
            "image_size": SMALL_CROP,
            "vision_use_head": False,
        },
        image_token_index=IMAGE,
        video_token_index=VIDEO,
        image_grid_pinpoints=PINPOINTS,
        vision_aspect_ratio="anyres_max_2",
        tie_word_embeddings=False,
    )


def mrope(*sections: int) -> dict[str, Any]:
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": list(sections)}
    return {"rope_parameters" if int(transformers.__version__.split(".")[0]) >= 5 else "rope_scaling": rope}


def qwen2_vl() -> Any:
    return transformers.Qwen2VLConfig(
        text_config={**TEXT_MODEL, **mrope(2, 1, 1)},
        vision_config={**QWEN_TOWER, "embed_dim": 32, "hidden_size": 32, "mlp_ratio": 2},
        **QWEN_TOKENS,
    )


def qwen2_5_vl() -> Any:
    """Blocks 0 and 2 of the tower attend in windows of 2 x 2 merged patches, 1 and 3 to the whole image."""
    return transformers.Qwen2_5_VLConfig(
        text_config={**TEXT_MODEL, **mrope(2, 1, 1)},
        vision_config={
            **QWEN_TOWER,
            "hidden_size": 32,
            "out_hidden_size": 32,
            "intermediate_size": 48,
            "window_size": 4 * PATCH,
            "fullatt_block_indexes": [1, 3],
        },
        **QWEN_TOKENS,
    )


def _qwen3(kind: str, **text: Any) -> Any:
    """Tower blocks 0 and 2 are added to the image tokens behind decoder layers 0 and 1 (DeepStack)."""
    return getattr(transformers, kind)(
        text_config={**TEXT_MODEL, "head_dim": 16, **mrope(4, 2, 2), **text},
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


def qwen3_vl() -> Any:
    return _qwen3("Qwen3VLConfig")


def qwen3_vl_moe() -> Any:
    return _qwen3("Qwen3VLMoeConfig", num_experts=4, num_experts_per_tok=2, moe_intermediate_size=24)


def internvl() -> Any:
    return transformers.InternVLConfig(
        text_config={"model_type": "qwen2", **TEXT_MODEL},
        vision_config={
            **TOWER,
            "image_size": [CROP, CROP],
            "patch_size": [PATCH, PATCH],
            "layer_scale_init_value": 1.0,
        },
        image_token_id=IMAGE,
        image_seq_length=4,
        tie_word_embeddings=False,
    )


def _idefics3(kind: str) -> Any:
    return getattr(transformers, kind)(
        text_config={"model_type": "llama", **TEXT_MODEL},
        vision_config=dict(TOWER),
        image_token_id=IMAGE,
        pad_token_id=PAD,
        scale_factor=2,
        tie_word_embeddings=False,
    )


def smolvlm() -> Any:
    return _idefics3("SmolVLMConfig")


def idefics3() -> Any:
    return _idefics3("Idefics3Config")


def _paligemma(**text: Any) -> Any:
    return transformers.PaliGemmaConfig(
        text_config={**TEXT_MODEL, "head_dim": 8, **text},
        vision_config={
            "model_type": "siglip_vision_model",
            **TOWER,
            "projection_dim": 32,
            "vision_use_head": False,
        },
        image_token_index=IMAGE,
        projection_dim=32,
        hidden_size=32,
        tie_word_embeddings=False,
    )


ALTERNATING = ["sliding_attention", "full_attention"] * 2


def paligemma() -> Any:
    return _paligemma(model_type="gemma")


def paligemma2() -> Any:
    """Sliding layers whose window of 12 is smaller than any test sequence, and caps low enough to bite."""
    return _paligemma(
        model_type="gemma2",
        layer_types=ALTERNATING,
        sliding_window=12,
        attn_logit_softcapping=2.0,
        final_logit_softcapping=5.0,
        query_pre_attn_scalar=8,
    )


def gemma3() -> Any:
    return transformers.Gemma3Config(
        text_config={
            **TEXT_MODEL,
            "head_dim": 8,
            "layer_types": ALTERNATING,
            "sliding_window": 12,
            "query_pre_attn_scalar": 8,
        },
        vision_config={"model_type": "siglip_vision_model", **TOWER, "image_size": 24, "vision_use_head": False},
        mm_tokens_per_image=9,
        boi_token_index=START,
        eoi_token_index=END,
        image_token_index=IMAGE,
        initializer_range=0.2,
        tie_word_embeddings=False,
    )
