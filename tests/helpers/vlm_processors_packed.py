"""Rows of types whose pictures keep their shape: patches of all of them in one sequence."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from vlm_configs import CROP, END, FAKE, IMAGE, PATCH, START, VIDEO
from vlm_gemma4 import gemma4, gemma4_unified
from vlm_tiny_processor import AUDIO, PACKED, QWEN, TinyProcessor

FRAMED = "<|vision_start|><|image_pad|><|vision_end|>"


def _qwen(hub: str, kind: str, videos: str, **more: bool) -> TinyProcessor:
    return TinyProcessor(hub, QWEN, kind, ("Qwen2VL", PACKED), f"{videos}VideoProcessor", marks=FRAMED, **more)


GEMMA: dict[str, str] = {
    "image_token": "<|image|>",
    "boi_token": "<|image>",
    "eoi_token": "<image|>",
    "audio_token": "<|audio|>",
    "boa_token": "<|audio>",
    "eoa_token": "<audio|>",
}


def _gemma(hub: str, kind: str, config: Callable[[], Any], torchvision: bool = False) -> TinyProcessor:
    """With tables of places for pictures of 70 tokens, the fewest that its processor may make, in one line."""
    numbers = (IMAGE, START, END, AUDIO, AUDIO + 1, AUDIO + 2)
    return TinyProcessor(
        hub,
        {**dict(zip(GEMMA.values(), numbers, strict=True)), "<|video|>": VIDEO},
        kind,
        (kind, {"patch_size": PATCH, "pooling_kernel_size": 2, "max_soft_tokens": 70}),
        f"{kind}VideoProcessor",
        named=GEMMA,
        begins=True,
        begun=True,
        config=config,
        feature_extractor=f"{kind}AudioFeatureExtractor",
        torchvision=torchvision,
    )


MUSE = {
    "<|patch|>": IMAGE,
    "<|video|>": VIDEO,
    "<|image_start|>": START,
    "<|image_end|>": END,
    "<|vid_start|>": FAKE,
    "<|vid_end|>": 105,
    "<|vid_frame_separator|>": 106,
}


def _muse(hub: str, kind: str, **more: Any) -> TinyProcessor:
    options = {"patch_size": PATCH, "merge_size": 2, "temporal_patch_size": 2, "max_image_tokens": 48}
    images, videos = ("MuseGlimmer", options), "MuseGlimmerVideoProcessor"
    return TinyProcessor(hub, {**MUSE, "<|audio|>": AUDIO}, kind, images, videos, torchvision=True, **more)


ROWS: dict[str, TinyProcessor] = {
    "qwen3_5": _qwen("Qwen/Qwen3.5-27B", "Qwen3VL", "Qwen3VL", byte_level=True),
    "qwen3_5_moe": _qwen("Qwen/Qwen3.5-35B-A3B", "Qwen3VL", "Qwen3VL", byte_level=True),
    "lfm3_vl": _qwen("LiquidAI/LFM3-VL-2B", "Lfm3Vl", "Qwen3VL"),
    "exaone4_5": _qwen("LGAI-EXAONE/EXAONE-4.5-33B", "Exaone4_5_", "Qwen2VL"),
    "cosmos3_edge": TinyProcessor(
        "nvidia/Cosmos3-Edge",
        QWEN,
        "Cosmos3Edge",
        ("Cosmos3Edge", {key: value for key, value in PACKED.items() if key != "temporal_patch_size"}),
        "Cosmos3EdgeVideoProcessor",
        marks=FRAMED,
    ),
    "mistral3": TinyProcessor(
        "mistralai/Mistral-Small-3.1-24B-Instruct-2503",
        {"[IMG]": IMAGE, "[IMG_BREAK]": FAKE, "[IMG_END]": END},
        "Pixtral",
        ("Pixtral", {"size": {"longest_edge": 40}, "patch_size": PATCH}),
        options={"patch_size": PATCH, "spatial_merge_size": 2},
        begins=True,
        begun=True,
        torchvision=True,
    ),
    "gemma4": _gemma("google/gemma-4-31B-it", "Gemma4", partial(gemma4, table=140)),
    "gemma4_unified": _gemma(
        "google/gemma-4-12B-it", "Gemma4Unified", lambda: gemma4_unified(table=70), torchvision=True
    ),
    "muse_glimmer": _muse("meta-models/Muse-Glimmer-30B", "MuseGlimmer"),
    "muse_spark": _muse(
        "meta-models/Muse-Spark-Open-816B-A42B", "MuseSpark", feature_extractor="MuseSparkFeatureExtractor"
    ),
    "kimi_k25": TinyProcessor(
        "moonshotai/Kimi-K2.6",
        {
            "<|media_pad|>": IMAGE,
            "<|kimi_k25_video_placeholder|>": VIDEO,
            "<|media_begin|>": START,
            "<|media_content|>": FAKE,
            "<|media_end|>": END,
        },
        "Kimi_K25",
        ("Kimi_K25", {"patch_size": PATCH, "merge_size": 2, "size": {"max_height": CROP, "max_width": CROP}}),
        "Kimi_K25VideoProcessor",
        marks="<|media_begin|>image<|media_content|><|media_pad|><|media_end|>",
        torchvision=True,
    ),
}
"""By `model_type`."""
