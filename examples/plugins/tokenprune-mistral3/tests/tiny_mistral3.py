"""A tiny Mistral 3 with random weights, of transformers' own classes, and prompts for it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.nn.functional import pad
from transformers import Mistral3Config, Mistral3ForConditionalGeneration

PAD, IMAGE, BREAK, END = 0, 10, 12, 13
CELL = 8  # pixels of an image token, each way: patches of 4, merged two by two

TEXT = {
    "model_type": "mistral",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": 64,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,
    "pad_token_id": PAD,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
}
VISION = {
    "model_type": "pixtral",
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "head_dim": 8,
    "patch_size": 4,
    "image_size": 64,
    "initializer_range": 0.2,
}


def tiny_model() -> Mistral3ForConditionalGeneration:
    """Four decoder layers of width 32, two tower layers of width 16."""
    torch.manual_seed(0)
    config = Mistral3Config(
        text_config=TEXT,
        vision_config=VISION,
        image_token_index=IMAGE,
        spatial_merge_size=2,
        initializer_range=0.2,
        tie_word_embeddings=False,
    )
    return Mistral3ForConditionalGeneration(config).eval()


def inputs(*rows: Sequence[tuple[int, int]], first: int = 0) -> dict[str, Any]:
    """What the processor would give: for each row of the batch its images, each as (rows, columns) of tokens.

    Text and pixels depend on the number of the row, counted from `first`.
    """
    prompts, pictures = [], []
    for row, images in enumerate(rows, first):
        generator = torch.Generator().manual_seed(row)
        pictures += [torch.randn(3, height * CELL, width * CELL, generator=generator) for height, width in images]
        ids = [1, 20 + row]
        for height, width in images:
            ids += [token for _ in range(height) for token in [*[IMAGE] * width, BREAK]]
            ids[-1] = END
        prompts.append([*ids, 30 + row, 40])
    longest = max(map(len, prompts))
    sizes = torch.tensor([image for images in rows for image in images]).view(-1, 2) * CELL
    given: dict[str, Any] = {
        "input_ids": torch.tensor([[PAD] * (longest - len(ids)) + ids for ids in prompts]),
        "attention_mask": torch.tensor([[0] * (longest - len(ids)) + [1] * len(ids) for ids in prompts]),
    }
    if pictures:
        height, width = sizes.amax(0).tolist()
        filled = [pad(picture, (0, width - picture.shape[2], 0, height - picture.shape[1])) for picture in pictures]
        given.update(pixel_values=torch.stack(filled), image_sizes=sizes)
    return given
