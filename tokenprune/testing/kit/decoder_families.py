"""Tiny random decoders of all kinds that the conformance kit runs strategies on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    MistralConfig,
    MistralForCausalLM,
    Qwen2VLTextConfig,
    Qwen2VLTextModel,
)

from tokenprune.testing.kit.cases import SyntheticBatch
from tokenprune.testing.tiny_decoders import tiny_llama

LAYERS, WIDTH, HEADS = 8, 32, 4
_SIZES: dict[str, Any] = {"hidden_size": WIDTH, "intermediate_size": 48, "vocab_size": 64, "initializer_range": 0.2}
_SIZES |= {"num_hidden_layers": LAYERS, "num_attention_heads": HEADS, "head_dim": 8}


@dataclass(frozen=True)
class Family:
    """A kind of decoder.

    Attributes:
        summary: a description, for messages.
        make: builds the model.
        axes: whether positions have three axes (time, height, width).
    """

    summary: str
    make: Callable[[], Any]
    axes: bool = False

    def positions(self, made: SyntheticBatch) -> Tensor:
        """Position ids [batch, S], or [3, batch, S]."""
        return made.positions_3d if self.axes else made.positions


def _built(kind: Any, config: Any) -> Any:
    config._attn_implementation = "sdpa"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = kind(config)
    model.train(False)
    return model


def _mistral() -> Any:
    return _built(MistralForCausalLM, MistralConfig(**_SIZES, num_key_value_heads=2, sliding_window=6))


def _gemma() -> Any:
    kinds = ["sliding_attention", "sliding_attention", "full_attention", "sliding_attention"] * (LAYERS // 4)
    return _built(
        Gemma3ForCausalLM,
        Gemma3TextConfig(**_SIZES, num_key_value_heads=2, sliding_window=6, layer_types=kinds),
    )


def _mrope() -> Any:
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}
    ends: dict[str, Any] = {"bos_token_id": 1, "eos_token_id": 2}
    sizes = {key: value for key, value in _SIZES.items() if key != "head_dim"}
    return _built(Qwen2VLTextModel, Qwen2VLTextConfig(**sizes, num_key_value_heads=2, rope_parameters=rope, **ends))


FAMILIES = {
    "llama": Family("LLaMA-like", lambda: tiny_llama(LAYERS, heads=HEADS)),
    "grouped-kv": Family("LLaMA-like with two key heads for four query heads", lambda: tiny_llama(LAYERS, kv_heads=2)),
    "sliding-window": Family("Mistral-like, every layer looks back 6 positions", _mistral),
    "mixed-windows": Family("Gemma-like, sliding and full layers with rotary tables of their own", _gemma),
    "mrope": Family("Qwen2-VL-like, positions of three axes", _mrope, axes=True),
}


@cache
def model_of(family: str) -> Any:
    """The one tiny model of that family; strategies must not change it."""
    return FAMILIES[family].make()


def stack_of(model: Any) -> Any:
    """The module whose forward runs the decoder layers."""
    return model.model if hasattr(model, "model") else model
