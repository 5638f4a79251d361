"""Which decoders the engine takes, and what it says of the others."""

from __future__ import annotations

import pytest
import torch
import transformers
from torch import nn
from transformers import LlamaConfig

import tokenprune as tp
from tokenprune.core.decisions import Keep
from tokenprune.core.layout import SequenceLayout
from tokenprune.engine.decoder import find_decoder
from tokenprune.errors import InputError, UnsupportedError
from tokenprune.testing.scripted import Scripted, Step
from tokenprune.testing.tiny_decoders import tiny_llama


@pytest.mark.parametrize(
    "kinds",
    [None, ["full_attention"] * 4, ["sliding_attention", "chunked_attention"] * 2, ["linear_attention", "conv"] * 2],
)
def test_layers_that_attend_or_keep_a_state_are_taken(kinds: list[str] | None) -> None:
    model = tiny_llama()
    model.config.layer_types = kinds
    assert find_decoder(model).module is model.model


@pytest.mark.parametrize(
    ("attribute", "value", "named"),
    [
        ("layer_types", ["mamba", "full_attention"] * 2, "layers of type mamba"),
        ("layer_types", ["linear_attention", "mamba", "hybrid", "full_attention"], "layers of type hybrid, mamba"),
        ("cross_attention_layers", [1, 3], "layers of type cross_attention"),
        ("num_kv_shared_layers", 2, "layers that attend to the keys of earlier layers"),
        ("hidden_size_per_layer_input", 8, "layers that take a further input for each token"),
    ],
)
def test_layers_of_other_kinds_are_refused_before_anything_runs(attribute: str, value: object, named: str) -> None:
    model = tiny_llama()
    setattr(model.config, attribute, value)
    image_tokens = torch.zeros(1, 8, dtype=torch.bool)
    told = (
        f"LlamaModel has {named}.*; only decoders whose layers depend on nothing but their input, and attend to it or "
    )
    told += "keep a state of it, are supported"
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


@pytest.mark.skipif(not hasattr(transformers, "CohereCompassTextConfig"), reason="an older release of transformers")
@torch.no_grad()
def test_layers_without_a_rotary_embedding_are_renumbered_too() -> None:
    """Tokens dropped before the first layer might as well not be in the prompt, if positions are renumbered."""
    rotary = {"sliding_attention": {"rope_type": "default", "rope_theta": 10000.0}, "full_attention": None}
    config = transformers.CohereCompassTextConfig(
        **{"hidden_size": 32, "intermediate_size": 48, "vocab_size": 64, "num_hidden_layers": 4, "head_dim": 8},
        **{"num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.2, "pad_token_id": 0},
        **{"layer_types": ["sliding_attention", "full_attention"] * 2, "rope_parameters": rotary, "eos_token_id": None},
    )
    torch.manual_seed(0)
    model = transformers.CohereCompassForCausalLM(config).eval()
    ids = torch.randint(1, 64, (1, 12))
    image_tokens = torch.zeros(1, 12, dtype=torch.bool)
    image_tokens[:, 2:8] = True
    kept = torch.tensor([[False, True, True, False, False, True]])
    rest = ids[:, [0, 1, 3, 4, 7, 8, 9, 10, 11]]
    script = Scripted([Step(0, Keep.where(kept))], positions="renumber")
    greedy = {"max_new_tokens": 3, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    expected = model.generate(rest, **greedy).logits
    with tp.prune(model, script, image_tokens=image_tokens):
        found = model.generate(ids, **greedy).logits
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs)
    assert not tp.compatible("ivcprune", model).runs  # it asks for rotary tables
    assert tp.compatible("feather", model).runs  # which asks for attention without the embedding


def test_image_tokens_of_no_image_are_refused() -> None:
    image_tokens = torch.tensor([[False, True, True]])
    with pytest.raises(InputError, match="image_number: −1 found on image tokens; expected the number of their image"):
        SequenceLayout.from_mask(image_tokens, image_number=torch.tensor([[-1, 0, -1]]))
