"""Tiny complete checkpoints of transformers' vision-language models: weights, processor, chat template."""

from __future__ import annotations

import json
import string
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import transformers
from tokenizers import AddedToken, Tokenizer, decoders, models, processors
from transformers import PreTrainedTokenizerFast
from transformers.utils.import_utils import is_torchvision_available
from vlm_configs import BOS, CELL, CROP, END, FAKE, GLOBAL, IMAGE, PAD, PATCH, PINPOINTS, SMALL_CROP, START, VIDEO
from vlm_families import FAMILIES
from vlm_further_configs import GRANITE_PINPOINTS
from vlm_processors import PROCESSORS as MORE

NEEDS_TORCHVISION = pytest.mark.skipif(not is_torchvision_available(), reason="its processor needs torchvision")
EOS = 2
CHARACTERS = string.printable[:95] + "\n\t"  # ids 3 to 99
BYTES = str.maketrans(" \n\t", "ĠĊĉ")  # as byte-level tokenizers write them
QWEN = {"<|image_pad|>": IMAGE, "<|video_pad|>": VIDEO, "<|vision_start|>": START, "<|vision_end|>": END}
CELLS = {f"<row_{row + 1}_col_{column + 1}>": CELL + 4 * row + column for row in range(4) for column in range(4)}
IDEFICS = {
    "<image>": IMAGE,
    "<fake_token_around_image>": FAKE,
    "<global-img>": GLOBAL,
    "<end_of_utterance>": 106,
    **CELLS,
}
TOKENS: dict[str, dict[str, int]] = {
    "llava": {"<image>": IMAGE},
    "llava_next": {"<image>": IMAGE},
    "llava_onevision": {"<image>": IMAGE, "<video>": VIDEO},
    "qwen2_vl": QWEN,
    "qwen2_5_vl": QWEN,
    "qwen3_vl": QWEN,
    "qwen3_vl_moe": QWEN,
    "internvl": {"<IMG_CONTEXT>": IMAGE, "<video>": VIDEO, "<img>": START, "</img>": END},
    "smolvlm": IDEFICS,
    "idefics3": IDEFICS,
    "vipllava": {"<image>": IMAGE},
    "deepseek_vl": {"<image_placeholder>": IMAGE},
    "aya_vision": {"<|IMG_PATCH|>": IMAGE, "<image>": 107, "<|START_OF_IMG|>": START, "<|END_OF_IMG|>": END},
    "paligemma": {"<image>": IMAGE},
    "gemma3": {"<image_soft_token>": IMAGE, "<start_of_image>": START, "<end_of_image>": END},
    **{name: more.tokens for name, more in MORE.items()},
    "video_llava": {"<image>": IMAGE, "<video>": VIDEO},
    "paddleocr_vl": {"<|IMAGE_PLACEHOLDER|>": IMAGE, "<|IMAGE_START|>": START, "<|IMAGE_END|>": END},
    "video_llama_3": {"<|image_pad|>": IMAGE, "<|video_pad|>": VIDEO},
    "hyperclovax_vision_v2": {"<|image_pad|>": IMAGE, "<|video_pad|>": VIDEO},
    "granite_docling": IDEFICS,
    "hunyuan_vl": {"<image>": IMAGE, "<image_start>": START, "<image_end>": END},
    "ernie4_5_vl_moe": {
        "<|IMAGE_PLACEHOLDER|>": IMAGE,
        "<|VIDEO|>": VIDEO,
        "<|IMAGE_START|>": START,
        "<|IMAGE_END|>": END,
    },
    "granite4_vision": {"<image>": IMAGE},
    "cohere_compass": {token.upper(): number for token, number in QWEN.items()},
}
"""Special tokens of each family, by `model_type`, with the ids of the tiny configurations."""
NAMED = {
    "internvl": {
        "start_image_token": "<img>",
        "end_image_token": "</img>",
        "context_image_token": "<IMG_CONTEXT>",
        "video_token": "<video>",
    },
    "deepseek_vl": {"image_token": "<image_placeholder>"},
    "paddleocr_vl": {"image_token": "<|IMAGE_PLACEHOLDER|>"},
    "hunyuan_vl": {"image_token": "<image>", "image_start_token": "<image_start>", "image_end_token": "<image_end>"},
    "ernie4_5_vl_moe": {
        "image_token": "<|IMAGE_PLACEHOLDER|>",
        "image_start_token": "<|IMAGE_START|>",
        "image_end_token": "<|IMAGE_END|>",
        "video_token": "<|VIDEO|>",
        "video_start_token": "<|IMAGE_START|>",
        "video_end_token": "<|IMAGE_END|>",
    },
    "gemma3": {"image_token": "<image_soft_token>", "boi_token": "<start_of_image>", "eoi_token": "<end_of_image>"},
    **{name: more.named for name, more in MORE.items()},
}
PLACEHOLDERS = {"aya_vision": "<image>", "gemma3": "<start_of_image>", "internvl": "<IMG_CONTEXT>"}
FRAMES = {
    **dict.fromkeys(("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe"), ("<|vision_start|>", "<|vision_end|>")),
    **dict.fromkeys(("paddleocr_vl", "ernie4_5_vl_moe"), ("<|IMAGE_START|>", "<|IMAGE_END|>")),
    "hunyuan_vl": ("<image_start>", "<image_end>"),
}
"""What stands around a placeholder."""
HUB = {
    "llava": "llava-hf/llava-1.5-7b-hf",
    "llava_next": "llava-hf/llava-v1.6-mistral-7b-hf",
    "llava_onevision": "llava-hf/llava-onevision-qwen2-7b-ov-hf",
    "qwen2_vl": "Qwen/Qwen2-VL-7B-Instruct",
    "qwen2_5_vl": "Qwen/Qwen2.5-VL-7B-Instruct",
    "qwen3_vl": "Qwen/Qwen3-VL-8B-Instruct",
    "qwen3_vl_moe": "Qwen/Qwen3-VL-30B-A3B-Instruct",
    "internvl": "OpenGVLab/InternVL3-8B-hf",
    "smolvlm": "HuggingFaceTB/SmolVLM2-2.2B-Instruct",
    "idefics3": "HuggingFaceM4/Idefics3-8B-Llama3",
    "vipllava": "llava-hf/vip-llava-7b-hf",
    "deepseek_vl": "deepseek-community/deepseek-vl-1.3b-chat",
    "aya_vision": "CohereLabs/aya-vision-8b",
    "paligemma": "google/paligemma-3b-mix-224",
    "gemma3": "google/gemma-3-4b-it",
    **{name: more.hub for name, more in MORE.items() if more.hub},
    "video_llava": "LanguageBind/Video-LLaVA-7B-hf",
    "paddleocr_vl": "PaddlePaddle/PaddleOCR-VL",
    "video_llama_3": "lkhl/VideoLLaMA3-2B-Image-HF",
    "hyperclovax_vision_v2": "naver-hyperclovax/HyperCLOVAX-SEED-Think-32B",
    "ernie4_5_vl_moe": "baidu/ERNIE-4.5-VL-28B-A3B-PT",
    "cohere_compass": "CohereLabs/North-Micro-Vision-Instruct",
    "granite4_vision": "ibm-granite/granite-4.0-3b-vision",
    "granite_docling": "ibm-granite/granite-for-docling-500m",
    "hunyuan_vl": "tencent/HunyuanOCR",
}
"""A released checkpoint of each family, which examples name; none of GLM-GA is known."""
VIDEO_PROCESSORS = {
    "llava_onevision": "LlavaOnevisionVideoProcessor",
    "qwen2_vl": "Qwen2VLVideoProcessor",
    "qwen2_5_vl": "Qwen2VLVideoProcessor",
    "qwen3_vl": "Qwen3VLVideoProcessor",
    "qwen3_vl_moe": "Qwen3VLVideoProcessor",
    "internvl": "InternVLVideoProcessor",
    "smolvlm": "SmolVLMVideoProcessor",
    **{name: more.videos for name, more in MORE.items() if more.videos},
    "video_llava": "VideoLlavaVideoProcessor",
    "video_llama_3": "VideoLlama3VideoProcessor",
    "hyperclovax_vision_v2": "Qwen2VLVideoProcessor",
    "ernie4_5_vl_moe": "Ernie4_5_VLMoeVideoProcessor",
    "cohere_compass": "CohereCompassVideoProcessor",
}
"""Families whose processor has a part for videos, which needs torchvision."""
LOADED = [
    pytest.param(name, marks=NEEDS_TORCHVISION if name in MORE and MORE[name].torchvision else ()) for name in TOKENS
]
"""Parameters of tests: families whose checkpoints are loaded."""


