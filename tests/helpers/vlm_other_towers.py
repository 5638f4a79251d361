"""Tiny configurations and inputs of vision-language models whose towers are no plain stacks of layers on patches."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import transformers
from vlm_configs import CROP, IMAGE, TEXT_MODEL
from vlm_inputs import AttentionCall, Pictures, fixed, spans_of, wrapped

CODES = range(112, 128)  # ids of the words of a visual vocabulary
END_OF_LINE = 111
VQ: dict[str, Any] = {"base_channels": 32, "channel_multiplier": [1, 1, 1], "num_res_blocks": 1}


def chameleon(**more: Any) -> Any:
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
        **more,
    )


def emu3() -> Any:
    """A word for each 4 x 4 pixels, and a word at the end of each line."""
    words = {f"<|visual token {code:06}|>": id for code, id in enumerate(CODES)}
    return transformers.Emu3Config(
        text_config=TEXT_MODEL,
        vq_config={
            **VQ,
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


ROWS: list[dict[str, Any]] = [
    {"name": "chameleon", "config": chameleon, "see": fixed("SiglipImageProcessor", CROP, 16, wrapped)},
    {"name": "emu3", "config": emu3, "see": see_emu3},
]
"""Arguments of `vlm_families.Family`."""
