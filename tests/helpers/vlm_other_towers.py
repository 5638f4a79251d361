"""Tiny configurations and inputs of models with visual vocabularies, queries, or towers of kinds of their own."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor
from vlm_configs import ALTERNATING, CROP, IMAGE, PATCH, QWEN_TOWER, TEXT_MODEL, TOWER, VIDEO
from vlm_gemma4 import gemma4, gemma4_unified, see_gemma4, watch_gemma4
from vlm_inputs import AttentionCall, Pictures, fixed, modalities, plain, see_qwen, spans_of, watch_qwen, wrapped
from vlm_more_configs import HIDDEN, WINDOWS

CODES = range(112, 128)  # ids of the words of a visual vocabulary
END_OF_LINE = 111
VQ: dict[str, Any] = {"base_channels": 32, "channel_multiplier": [1, 1, 1], "num_res_blocks": 1}


def chameleon() -> Any:
    """A word for each 4 x 4 pixels."""
    letters = [str(code).translate(str.maketrans("0123456789", "ABCDEFGHIJ")) for code in range(len(CODES))]
    return transformers.ChameleonConfig(
        **TEXT_MODEL,
        vq_config={
            **VQ,
            "embed_dim": 8,
            "num_embeddings": len(CODES),
            "latent_channels": 8,
            "resolution": CROP,
            "initializer_range": 0.2,
        },
        vocabulary_map={"<image>": IMAGE, **{f"IMGIMG{name}Z": id for name, id in zip(letters, CODES, strict=True)}},
    )


def emu3(levels: int = 3) -> Any:
    """A word for each 4 x 4 pixels, and a word at the end of each line.

    Args:
        levels: of the tower; each but the first halves the sides of the picture.
    """
    words = {f"<|visual token {code:06}|>": id for code, id in enumerate(CODES)}
    return transformers.Emu3Config(
        text_config=TEXT_MODEL,
        vq_config={
            **VQ,
            "channel_multiplier": [1] * levels,
            "codebook_size": len(CODES),
            "embed_dim": 4,
            "temporal_downsample_factor": 1,
            "attn_resolutions": [2],
            "hidden_size": 32,
        },
        vocabulary_map={"<image>": IMAGE, "<|extra_200|>": END_OF_LINE, **words},
    )


def see_emu3(config: Any, pictures: Pictures) -> AttentionCall:
    """All pictures of one size, since the padding of a batch changes the words of the smaller ones."""
    flat = [picture.resize((24, 16)) for row in pictures for picture in row]
    pixels = torch.stack([torch.tensor(np.asarray(picture)) for picture in flat])
    seen = {"pixel_values": pixels.permute(0, 3, 1, 2) / 127.5 - 1, "image_sizes": torch.tensor([[16, 24]] * len(flat))}
    return seen, spans_of(pictures, [4 * (6 + 1)] * len(flat), wrapped)


def deepseek_ocr2(longest: int = 512, **sam: Any) -> Any:
    """The first layer of the decoder is dense, the others have four experts.

    Args:
        longest: the longest prompt.
        sam: other values of the tower's first part.
    """
    return transformers.DeepseekOcr2Config(
        text_config={
            **TEXT_MODEL,
            "max_position_embeddings": longest,
            "n_routed_experts": 4,
            "n_shared_experts": 1,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 24,
            "mlp_layer_types": ["dense", *["sparse"] * 3],
        },
        vision_config={
            "sam_config": {
                "hidden_size": 32,
                "output_channels": 8,
                "num_hidden_layers": 2,
                "num_attention_heads": 4,
                "image_size": 32,
                "patch_size": PATCH,
                "initializer_range": 0.2,
                "window_size": 4,
                "global_attn_indexes": [1],
                "mlp_dim": 48,
                "downsample_channels": [16, 32],
                **sam,
            },
            "encoder_config": {**TEXT_MODEL, "num_hidden_layers": 2},
        },
        image_token_id=IMAGE,
        tie_word_embeddings=False,
    )


def few_queries(model: Any) -> None:
    """Nine for each view, in place of 144 or 256, which are numbers in transformers' code."""
    model.model.vision_tower.query_768_resolution = torch.nn.Embedding(9, 32)


def see_deepseek_ocr2(config: Any, pictures: Pictures) -> AttentionCall:
    """Wide pictures have two tiles."""
    flat = [one for row in pictures for one in row]
    tiles = [2 if one.width > one.height else 0 for one in flat]
    seen = {
        "pixel_values": _resized(flat, 32),
        "num_local_patches": torch.tensor(tiles),
    }
    if any(tiles):
        halves = [one.crop((x, 0, x + 16, 16)) for one, n in zip(flat, tiles, strict=True) for x in (0, 16)[:n]]
        seen["pixel_values_local"] = _resized(halves, 16)
    return seen, spans_of(pictures, [9 * (count + 1) + 1 for count in tiles], plain)


def _resized(pictures: list[Any], side: int) -> Tensor:
    made = [torch.tensor(np.asarray(picture.resize((side, side)))).permute(2, 0, 1) for picture in pictures]
    return torch.stack(made) / 127.5 - 1


MUSE: dict[str, Any] = {
    "vision_config": {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "patch_size": PATCH,
        "pos_emb_height": 3,
        "pos_emb_width": 3,
        "layer_types": ["window_attention", "full_attention", "window_attention"],
        "initializer_range": 0.2,
    },
    "image_token_id": IMAGE,
    "video_token_id": VIDEO,
    "out_hidden_size": 4 * 32,
    "projector_hidden_size": 32,
}


