"""Writes tiny whole CLIP models: a vision tower's weights, and a text tower, projections and a tokenizer of bytes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from tokenizers.pre_tokenizers import ByteLevel
from transformers import CLIPConfig, CLIPModel, CLIPTokenizerFast, CLIPVisionModel

CONTEXT, SPACE = 20, 12
BOS, EOS = "<|startoftext|>", "<|endoftext|>"


def vocabulary() -> dict[str, int]:
    """Every byte, within a word and at its end, and the two marks; CLIP's in small, without merges."""
    letters = sorted(ByteLevel.alphabet())
    return {piece: i for i, piece in enumerate([*letters, *(letter + "</w>" for letter in letters), BOS, EOS])}


def write_clip(folder: Path, vision: CLIPVisionModel, tokenizer: str = "tokenizer.json") -> Path:
    """Write a CLIP model whose vision tower has the weights of `vision`.

    Args:
        folder: made if it is not there; a tower alone that is in it is replaced.
        vision: the tower.
        tokenizer: "tokenizer.json", "vocab.json" (with merges.txt), or "" for none.
    """
    words = vocabulary()
    sizes = {"hidden_size": 16, "intermediate_size": 20, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = {**sizes, "vocab_size": len(words), "max_position_embeddings": CONTEXT}
    text.update(bos_token_id=words[BOS], eos_token_id=words[EOS], pad_token_id=words[EOS])
    config = CLIPConfig(text_config=text, vision_config=vision.config.to_dict(), projection_dim=SPACE)
    model = CLIPModel(config)
    drawn = torch.Generator().manual_seed(5)
    for name, tensor in sorted(model.state_dict().items()):  # the default draws are nearly the same for every text
        if name.startswith(("text_", "visual_projection")):
            tensor.copy_(torch.randn(tensor.shape, generator=drawn) * 0.5)
    prefix = "" if any(name.startswith("vision_model.") for name in vision.state_dict()) else "vision_model."
    state = {prefix + name: tensor for name, tensor in vision.state_dict().items()}
    model.load_state_dict(state, strict=False)
    for file in folder.glob("*"):
        file.unlink()
    model.save_pretrained(folder)
    plain = folder / "vocab.json", folder / "merges.txt"
    plain[0].write_text(json.dumps(words))
    plain[1].write_text("#version: 0.2\n")
    if tokenizer == "tokenizer.json":
        CLIPTokenizerFast.from_pretrained(folder).save_pretrained(folder)
    if tokenizer != "vocab.json":
        for file in plain:
            file.unlink(missing_ok=True)
    return folder


def whole_clip(folder: Path, **options: Any) -> Path:
    """Replace the folder's vision tower alone by a whole CLIP model with the same tower."""
    return write_clip(folder, CLIPVisionModel.from_pretrained(folder), **options)
