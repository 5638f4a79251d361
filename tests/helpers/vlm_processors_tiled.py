"""Rows of types whose pictures become squares: the whole picture, tiles of it, or words of a visual vocabulary."""

from __future__ import annotations

from vlm_configs import CELL, CROP, END, FAKE, IMAGE, PATCH, START
from vlm_other_layers import TILE
from vlm_tiny_processor import TinyProcessor, square

TILES = {f"<|img_row_{row + 1}_col_{column + 1}|>": CELL + 4 * row + column for row in range(4) for column in range(4)}

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
}
"""By `model_type`."""
