"""Tiny configurations of more of transformers' vision-language models, made of the parts in `vlm_configs`."""

from __future__ import annotations

from typing import Any

import transformers
from vlm_configs import (
    ALTERNATING,
    CROP,
    END,
    IMAGE,
    PATCH,
    QWEN_TOKENS,
    QWEN_TOWER,
    SMALL_CROP,
    START,
    TEXT_MODEL,
    TOWER,
    VIDEO,
    gemma3,
    llava_like,
    mrope,
)

SIGLIP: dict[str, Any] = {"model_type": "siglip_vision_model", **TOWER, "vision_use_head": False}
COHERE: dict[str, Any] = {
    "model_type": "cohere2",
    **TEXT_MODEL,
    "layer_types": ALTERNATING,
    "sliding_window": 12,
}
WINDOWS = {"window_size": 4 * PATCH, "fullatt_block_indexes": [1, 3]}
SIGLIP_24 = {**SIGLIP, "image_size": 24}
HIDDEN = {"hidden_size": 32, "out_hidden_size": 32, "intermediate_size": 48}


def vipllava() -> Any:
    """The projector is given the states behind two layers of the tower."""
    return llava_like("VipLlavaConfig", vision_feature_layers=[-2, 1])


def llava_next_video(side: int = SMALL_CROP, stride: int = 3) -> Any:
    """The 3 x 3 patches of a frame are pooled to one token."""
    pinpoints = [[side * rows, side * columns] for rows, columns in ((1, 2), (2, 1), (2, 2), (1, 3))]
    tokens = {"video_token_index": VIDEO, "spatial_pool_stride": stride}
    config = llava_like("LlavaNextVideoConfig", image_grid_pinpoints=pinpoints, vision_feature_layer=-2, **tokens)
    config.vision_config.image_size = side
    return config


def deepseek_vl() -> Any:
    return transformers.DeepseekVLConfig(
        text_config={"model_type": "llama", **TEXT_MODEL},
        vision_config=SIGLIP,
        image_token_id=IMAGE,
        tie_word_embeddings=False,
    )


def janus() -> Any:
    """With a small vector-quantised part, which only generates images."""
    vision = {**TOWER, "mlp_ratio": 1.5, "projection_dim": 32}
    return transformers.JanusConfig(
        text_config={"model_type": "llama", **TEXT_MODEL},
        vision_config=vision,
        vq_config={
            "embed_dim": 8,
            "num_embeddings": 16,
            "latent_channels": 8,
            "base_channels": 32,
            "channel_multiplier": [1],
            "num_res_blocks": 1,
            "projection_dim": 32,
            "image_token_embed_dim": 32,
        },
        image_token_id=IMAGE,
        tie_word_embeddings=False,
    )


def qianfan_ocr() -> Any:
    return transformers.QianfanOCRConfig(
        text_config={"model_type": "qwen3", **TEXT_MODEL, "head_dim": 8},
        vision_config={**TOWER, "layer_scale_init_value": 1.0},
        image_token_id=IMAGE,
        image_seq_length=4,
        tie_word_embeddings=False,
    )


def aya_vision() -> Any:
    return transformers.AyaVisionConfig(
        text_config=COHERE, vision_config=SIGLIP_24, image_token_index=IMAGE, tie_word_embeddings=False
    )


def cohere2_vision(side: int = 24) -> Any:
    return transformers.Cohere2VisionConfig(
        text_config=COHERE,
        vision_config={**SIGLIP, "image_size": side},
        image_token_id=IMAGE,
        alignment_intermediate_size=64,
        tie_word_embeddings=False,
    )


def _glm(kind: str, **text: Any) -> Any:
    return getattr(transformers, kind)(
        text_config={**TEXT_MODEL, **mrope(2, 1, 1), **text},
        vision_config={**QWEN_TOWER, **HIDDEN, "image_size": CROP},
        **{**QWEN_TOKENS, "image_start_token_id": START, "image_end_token_id": END},
    )


def glm4v() -> Any:
    return _glm("Glm4vConfig")


def glm46v() -> Any:
    config = _glm("Glm46VConfig")
    assert config.text_config.model_type == "glm4v_text"
    return config


def glm4v_moe() -> Any:
    """The first layer is dense, the others have four experts; half of each head is rotated."""
    return _glm(
        "Glm4vMoeConfig",
        head_dim=16,
        n_routed_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=24,
        first_k_dense_replace=1,
    )


def glm_ocr() -> Any:
    return _glm("GlmOcrConfig")


def glmga() -> Any:
    return _glm("GlmgaConfig")


def cosmos3_omni() -> Any:
    return transformers.Cosmos3OmniConfig(
        text_config={**TEXT_MODEL, "head_dim": 16, **mrope(4, 2, 2)},
        vision_config={
            **QWEN_TOWER,
            **HIDDEN,
            "num_position_embeddings": 36,
            "deepstack_visual_indexes": [0, 2],
        },
        **QWEN_TOKENS,
    )


