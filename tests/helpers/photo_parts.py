"""A photo model of tiny random parts: no package with pretrained weights is needed."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM

from tokenprune_adapters.photos.adapter import assemble
from tokenprune_adapters.photos.model import PhotoModel
from tokenprune_adapters.photos.parts import CELL, MaskHead, Projector, ReadOut, Standardise
from tokenprune_adapters.photos.text import ChatTokenizer
from tokenprune_adapters.photos.tower import LiteTower

CONTROL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<empty_output>")
LAYERS, RANK = 4, 4
TOOL = Path(__file__).parents[2] / "tools" / "train_photo_small"


def byte_tokenizer() -> Tokenizer:
    """A vocabulary of bytes and the control tokens."""
    words = [*CONTROL, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE(vocab={word: number for number, word in enumerate(words)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.add_special_tokens(list(CONTROL))
    return tokenizer


def tiny_llama() -> LlamaForCausalLM:
    """Two heads that share one key head, as SmolLM2's share theirs; word embeddings are the output's."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(CONTROL) + 256,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=LAYERS,
        num_attention_heads=2,
        num_key_value_heads=1,
        tie_word_embeddings=True,
        initializer_range=0.3,
    )
    return LlamaForCausalLM(config).requires_grad_(False).eval()


def tiny_tower() -> LiteTower:
    """The tower with random weights; its size is fixed."""
    torch.manual_seed(1)
    return LiteTower().requires_grad_(False).eval()


def random_delta(llama: LlamaForCausalLM, rank: int = RANK) -> dict[str, torch.Tensor]:
    """What a training would write, by chance."""
    torch.manual_seed(2)
    width = llama.config.hidden_size
    parts = {"projector": Projector(width), "mask_projection": ReadOut(width)}
    parts |= {"standardise": Standardise(), "head": MaskHead()}
    found = {f"{part}.{name}": value for part, module in parts.items() for name, value in module.state_dict().items()}
    for name, layer in llama.model.layers.named_modules():
        if isinstance(layer, torch.nn.Linear):
            found[f"decoder.model.layers.{name}.down"] = 0.1 * torch.randn(rank, layer.in_features)
            found[f"decoder.model.layers.{name}.up"] = 0.1 * torch.randn(layer.out_features, rank)
    assert found["projector.enter.weight"].shape[1] == CELL
    return found


def tiny_photo_model() -> PhotoModel:
    """All of it."""
    llama = tiny_llama()
    return assemble(llama, tiny_tower(), ChatTokenizer(byte_tokenizer()), random_delta(llama), "photo-tiny")


@contextmanager
def tool_modules(*names: str) -> Iterator[list[Any]]:
    """Modules of the training tool, which stand beside each other without a package; forgotten afterwards."""
    before = set(sys.modules)
    sys.path.insert(0, str(TOOL))
    try:
        yield [import_module(name) for name in names]
    finally:
        sys.path.remove(str(TOOL))
        for name in set(sys.modules) - before:
            if str(getattr(sys.modules[name], "__file__", "") or "").startswith(str(TOOL)):
                del sys.modules[name]
