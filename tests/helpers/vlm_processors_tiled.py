"""Rows of types whose pictures become squares: the whole picture, tiles of it, or words of a visual vocabulary."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from vlm_configs import CELL, CROP, END, FAKE, IMAGE, PATCH, START, VIDEO
from vlm_other_layers import TILE, minicpmv4_7
from vlm_other_towers import deepseek_ocr2, emu3, fast_vlm
from vlm_tiny_processor import TinyProcessor, square

NEWLINE = 98
TILES = {f"<|img_row_{row + 1}_col_{column + 1}|>": CELL + 4 * row + column for row in range(4) for column in range(4)}

MINICPM = {
    "image_token": "<|image_pad|>",
    "video_token": "<|video_pad|>",
    "image_start_token": "<image>",
    "image_end_token": "</image>",
    "slice_start_token": "<slice>",
    "slice_end_token": "</slice>",
    "image_id_start_token": "<image_id>",
    "image_id_end_token": "</image_id>",
}


def _minicpm(hub: str, kind: str, parts: str, config: Callable[[], Any] | None = None) -> TinyProcessor:
    """Tokens of 4 x 4 patches."""
    numbers = (IMAGE, VIDEO, START, END, CELL, CELL + 1, 105, 106)
    return TinyProcessor(
        hub,
        dict(zip(MINICPM.values(), numbers, strict=True)),
        kind,
        (parts, {"patch_size": PATCH, "scale_resolution": 32, "max_slice_nums": 4}),
        f"{parts}VideoProcessor",
        named=MINICPM,
        config=config,
        torchvision=True,
    )


ROWS: dict[str, TinyProcessor] = {
    "llama4": TinyProcessor(
        "meta-llama/Llama-4-Scout-17B-16E-Instruct",
        {
            "<|image|>": FAKE,
            "<|patch|>": IMAGE,
            "<|image_start|>": START,
            "<|image_end|>": END,
            "<|tile_x_separator|>": CELL,
            "<|tile_y_separator|>": CELL + 1,
        },
        "Llama4",
        ("Llama4", square(TILE, max_patches=4)),
        options={"patch_size": PATCH, "pixel_shuffle_ratio": 0.5},
        begins=True,
        begun=True,
        torchvision=True,
    ),
    "lfm2_vl": TinyProcessor(
        "LiquidAI/LFM2-VL-1.6B",
        {"<image>": IMAGE, "<|image_start|>": START, "<|image_end|>": END, "<|img_thumbnail|>": FAKE, **TILES},
        "Lfm2Vl",
        (
            "Lfm2Vl",
            square(
                CROP,
                tile_size=CROP,
                encoder_patch_size=PATCH,
                max_tiles=4,
                min_image_tokens=1,
                max_image_tokens=4,
            ),
        ),
        begins=True,
        begun=True,
        torchvision=True,
    ),
    "minicpmv4_6": _minicpm("openbmb/MiniCPM-V-4.6", "MiniCPMV4_6", "MiniCPMV4_6"),
    "minicpmv4_7": _minicpm(
        "openbmb/MiniCPM-V-4.7-1B", "MiniCPMV4_7", "MiniCPMV4_6", partial(minicpmv4_7, newline=NEWLINE)
    ),
    "minicpm_ocr": _minicpm("openbmb/MiniCPM-OCR-1.0", "MiniCPMOcr", "MiniCPMOcr"),
    "chameleon": TinyProcessor(
        "facebook/chameleon-7b",
        {"<image>": IMAGE, "<racm3:break>": START, "<eoss>": END, "<reserved08706>": FAKE},
        "Chameleon",
        ("Chameleon", {"size": {"shortest_edge": CROP}, "crop_size": {"height": CROP, "width": CROP}}),
        options={"image_seq_length": 16},
        begins=True,
        tokenizer={"sep_token": "<reserved08706>"},
        templated=False,
    ),
    "emu3": TinyProcessor(
        "Emu3-community/Emu3-Chat-hf",
        {
            "<image>": IMAGE,
            "<|image start|>": START,
            "<|image end|>": END,
            "<|image token|>": FAKE,
            "<|extra_201|>": 105,
        },
        "Emu3",
        ("Emu3", {"min_pixels": 512, "max_pixels": 2048}),
        named={
            "image_token": "<image>",
            "boi_token": "<|image start|>",
            "eoi_token": "<|image end|>",
            "image_wrapper_token": "<|image token|>",
            "eof_token": "<|extra_201|>",
        },
        begins=True,
        prepends=True,
        config=partial(emu3, levels=4),  # its processor counts a word for each 8 x 8 pixels
    ),
    "deepseek_ocr2": TinyProcessor(
        "deepseek-community/DeepSeek-OCR-2",
        {"<image>": IMAGE},
        "DeepseekOcr2",
        ("DeepseekOcr2", square(128, tile_size=96)),
        options={"patch_size": 2, "downsample_ratio": 4},
        begins=True,
        # the numbers of its queries, 144 and 256, are numbers in transformers' code
        config=partial(deepseek_ocr2, longest=2048, image_size=128, patch_size=2, global_attn_indexes=[]),
    ),
    "perception_lm": TinyProcessor(
        "facebook/Perception-LM-1B",
        {"<|image|>": IMAGE, "<|video|>": VIDEO},
        "PerceptionLM",
        ("PerceptionLM", square(24, tile_size=24, max_num_tiles=4)),
        "PerceptionLMVideoProcessor",
        options={"patch_size": PATCH, "pooling_ratio": 2},
        named={"image_token": "<|image|>", "video_token": "<|video|>"},
        begins=True,
        begun=True,
        torchvision=True,
    ),
    "fast_vlm": TinyProcessor(
        "KamilaMila/FastVLM-7B",
        {"<image>": IMAGE},
        "Llava",
        ("CLIP", {"size": {"shortest_edge": CROP}, "crop_size": {"height": CROP, "width": CROP}}),
        options={"patch_size": PATCH},
        config=partial(
            fast_vlm,
            model_type="convnext",
            hidden_size=32,
            hidden_sizes=[32],
            depths=[1],
            num_stages=1,
            image_size=CROP,
            patch_size=PATCH,
        ),
    ),
    "molmo2": TinyProcessor(
        "allenai/Molmo2-8B",
        {
            "<|image|>": 107,
            "<|video|>": VIDEO,
            "<im_patch>": IMAGE,
            "<im_start>": START,
            "<im_end>": END,
            "<im_col>": FAKE,
            "<low_res_im_start>": 105,
            "<frame_start>": 106,
            "<frame_end>": 108,
            "<im_low>": 109,
        },
        "Molmo2",
        ("Molmo2", square(CROP, patch_size=PATCH, overlap_margins=[1, 1], max_crops=4)),
        "Molmo2VideoProcessor",
        begins=True,
        prepends=True,
        torchvision=True,
    ),
    "step3p7": TinyProcessor(
        "stepfun-ai/Step-3.7-Flash",
        {
            "<im_patch>": IMAGE,
            "<patch_start>": START,
            "<patch_end>": END,
            "<patch_newline>": FAKE,
            "<im_start>": 105,
            "<im_end>": 106,
        },
        "Step3p7",
        ("Step3p7", square(48, patch_size=32, vision_patch_size=PATCH, max_image_size=128)),
        begins=True,
        torchvision=True,
    ),
}
"""By `model_type`."""
