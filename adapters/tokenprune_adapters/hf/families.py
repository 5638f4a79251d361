"""The supported vision-language models of transformers, by their `model_type`."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from tokenprune_adapters.hf.packed_rows import Grouped, PackedRows, Unfolded
from tokenprune_adapters.hf.token_layouts import (
    Arrangement,
    Frames,
    Indexed,
    Merged,
    NormedPool,
    Queried,
    Squares,
    Tiled,
    Windowed,
)
from tokenprune_adapters.hf.unread_towers import CropsFirst, Resampled, ResampledRows, Unread


@dataclass(frozen=True)
class Family:
    """The properties of a family. Where its tower and projector are is found by `BoundTransformersModel`.

    Attributes:
        title: its name in messages.
        images: arrangement of its images.
        videos: arrangement of its videos; None = not supported.
        projects_patches: whether the projector takes single rows of the tower's states, one for each token.
        cuts: whether the tower's first position, [CLS], is always removed; otherwise the configuration tells
            (`vision_feature_select_strategy`).
        limits: what does not work or is not tested.
    """

    title: str
    images: type[Arrangement] = Arrangement
    videos: type[Arrangement] | None = None
    projects_patches: bool = False
    cuts: bool = False
    limits: tuple[str, ...] = ()


NO_VIDEOS = "images only, videos are refused"
NO_TOWER = "strategies that read the vision tower are refused"
AUDIO = "audio tokens count as text"
PRE_NORM = "checkpoints with norms after attention (Molmo2-O), or scaled rotary embeddings in some layers, are refused"
NOT_LOADED = "tested with tp.prune on the model's own inputs, not with tp.load and its processor"


def _glm(title: str) -> Family:
    return Family(title, Merged, limits=(NO_VIDEOS, NOT_LOADED))


def _unread(title: str, images: type[Arrangement] = Unread) -> Family:
    return Family(title, images, limits=(NO_TOWER, NOT_LOADED))


FAMILIES: dict[str, Family] = {
    "llava": Family("LLaVA-1.5", projects_patches=True),
    "llava_next": Family("LLaVA-NeXT", Tiled, projects_patches=True),
    "llava_onevision": Family("LLaVA-OneVision", Tiled, Frames),
    "qwen2_vl": Family("Qwen2-VL", Merged, Merged),
    "qwen2_5_vl": Family("Qwen2.5-VL", Windowed, Windowed),
    "qwen3_vl": Family("Qwen3-VL", Merged, Merged),
    "qwen3_vl_moe": Family("Qwen3-VL-MoE", Merged, Merged),
    "internvl": Family("InternVL"),
    "smolvlm": Family("SmolVLM"),
    "idefics3": Family("Idefics3"),
    "paligemma": Family("PaliGemma"),
    "gemma3": Family("Gemma 3", NormedPool),
    "vipllava": Family("VipLLaVA", projects_patches=True, cuts=True),
    "deepseek_vl": Family("DeepSeek-VL"),
    "aya_vision": Family("Aya Vision", Squares),
    "llava_next_video": Family("LLaVA-NeXT-Video", Tiled, Arrangement, projects_patches=True, limits=(NOT_LOADED,)),
    "qwen2_5_omni_thinker": Family("Qwen2.5-Omni", Windowed, Windowed, limits=(AUDIO, NOT_LOADED)),
    "qwen3_omni_moe_thinker": Family("Qwen3-Omni", Merged, Merged, limits=(AUDIO, NOT_LOADED)),
    "cosmos3_omni": Family("Cosmos 3 Omni", Merged, Merged, limits=(NOT_LOADED,)),
    "glm4v": _glm("GLM-4.1V"),
    "glm46v": _glm("GLM-4.6V"),
    "glm4v_moe": _glm("GLM-4.5V"),
    "glm_ocr": _glm("GLM-OCR"),
    "glmga": _glm("GLM-GA"),
    "qianfan_ocr": Family("Qianfan-OCR", limits=(NOT_LOADED,)),
    "idefics2": _unread("Idefics2", ResampledRows),
    "deepseek_vl_hybrid": _unread("DeepSeek-VL hybrid"),
    "janus": Family("Janus", limits=(NOT_LOADED,)),
    "cohere2_vision": Family("Command A Vision", Squares, limits=(NOT_LOADED,)),
    "got_ocr2": _unread("GOT-OCR 2"),
    "pp_chart2table": _unread("PP-Chart2Table"),
    "aria": _unread("Aria", Resampled),
    "ovis2": _unread("Ovis2"),
    "lighton_ocr": Family("LightOnOCR", Unfolded, limits=(NOT_LOADED,)),
    "shieldgemma2": Family("ShieldGemma 2", NormedPool, limits=(NOT_LOADED,)),
    "mistral3": Family("Mistral 3", Unfolded, limits=(NOT_LOADED,)),
    "cohere_compass": Family("Cohere Compass", Merged, Merged),
    "granite4_vision": Family("Granite 4 Vision", Queried),
    "kimi_k25": Family("Kimi K2.5", Grouped, limits=(NO_VIDEOS, NOT_LOADED)),
    "molmo2": Family("Molmo 2", Indexed, limits=(NO_VIDEOS, PRE_NORM, NOT_LOADED)),
    "step3p7": _unread("Step 3.7", CropsFirst),
    "cosmos3_edge": Family("Cosmos 3 Edge", Merged, Merged, limits=(NOT_LOADED,)),
}


def family_of(config: Any) -> Family:
    """The family of a model with this configuration, with the arrangement of its tower."""
    family = FAMILIES[config.model_type]
    tower = getattr(getattr(config, "vision_config", None), "model_type", None)
    packs = tower == "pixtral" and family.images is Arrangement
    return replace(family, images=PackedRows) if packs else family