AUDIO_TOWER = {"d_model": 32, "encoder_layers": 1, "encoder_attention_heads": 4, "encoder_ffn_dim": 48}


def qwen2_5_omni_thinker() -> Any:
    return transformers.Qwen2_5OmniThinkerConfig(
        text_config={**TEXT_MODEL, **mrope(2, 1, 1)},
        vision_config={**QWEN_TOWER, **HIDDEN, **WINDOWS},
        audio_config={**AUDIO_TOWER, "output_dim": 32},
        image_token_index=IMAGE,
        video_token_index=VIDEO,
        audio_token_index=120,
        vision_start_token_id=START,
        vision_end_token_id=END,
        tie_word_embeddings=False,
    )


def qwen3_omni_moe_thinker() -> Any:
    return transformers.Qwen3OmniMoeThinkerConfig(
        text_config={
            **TEXT_MODEL,
            "head_dim": 16,
            **mrope(4, 2, 2),
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 24,
        },
        vision_config={
            **QWEN_TOWER,
            **HIDDEN,
            "num_position_embeddings": 36,
            "deepstack_visual_indexes": [0, 2],
        },
        audio_config={**AUDIO_TOWER, "output_dim": 32, "downsample_hidden_size": 8},
        audio_token_id=120,
        **QWEN_TOKENS,
    )


def got_ocr2(kind: str = "GotOcr2Config") -> Any:
    """Two layers of the tower attend in windows; the projector's two convolutions shrink 16 x 16 patches to 4 x 4."""
    return getattr(transformers, kind)(
        text_config={"model_type": "qwen2", **TEXT_MODEL},
        vision_config={
            "hidden_size": 32,
            "output_channels": 16,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "image_size": CROP,
            "patch_size": 1,
            "window_size": 4,
            "global_attn_indexes": [2],
            "mlp_dim": 48,
            "initializer_range": 0.2,
        },
        image_token_index=IMAGE,
        image_seq_length=4,
        tie_word_embeddings=False,
    )


def pp_chart2table() -> Any:
    return got_ocr2("PPChart2TableConfig")


def idefics2() -> Any:
    """Nine latents for each image."""
    return transformers.Idefics2Config(
        text_config={"model_type": "mistral", **TEXT_MODEL, "sliding_window": None},
        vision_config=TOWER,
        perceiver_config={
            "hidden_size": 32,
            "resampler_n_latents": 9,
            "resampler_depth": 1,
            "resampler_n_heads": 4,
            "resampler_head_dim": 8,
            "num_key_value_heads": 2,
            "initializer_range": 0.2,
        },
        image_token_id=IMAGE,
        tie_word_embeddings=False,
    )


def aria(side: int = CROP, patch: int = PATCH) -> Any:
    """Nine queries for an image; four experts in each layer."""
    return transformers.AriaConfig(
        text_config={**TEXT_MODEL, "moe_num_experts": 4, "moe_topk": 2, "moe_num_shared_experts": 1},
        vision_config={"model_type": "idefics3_vision", **TOWER, "image_size": side, "patch_size": patch},
        projector_patch_to_query_dict={(side // patch) ** 2: 9},
        initializer_range=0.2,
        image_token_index=IMAGE,
        tie_word_embeddings=False,
    )


def ovis2() -> Any:
    return transformers.Ovis2Config(
        text_config={"model_type": "qwen2", **TEXT_MODEL},
        vision_config={
            **TOWER,
            "image_size": 24,
            "vocab_size": 64,
            "hidden_stride": 2,
            "num_visual_indicator_tokens": 5,
        },
        image_token_id=IMAGE,
        visual_indicator_token_ids=[120, 121, 122, 123, 124],
        vocab_size=128,
        hidden_size=32,
        tie_word_embeddings=False,
    )


def lighton_ocr() -> Any:
    return transformers.LightOnOcrConfig(
        text_config={"model_type": "qwen3", **TEXT_MODEL, "head_dim": 8},
        vision_config={"model_type": "pixtral", **TOWER, "head_dim": 8, "image_size": 64},
        image_token_id=IMAGE,
        spatial_merge_size=2,
        tie_word_embeddings=False,
    )


def deepseek_vl_hybrid() -> Any:
    return transformers.DeepseekVLHybridConfig(
        text_config={"model_type": "llama", **TEXT_MODEL},
        vision_config=SIGLIP,
        high_res_vision_config={
            "model_type": "sam_vision_model",
            "hidden_size": 32,
            "output_channels": 16,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "image_size": 64,
            "patch_size": 4,
            "window_size": 4,
            "global_attn_indexes": [1],
            "mlp_dim": 48,
        },
        image_token_id=IMAGE,
        tie_word_embeddings=False,
    )


def shieldgemma2() -> Any:
    config = gemma3().to_dict()
    return transformers.ShieldGemma2Config(
        **{key: value for key, value in config.items() if key not in ("model_type", "architectures")}
    )
