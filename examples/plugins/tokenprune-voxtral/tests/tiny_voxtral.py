"""A tiny Voxtral with random weights, of transformers' own classes, and prompts for it."""

from __future__ import annotations

from typing import Any

import torch
from transformers import VoxtralConfig, VoxtralForConditionalGeneration

PAD, AUDIO = 0, 10
LENGTH = 3  # audio tokens of a clip, each of four frames of the tower
MELS = 4

TEXT = {
    "model_type": "llama",
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
}
AUDIO_TOWER = {
    "hidden_size": 16,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_mel_bins": MELS,
    "max_source_positions": 4 * LENGTH,
    "initializer_range": 0.2,
}


def tiny_model() -> VoxtralForConditionalGeneration:
    """Four decoder layers of width 32, two tower layers of width 16."""
    torch.manual_seed(0)
    config = VoxtralConfig(text_config=TEXT, audio_config=AUDIO_TOWER, audio_token_id=AUDIO, initializer_range=0.2)
    return VoxtralForConditionalGeneration(config).eval()


def inputs(*rows: int, first: int = 0) -> dict[str, Any]:
    """What the processor would give: for each row of the batch a number of clips.

    Text and audio depend on the number of the row, counted from `first`.
    """
    prompts, audio = [], []
    for row, clips in enumerate(rows, first):
        generator = torch.Generator().manual_seed(row)
        audio += [torch.randn(MELS, 8 * LENGTH, generator=generator) for _ in range(clips)]
        prompts.append([1, *range(20, 21 + row), *[AUDIO] * (LENGTH * clips), 30 + row, 40])
    longest = max(map(len, prompts))
    given: dict[str, Any] = {
        "input_ids": torch.tensor([[PAD] * (longest - len(ids)) + ids for ids in prompts]),
        "attention_mask": torch.tensor([[0] * (longest - len(ids)) + [1] * len(ids) for ids in prompts]),
    }
    return {**given, "input_features": torch.stack(audio)} if audio else given
