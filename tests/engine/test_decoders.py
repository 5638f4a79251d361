"""Which decoders the engine takes, and what it says of the others."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import LlamaConfig

import tokenprune as tp
from tokenprune.core.layout import SequenceLayout
from tokenprune.engine.decoder import find_decoder
from tokenprune.errors import InputError, UnsupportedError
from tokenprune.testing.tiny_decoders import tiny_llama


@pytest.mark.parametrize("kinds", [None, ["full_attention"] * 4, ["sliding_attention", "full_attention"] * 2])
def test_self_attention_of_any_width_is_taken(kinds: list[str] | None) -> None:
    model = tiny_llama()
    model.config.layer_types = kinds
    assert find_decoder(model).module is model.model


@pytest.mark.parametrize(
    ("attribute", "value", "named"),
    [
        ("layer_types", ["linear_attention", "full_attention"] * 2, "layers of type linear_attention"),
        ("layer_types", ["chunked_attention", "conv"] * 2, "layers of type chunked_attention, conv"),
        ("cross_attention_layers", [1, 3], "layers of type cross_attention"),
        ("num_kv_shared_layers", 2, "layers that attend to the keys of earlier layers"),
        ("hidden_size_per_layer_input", 8, "layers that take a further input for each token"),
    ],
)
def test_layers_of_other_kinds_are_refused_before_anything_runs(attribute: str, value: object, named: str) -> None:
    model = tiny_llama()
    setattr(model.config, attribute, value)
    image_tokens = torch.zeros(1, 8, dtype=torch.bool)
    told = f"LlamaModel has {named}.*; only decoders whose layers are all self-attention are supported"
    with pytest.raises(UnsupportedError, match=told), tp.prune(model, tp.strategy("fastv"), image_tokens=image_tokens):
        pass
    with pytest.raises(UnsupportedError, match=told):
        tp.compatible("fastv", model)


def test_what_a_stack_of_layers_lacks_is_named() -> None:
    class Stack(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.config = LlamaConfig()
            self.layers, self.rotary_emb = nn.ModuleList([nn.Identity()]), nn.Identity()

    told = r"found none \(Stack has no norm\); .* or set it in the adapter's BoundModel"
    with pytest.raises(UnsupportedError, match=told):
        find_decoder(nn.Sequential(Stack()))
    with pytest.raises(UnsupportedError, match="found none; pass"):
        find_decoder(nn.Linear(2, 2))


def test_image_tokens_of_no_image_are_refused() -> None:
    image_tokens = torch.tensor([[False, True, True]])
    with pytest.raises(InputError, match="image_number: −1 found on image tokens; expected the number of their image"):
        SequenceLayout.from_mask(image_tokens, image_number=torch.tensor([[-1, 0, -1]]))
