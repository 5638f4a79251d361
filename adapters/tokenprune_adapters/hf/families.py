"""The supported vision-language models of transformers, by their `model_type`."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from tokenprune_adapters.hf.arrangements.others import Paired, Words
from tokenprune_adapters.hf.arrangements.packed import (
    Bordered,
    Merged,
    MergedBehind,
    MergedRows,
    PairsOfFrames,
    RowMajor,
    Unshuffled,
    Windowed,
    WindowedInTower,
)
from tokenprune_adapters.hf.arrangements.rows import PackedRows, Unfolded
from tokenprune_adapters.hf.arrangements.square_crops import (
    Arrangement,
    ClsFrames,
    Frames,
    Indexed,
    NormedPool,
    Queried,
    Shuffled,
    Squares,
    Tiled,
)
from tokenprune_adapters.hf.arrangements.unread import (
    CropsFirst,
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
        one_token: whether the image token marks videos too.
        chat_template: of checkpoints that have none.
        loaded_by: class of transformers that loads the checkpoints and has the model as its `model`; None = the class
            for image-text-to-text models.
        limits: what does not work or is not tested.
    """

    title: str
    images: type[Arrangement] = Arrangement
    videos: type[Arrangement] | None = None
    projects_patches: bool = False
    cuts: bool = False
    one_token: bool = False
    chat_template: str | None = None
    loaded_by: str | None = None
    limits: tuple[str, ...] = ()