def muse_glimmer() -> Any:
    """Windows of 3 x 3 patches, tokens of 2 x 2; the last layer of the decoder does not rotate."""
    text = {**TEXT_MODEL, "head_dim": 8, "layer_types": ALTERNATING, "sliding_window": 12}
    return transformers.MuseGlimmerConfig(text_config=text, **MUSE)


def muse_spark() -> Any:
    """As Muse Glimmer, with four experts."""
    text = {**muse_glimmer().text_config.to_dict(), "num_local_experts": 4, "num_experts_per_tok": 2}
    del text["model_type"]
    return transformers.MuseSparkConfig(
        text_config={**text, "moe_hidden_size": 16, "moe_intermediate_size": 24},
        audio_config={
            "patch_sizes": [4],
            "hidden_sizes": [32],
            "depths": [1],
            "num_hidden_layers": 1,
            "out_hidden_size": 32,
        },
        audio_token_id=120,
        **MUSE,
    )


def exaone4_5() -> Any:
    """Blocks 0 and 2 of the tower attend in windows of 2 x 2 merged patches; full layers of the decoder do not rotate,
    and all norm the output of attention instead of its input."""
    return transformers.Exaone4_5_Config(
        text_config={
            "model_type": "exaone4",
            **TEXT_MODEL,
            "layer_types": ALTERNATING,
            "sliding_window": 12,
        },
        vision_config={**QWEN_TOWER, **HIDDEN, **WINDOWS, "num_key_value_heads": 2},
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        tie_word_embeddings=False,
    )


def perception_lm(**vision: Any) -> Any:
    """3 x 3 tokens of 6 x 6 patches.

    Args:
        vision: the configuration of a tower of timm; by default one of transformers, which is called in the same way.
    """
    return transformers.PerceptionLMConfig(
        text_config={"model_type": "llama", **TEXT_MODEL},
        vision_config=vision
        or {"model_type": "clip_vision_model", **TOWER, "image_size": 24, "model_args": {"embed_dim": 32}},
        projector_pooling_ratio=2,
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        tie_word_embeddings=False,
    )


def see_perception_lm(config: Any, pictures: Pictures) -> AttentionCall:
    """The whole picture and a tile of it."""
    flat = [one for row in pictures for one in row]
    tiles = [one.crop((0, 0, one.width // 2, one.height)) for one in flat]
    pixels = torch.stack((_resized(flat, 24), _resized(tiles, 24)), 1)
    return {"pixel_values": pixels}, spans_of(pictures, [2 * 9] * len(flat), plain)


def fast_vlm(**vision: Any) -> Any:
    """4 x 4 tokens. Arguments as of `perception_lm`."""
    tower = {"model_type": "convnext", "hidden_size": 32, "hidden_sizes": [16, 32], "depths": [1, 1], "num_stages": 2}
    return transformers.FastVlmConfig(
        text_config={"model_type": "qwen2", **TEXT_MODEL},
        vision_config=vision or {**tower, "patch_size": 2, "initializer_range": 0.2, "layer_scale_init_value": 1.0},
        image_token_index=IMAGE,
        tie_word_embeddings=False,
    )


def see_muse(config: Any, pictures: Pictures) -> AttentionCall:
    """Patches in row-major order, each twice for the two frames that a patch has."""
    patches, grids = [], []
    for one in (picture for row in pictures for picture in row):
        rows, columns = (side // 8 * 2 for side in (one.height, one.width))
        pixels = torch.tensor(np.asarray(one))[: rows * PATCH, : columns * PATCH] / 127.5 - 1
        cut = pixels.view(rows, PATCH, columns, PATCH, 3).permute(0, 2, 4, 1, 3).reshape(rows * columns, -1)
        patches.append(cut.repeat(1, 2))
        grids.append([1, rows, columns])
    seen = {"pixel_values": torch.cat(patches), "image_grid_thw": torch.tensor(grids)}
    return seen, spans_of(pictures, [rows * columns // 4 for _, rows, columns in grids], wrapped)


ROWS: list[dict[str, Any]] = [
    {"name": "chameleon", "config": chameleon, "see": fixed("SiglipImageProcessor", CROP, 16, wrapped)},
    {"name": "emu3", "config": emu3, "see": see_emu3},
    {
        "name": "gemma4_unified",
        "config": gemma4_unified,
        "see": see_gemma4,
        "watch": watch_gemma4,
        "finish": modalities,
    },
    {"name": "gemma4", "config": gemma4, "see": see_gemma4, "watch": watch_gemma4, "finish": modalities},
    {"name": "deepseek_ocr2", "config": deepseek_ocr2, "see": see_deepseek_ocr2, "change": few_queries},
    {"name": "muse_glimmer", "config": muse_glimmer, "see": see_muse, "watch": watch_qwen},
    {"name": "muse_spark", "config": muse_spark, "see": see_muse, "watch": watch_qwen},
    {"name": "perception_lm", "config": perception_lm, "see": see_perception_lm},
    {"name": "fast_vlm", "config": fast_vlm, "see": fixed("SiglipImageProcessor", CROP, 16), "eager_tower": True},
    {"name": "exaone4_5", "config": exaone4_5, "see": see_qwen, "watch": watch_qwen},
]
"""Arguments of `vlm_families.Family`."""
