"""Tiny random decoders, built in milliseconds."""

from __future__ import annotations

from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM


def tiny_llama(
    layers: int = 4,
    *,
    heads: int = 4,
    kv_heads: int | None = None,
    attention: str = "sdpa",
    seed: int = 0,
    **config: Any,
) -> LlamaForCausalLM:
    """A random LLaMA-like decoder of width 32 and vocabulary 64, in eval mode, float32.

    Args:
        layers: decoder layers.
        heads: query heads.
        kv_heads: key heads; fewer than `heads` for grouped-query attention.
        attention: attention implementation, "sdpa" or "eager".
        seed: of the weights.
        config: further fields of LlamaConfig.
    """
    settings = {"hidden_size": 32, "intermediate_size": 48, "vocab_size": 64, "initializer_range": 0.2, **config}
    made = LlamaConfig(
        num_hidden_layers=layers, num_attention_heads=heads, num_key_value_heads=kv_heads or heads, **settings
    )
    made._attn_implementation = attention
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(made)
    model.train(False)
    return model