NO_VIDEOS = "images only, videos are refused"
NO_TOWER = "strategies that read the vision tower are refused"
AUDIO = "audio tokens count as text"
STATES = "strategies that read the attention of a decoder layer that keeps a state instead are refused"
FOUR_AXES = "positions of four axes; checkpoints with three are refused, as rows that contain several prompts"
ROWS_DIFFER = (
    "in a batch, transformers numbers the images of all rows together, so that a row's answer is not that alone; "
    "answer() refuses batches"
)
NO_PER_LAYER = "models with per-layer embeddings or shared keys (E2B, E4B) are refused"
PRE_NORM = "checkpoints with norms after attention (Molmo2-O), or scaled rotary embeddings in some layers, are refused"
TORCHVISION = "its processor requires torchvision"
TIMM = "released checkpoints have a tower of timm, which requires that package"
PAGES = (  # as its processor writes them for a prompt of its own
    "<|im_start|>system\nYou should follow the instructions carefully and explain your answers in detail.<|im_end|>"
    "{% for turn in messages %}<|im_start|>{{ turn['role'] }}\n<img>"
    "{% for part in turn['content'] if part['type'] == 'image' %}<imgpad>{% endfor %}</img>\n"
    "{% for part in turn['content'] if part['type'] == 'text' %}{{ part['text'] }}{% endfor %}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def _glm(title: str) -> Family:
    return Family(title, Merged, Merged, one_token=True)


def _unread(title: str, images: type[Arrangement] = Unread, *limits: str, **more: Any) -> Family:
    return Family(title, images, limits=(NO_TOWER, *limits), **more)


def _with_states(title: str, *limits: str) -> Family:
    return Family(title, Unread, limits=(STATES, NO_TOWER, *limits))


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
    "llava_next_video": Family("LLaVA-NeXT-Video", Tiled, Arrangement, projects_patches=True),
    "qwen2_5_omni_thinker": Family("Qwen2.5-Omni", Windowed, Windowed, limits=(AUDIO,)),
    "qwen3_omni_moe_thinker": Family("Qwen3-Omni", Merged, Merged, limits=(AUDIO,)),
    "cosmos3_omni": Family("Cosmos 3 Omni", Merged, Merged),
    "glm4v": _glm("GLM-4.1V"),
    "glm46v": _glm("GLM-4.6V"),
    "glm4v_moe": _glm("GLM-4.5V"),
    "glm_ocr": _glm("GLM-OCR"),
    "glmga": _glm("GLM-GA"),
    "qianfan_ocr": Family("Qianfan-OCR"),
    "idefics2": _unread("Idefics2", ResampledRows),
    "deepseek_vl_hybrid": Family("DeepSeek-VL hybrid", Paired),
    "janus": Family("Janus"),
    "cohere2_vision": Family("Command A Vision", Squares, limits=(TORCHVISION,)),
    "got_ocr2": _unread("GOT-OCR 2", chat_template=PAGES),
    "pp_chart2table": _unread("PP-Chart2Table"),
    "aria": _unread("Aria", Resampled),
    "ovis2": Family("Ovis2", Words),
    "lighton_ocr": Family("LightOnOCR", Unfolded),
    "shieldgemma2": Family("ShieldGemma 2", NormedPool, loaded_by="ShieldGemma2ForImageClassification"),
    "llama4": _unread("Llama 4", Unread, TORCHVISION),
    "qwen3_5": Family("Qwen3.5", Merged, Merged, limits=(STATES,)),
    "qwen3_5_moe": Family("Qwen3.5-MoE", Merged, Merged, limits=(STATES,)),
    "lfm2_vl": _with_states("LFM2-VL", TORCHVISION),
    "lfm3_vl": _with_states("LFM3-VL"),
    "minicpmv4_6": _with_states("MiniCPM-V 4.6", TORCHVISION),
    "minicpmv4_7": _with_states("MiniCPM-V 4.7", TORCHVISION),
    "minicpm_ocr": _with_states("MiniCPM-OCR", TORCHVISION),
    "video_llava": Family("Video-LLaVA", Arrangement, ClsFrames, projects_patches=True),
    "paddleocr_vl": Family("PaddleOCR-VL", RowMajor),
    "video_llama_3": Family("VideoLLaMA 3", Unshuffled, Unshuffled),
    "hyperclovax_vision_v2": Family("HyperCLOVA X Vision", WindowedInTower, WindowedInTower),
    "ernie4_5_vl_moe": Family("ERNIE 4.5 VL", PairsOfFrames, PairsOfFrames),
    "granite_docling": Family("Granite Docling", Shuffled),
    "hunyuan_vl": Family("HunYuan-VL", Bordered, limits=(FOUR_AXES, ROWS_DIFFER)),
    "mistral3": Family("Mistral 3", Unfolded, limits=(TORCHVISION,)),
    "cohere_compass": Family("Cohere Compass", Merged, Merged),
    "granite4_vision": Family("Granite 4 Vision", Queried),
    "chameleon": _unread("Chameleon"),
    "emu3": _unread("Emu3", EndedLines),
    "gemma4_unified": Family("Gemma 4 unified", Placed, Placed, limits=(NO_TOWER, AUDIO, TORCHVISION)),
    "deepseek_ocr2": _unread("DeepSeek-OCR 2", Views),
    "muse_glimmer": Family("Muse Glimmer", MergedBehind, MergedBehind, limits=(TORCHVISION,)),
    "muse_spark": Family("Muse Spark", MergedBehind, MergedBehind, limits=(AUDIO, TORCHVISION)),
    "perception_lm": _unread("Perception LM", Unread, NO_VIDEOS, TORCHVISION, TIMM),
    "fast_vlm": _unread("FastVLM", Unread, TIMM),
    "gemma4": Family("Gemma 4", PooledPlaces, PooledPlaces, limits=(NO_TOWER, AUDIO, NO_PER_LAYER)),
    "exaone4_5": Family("EXAONE 4.5", Windowed, Windowed),
    "kimi_k25": Family("Kimi K2.5", MergedRows, limits=(NO_VIDEOS, TORCHVISION)),
    "molmo2": Family("Molmo 2", Indexed, limits=(NO_VIDEOS, PRE_NORM, TORCHVISION)),
    "step3p7": _unread("Step 3.7", CropsFirst, TORCHVISION),
    "cosmos3_edge": Family("Cosmos 3 Edge", Merged, Merged),
}
WITH_TALKER = ("qwen2_5_omni", "qwen3_omni_moe")
"""Types whose checkpoints contain a thinker, which is a model of a family, and a talker, which is not loaded."""


def family_of(config: Any) -> Family:
    """The family of a model with this configuration, with the arrangement of its tower."""
    family = FAMILIES[config.model_type]
    tower = getattr(getattr(config, "vision_config", None), "model_type", None)
    packs = tower == "pixtral" and family.images is Arrangement
    return replace(family, images=PackedRows) if packs else family