def write_vlm(folder: Path, name: str) -> Path:
    """A checkpoint folder as `save_pretrained` of a model and its processor leaves it.

    Args:
        folder: made if it is not there.
        name: key of `TOKENS`.
    """
    more = MORE.get(name)
    family = replace(FAMILIES[name], config=more.config, change=id) if more and more.config else FAMILIES[name]
    family.build().save_pretrained(folder)
    tokenizer(name).save_pretrained(folder)
    if more:
        _write(folder / "preprocessor_config.json", more.preprocessor())
    else:
        image_processor(name).save_pretrained(folder)
    config = {"processor_class": PROCESSORS.get(name, f"{FAMILIES[name].config().__class__.__name__[:-6]}Processor")}
    _write(folder / "processor_config.json", {**config, **OPTIONS.get(name, {})})
    if name in VIDEO_PROCESSORS:
        videos = {"video_processor_type": VIDEO_PROCESSORS[name], **(more.images[1] if more else {})}
        _write(folder / "video_preprocessor_config.json", videos)
    if name != "paligemma" and (more is None or more.templated):
        (folder / "chat_template.jinja").write_text(chat_template(name), encoding="utf-8")
    return folder


PROCESSORS = {
    "qwen3_vl_moe": "Qwen3VLProcessor",
    "vipllava": "LlavaProcessor",
    **{name: f"{more.kind}Processor" for name, more in MORE.items()},
}
OPTIONS: dict[str, dict[str, Any]] = {
    "llava": {"patch_size": PATCH, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1},
    "vipllava": {"patch_size": PATCH, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1},
    "video_llava": {"patch_size": PATCH, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1},
    "deepseek_vl": {"num_image_tokens": 16},
    "aya_vision": {"patch_size": PATCH, "img_size": 24, "downsample_factor": 2, "image_token": "<image>"},
    "llava_next": {"patch_size": PATCH, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1},
    "llava_onevision": {
        "num_image_tokens": (SMALL_CROP // PATCH) ** 2,
        "vision_feature_select_strategy": "full",
        "vision_aspect_ratio": "anyres_max_2",
    },
    "granite4_vision": {"patch_size": PATCH, "vision_feature_select_strategy": "full", "downsample_rate": "1/2"},
    "internvl": {"image_seq_length": 4},
    "smolvlm": {"image_seq_len": 4},
    "idefics3": {"image_seq_len": 4},
    "granite_docling": {"image_seq_len": 4},
    "gemma3": {"image_seq_length": 9},
    **{name: more.options for name, more in MORE.items()},
}


def tokenizer(name: str) -> PreTrainedTokenizerFast:
    """One token per character, and the special tokens of the family."""
    special = {"<pad>": PAD, "<s>": BOS, "</s>": EOS, **TOKENS[name]}
    written = BYTES if (MORE[name].byte_level if name in MORE else name == "hyperclovax_vision_v2") else {}
    vocabulary = {character.translate(written): 3 + place for place, character in enumerate(CHARACTERS)}
    core = Tokenizer(models.BPE({**vocabulary, **special}, [], unk_token="</s>"))
    core.decoder = decoders.Fuse()
    if begins(name) and not (name in MORE and MORE[name].prepends):
        core.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BOS)])
    core.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        padding_side="left",
        extra_special_tokens=NAMED.get(name, {}),
        **(MORE[name].tokenizer if name in MORE else {}),
    )


