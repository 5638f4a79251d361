"""Processors of the tiny checkpoints: a row of data for each type."""

from __future__ import annotations

import vlm_processors_packed
import vlm_processors_tiled
from vlm_configs import CROP, END, FAKE, IMAGE, PATCH, START, VIDEO
from vlm_more_configs import aria, cohere2_vision, llava_next_video
from vlm_tiny_processor import AUDIO, GLM, PACKED, QWEN, TILES, TinyProcessor, square


def _glm(hub: str | None, kind: str, images: str | None = None) -> TinyProcessor:
    part = images or kind
    marks = "<|begin_of_image|><|image|><|end_of_image|>"
    return TinyProcessor(hub, GLM, kind, (part, PACKED), f"{part}VideoProcessor", marks=marks)


def _omni(hub: str, kind: str, tokens: dict[str, str]) -> TinyProcessor:
    numbers = {"image": IMAGE, "video": VIDEO, "vision_bos": START, "vision_eos": END, "audio": AUDIO}
    numbers |= {"audio_bos": AUDIO + 1, "audio_eos": AUDIO + 2}
    return TinyProcessor(
        hub,
        {tokens[name]: number for name, number in numbers.items()},
        kind,
        ("Qwen2VL", PACKED),
        "Qwen2VLVideoProcessor",
        named={f"{name}_token": token for name, token in tokens.items()},
        marks=tokens["vision_bos"] + tokens["image"] + tokens["vision_eos"],
        feature_extractor="WhisperFeatureExtractor",
    )


