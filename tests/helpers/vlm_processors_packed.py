"""Rows of types whose pictures keep their shape: patches of all of them in one sequence."""

from __future__ import annotations

from vlm_configs import END, FAKE, IMAGE, PATCH
from vlm_tiny_processor import PACKED, QWEN, TinyProcessor

FRAMED = "<|vision_start|><|image_pad|><|vision_end|>"


def _qwen(hub: str, kind: str, videos: str, **more: bool) -> TinyProcessor:
    return TinyProcessor(hub, QWEN, kind, ("Qwen2VL", PACKED), f"{videos}VideoProcessor", marks=FRAMED, **more)


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
}
"""By `model_type`."""
