"""The supported vision-language models of transformers, by their `model_type`."""

from __future__ import annotations

from dataclasses import dataclass

from tokenprune_adapters.hf.token_layouts import (
    Arrangement,
    Frames,
    Merged,
    NormedPool,
    Shuffled,
    Squares,
    Tiled,
    Windowed,
)
from tokenprune_adapters.hf.unread_towers import (
    EndedLines,
    Placed,
    PooledPlaces,
    Resampled,
    ResampledRows,
    Unread,
    Views,
)


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
NO_PER_LAYER = "models with per-layer embeddings or shared keys (E2B, E4B) are refused"
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
    "lighton_ocr": _unread("LightOnOCR"),
    "shieldgemma2": Family("ShieldGemma 2", NormedPool, limits=(NOT_LOADED,)),
    "chameleon": _unread("Chameleon"),
    "emu3": _unread("Emu3", EndedLines),
    "gemma4_unified": Family("Gemma 4 unified", Placed, Placed, limits=(NO_TOWER, AUDIO, NOT_LOADED)),
    "deepseek_ocr2": _unread("DeepSeek-OCR 2", Views),
    "muse_glimmer": Family("Muse Glimmer", Shuffled, Shuffled, limits=(NOT_LOADED,)),
    "muse_spark": Family("Muse Spark", Shuffled, Shuffled, limits=(AUDIO, NOT_LOADED)),
    "perception_lm": Family("Perception LM", Unread, limits=(NO_TOWER, NO_VIDEOS, NOT_LOADED)),
    "fast_vlm": _unread("FastVLM"),
    "gemma4": Family("Gemma 4", PooledPlaces, PooledPlaces, limits=(NO_TOWER, AUDIO, NO_PER_LAYER, NOT_LOADED)),
    "exaone4_5": Family("EXAONE 4.5", Windowed, Windowed, limits=(NOT_LOADED,)),
}