OMNI_2 = {
    "image": "<|IMAGE|>",
    "video": "<|VIDEO|>",
    "audio": "<|AUDIO|>",
    "vision_bos": "<|vision_bos|>",
    "vision_eos": "<|vision_eos|>",
    "audio_bos": "<|audio_bos|>",
    "audio_eos": "<|audio_eos|>",
}
OMNI_3 = {
    "image": "<|image_pad|>",
    "video": "<|video_pad|>",
    "audio": "<|audio_pad|>",
    "vision_bos": "<|vision_start|>",
    "vision_eos": "<|vision_end|>",
    "audio_bos": "<|audio_start|>",
    "audio_eos": "<|audio_end|>",
}
PROCESSORS: dict[str, TinyProcessor] = {
    "llava_next_video": TinyProcessor(
        "llava-hf/LLaVA-NeXT-Video-7B-hf",
        {"<image>": IMAGE, "<video>": VIDEO},
        "LlavaNextVideo",
        (
            "LlavaNext",
            {
                "size": {"shortest_edge": CROP},
                "crop_size": {"height": CROP, "width": CROP},
                "image_grid_pinpoints": [[16, 32], [32, 16], [32, 32], [16, 48]],
            },
        ),
        "LlavaNextVideoVideoProcessor",
        {"patch_size": PATCH, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1},
        begins=True,
        config=lambda: llava_next_video(side=CROP, stride=2),  # as its processor counts the tokens of a frame
    ),
    "qwen2_5_omni_thinker": _omni("Qwen/Qwen2.5-Omni-7B", "Qwen2_5Omni", OMNI_2),
    "qwen3_omni_moe_thinker": _omni("Qwen/Qwen3-Omni-30B-A3B-Instruct", "Qwen3OmniMoe", OMNI_3),
    "cosmos3_omni": TinyProcessor(
        "nvidia/Cosmos3-Nano",
        QWEN,
        "Qwen3VL",
        ("Qwen2VL", PACKED),
        "Qwen3VLVideoProcessor",
        marks="<|vision_start|><|image_pad|><|vision_end|>",
    ),
    "glm4v": _glm("zai-org/GLM-4.1V-9B-Thinking", "Glm4v"),
    "glm46v": _glm("zai-org/GLM-4.6V", "Glm46V"),
    "glm4v_moe": _glm("zai-org/GLM-4.5V", "Glm4v"),
    "glm_ocr": _glm("zai-org/GLM-OCR", "Glm46V"),
    "glmga": _glm(None, "Glm46V", "Glmga"),
    "qianfan_ocr": TinyProcessor(
        "baidu/Qianfan-OCR",
        {"<image>": 107, "<IMG_CONTEXT>": IMAGE, "<img>": START, "</img>": END},
        "QianfanOCR",
        ("GotOcr2", TILES),
        options={"image_seq_length": 4},
        named={
            "start_image_token": "<img>",
            "end_image_token": "</img>",
            "context_image_token": "<IMG_CONTEXT>",
        },
    ),
    "idefics2": TinyProcessor(
        "HuggingFaceM4/idefics2-8b",
        {"<image>": IMAGE, "<fake_token_around_image>": FAKE, "<end_of_utterance>": 106},
        "Idefics2",
        ("Idefics2", {"size": {"shortest_edge": 8, "longest_edge": CROP}, "do_image_splitting": True}),
        options={"image_seq_len": 9},
        begins=True,
    ),
    "deepseek_vl_hybrid": TinyProcessor(
        "deepseek-community/deepseek-vl-7b-chat",
        {"<image_placeholder>": IMAGE},
        "DeepseekVLHybrid",
        ("DeepseekVLHybrid", square(CROP, high_res_size={"height": 64, "width": 64})),
        options={"num_image_tokens": 16},
        named={"image_token": "<image_placeholder>"},
        begins=True,
    ),
    "janus": TinyProcessor(
        "deepseek-community/Janus-Pro-1B",
        {"<image_placeholder>": IMAGE, "<begin_of_image>": START, "<end_of_image>": END},
        "Janus",
        ("Janus", square(CROP)),
        options={"num_image_tokens": 16},
        named={
            "image_token": "<image_placeholder>",
            "boi_token": "<begin_of_image>",
            "eoi_token": "<end_of_image>",
        },
        begins=True,
    ),
    "cohere2_vision": TinyProcessor(
        "CohereLabs/command-a-vision-07-2025",
        {"<|IMG_PATCH|>": IMAGE, "<|START_OF_IMG|>": START, "<|END_OF_IMG|>": END, "<|IMG_LINE_BREAK|>": FAKE},
        "Cohere2Vision",
        ("Cohere2Vision", {**TILES, **square(32), "patch_size": 4}),
        named={
            "image_token": "<|IMG_PATCH|>",
            "boi_token": "<|START_OF_IMG|>",
            "eoi_token": "<|END_OF_IMG|>",
            "img_line_break_token": "<|IMG_LINE_BREAK|>",
        },
        begins=True,
        torchvision=True,
        config=lambda: cohere2_vision(side=32),  # its processor's patches are rows of tokens of a tile
    ),
    "got_ocr2": TinyProcessor(
        "stepfun-ai/GOT-OCR-2.0-hf",
        {"<imgpad>": IMAGE, "<img>": START, "</img>": END, "<|im_start|>": 104, "<|im_end|>": 105},
        "GotOcr2",
        ("GotOcr2", square(CROP)),
        tokenizer={"num_image_tokens": 16},
        templated=False,
    ),
    "pp_chart2table": TinyProcessor(
        "PaddlePaddle/PP-Chart2Table_safetensors",
        {"<imgpad>": IMAGE, "<img>": START, "</img>": END},
        "PPChart2Table",
        ("PPChart2Table", square(CROP)),
        marks=f"<img>{'<imgpad>' * 16}</img>",
    ),
    "aria": TinyProcessor(
        "rhymes-ai/Aria",
        {"<|img|>": IMAGE},
        "Aria",
        ("Aria", {"max_image_size": 980}),
        options={"size_conversion": {"980": 9}},
        named={"image_token": "<|img|>"},
        config=lambda: aria(side=980, patch=98),  # a size that its processor allows
    ),
    "ovis2": TinyProcessor(
        "thisisiron/Ovis2-2B-hf",
        {
            "<image>": 107,
            "<IMG_ATOM>": IMAGE,
            "<IMG_START>": 120,
            "<IMG_GRID>": 121,
            "<IMG_COL>": 122,
            "<IMG_ROW>": 123,
            "<IMG_END>": 124,
        },
        "Ovis2",
        ("Ovis2", {**TILES, **square(24)}),
        options={"image_seq_length": 9},
    ),
    "lighton_ocr": TinyProcessor(
        "lightonai/LightOnOCR-1B-1025",
        {"<|image_pad|>": IMAGE, "<|vision_pad|>": FAKE, "<|vision_end|>": END},
        "LightOnOcr",
        ("Pixtral", {"size": {"longest_edge": 32}, "patch_size": PATCH}),
        options={"patch_size": PATCH, "spatial_merge_size": 2},
        named={
            "image_token": "<|image_pad|>",
            "image_break_token": "<|vision_pad|>",
            "image_end_token": "<|vision_end|>",
        },
    ),
    "shieldgemma2": TinyProcessor(
        "google/shieldgemma-2-4b-it",
        {"<start_of_image>": START, "<end_of_image>": END, "<image_soft_token>": IMAGE},
        "ShieldGemma2",
        ("Gemma3", square(24, image_seq_length=9)),
        options={"image_seq_length": 9},
        named={
            "image_token": "<image_soft_token>",
            "boi_token": "<start_of_image>",
            "eoi_token": "<end_of_image>",
        },
        begins=True,
    ),
    **vlm_processors_packed.ROWS,
    **vlm_processors_tiled.ROWS,
}
"""By `model_type`."""