def begins(name: str) -> bool:
    """Whether the family's tokenizer begins with a token of its own."""
    return MORE[name].begins if name in MORE else not name.startswith(("qwen", "internvl", "smolvlm"))


def image_processor(name: str) -> Any:
    """The image processor that needs no torchvision, at the sizes of the tiny configurations."""
    square, small = ({"height": side, "width": side} for side in (CROP, SMALL_CROP))
    qwen = {
        "patch_size": PATCH,
        "merge_size": 2,
        "temporal_patch_size": 2,
        "size": {"shortest_edge": 64, "longest_edge": 4096},
    }
    longest: dict[str, Any] = {"size": {"longest_edge": 2 * CROP}, "max_image_size": {"longest_edge": CROP}}
    kinds: dict[str, tuple[str, dict[str, Any]]] = {
        "llava": ("CLIP", {"size": {"shortest_edge": CROP}, "crop_size": square}),
        "vipllava": ("CLIP", {"size": {"shortest_edge": CROP}, "crop_size": square}),
        "video_llava": ("VideoLlava", {"size": {"shortest_edge": CROP}, "crop_size": square}),
        "paddleocr_vl": ("PaddleOCRVL", {**qwen, "temporal_patch_size": 1}),
        "ernie4_5_vl_moe": ("Ernie4_5_VLMoe", {**qwen, "temporal_patch_size": 1}),
        "video_llama_3": ("VideoLlama3", {**qwen, "temporal_patch_size": 1, "merge_size": 1}),
        "deepseek_vl": ("DeepseekVL", {"size": square}),
        "aya_vision": (
            "GotOcr2",
            {"size": {"height": 24, "width": 24}, "crop_to_patches": True, "min_patches": 1, "max_patches": 4},
        ),
        "llava_next": (
            "LlavaNext",
            {"size": {"shortest_edge": SMALL_CROP}, "crop_size": small, "image_grid_pinpoints": PINPOINTS},
        ),
        "llava_onevision": ("LlavaOnevision", {"size": small, "image_grid_pinpoints": PINPOINTS}),
        "internvl": ("GotOcr2", {"size": square, "crop_to_patches": True, "min_patches": 1, "max_patches": 4}),
        "smolvlm": ("SmolVLM", longest),
        "idefics3": ("Idefics3", longest),
        "hunyuan_vl": ("HunYuanVL", {**qwen, "temporal_patch_size": 1}),
        "granite_docling": ("GraniteDocling", {"size": square, "max_patches": 4}),
        "paligemma": ("Siglip", {"size": square, "image_seq_length": (CROP // PATCH) ** 2}),
        "gemma3": ("Gemma3", {"size": {"height": 24, "width": 24}, "image_seq_length": 9}),
        "cohere_compass": ("CohereCompass", qwen),
        "granite4_vision": (
            "LlavaNext",
            {"size": {"shortest_edge": CROP}, "crop_size": square, "image_grid_pinpoints": GRANITE_PINPOINTS},
        ),
    }
    kind, options = kinds.get(name, ("Qwen2VL", qwen))
    plain = f"{kind}ImageProcessor"  # as older releases call it
    return getattr(transformers, f"{plain}Pil", getattr(transformers, plain, None))(**options)


def chat_template(name: str) -> str:
    """USER and ASSISTANT in turn; an image is the family's placeholder. Some write the first token too."""
    image = marks(name)
    begun = MORE[name].begun if name in MORE else name in ("gemma3", "idefics3", "hunyuan_vl")
    begin = "{{ bos_token }}" if begun else ""
    return begin + (
        "{% for turn in messages %}{{ turn['role'].upper() }}: {% for part in turn['content'] %}"
        "{% if part['type'] == 'image' %}" + image + "{% else %}{{ part['text'] }}{% endif %}{% endfor %}\n"
        "{% endfor %}{% if add_generation_prompt %}ASSISTANT:{% endif %}"
    )


def placeholder(name: str) -> str:
    """What stands for an image in a prompt."""
    return PLACEHOLDERS.get(name, next(iter(TOKENS[name])))


def marks(name: str) -> str:
    """What the chat template writes for an image: its placeholder, between others for some families."""
    if name in MORE:
        return MORE[name].marks or placeholder(name)
    if name.startswith(("qwen", "cohere_compass")):
        image, *_, start, end = TOKENS[name]
        return f"{start}{image}{end}"
    start, end = FRAMES.get(name, ("", ""))
    return f"{start}{placeholder(name)}{end}"


def _write(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content), encoding="utf-8")
