"""Peak memory of a prefill: bytes of live tensors, counted, against those of the untouched model."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from memory_meter import MemoryMeter
from transformers import LlamaForCausalLM

import tokenprune as tp
from tokenprune.testing.tiny_decoders import tiny_llama

LAYERS, WIDTH, BATCH, LENGTH, IMAGES = 8, 128, 2, 320, 280
IMAGE = torch.zeros(BATCH, LENGTH, dtype=torch.bool)
IMAGE[:, 20 : 20 + IMAGES] = True
TABLES = 2 * 4 * BATCH * LENGTH * WIDTH // 4  # the rotary tables of the tokens that are left: four heads
BOOKKEEPING = 100 * BATCH * LENGTH  # positions and flags, which do not grow with the model's width
MASK = 4 * BATCH * LENGTH * LENGTH  # of eager attention; the shortened one stands beside the model's


@pytest.fixture(scope="module", params=["sdpa", "eager"])
def model(request: pytest.FixtureRequest) -> LlamaForCausalLM:
    return tiny_llama(LAYERS, hidden_size=WIDTH, intermediate_size=344, attention=request.param)


def peak(model: LlamaForCausalLM, strategy: tp.Strategy | None, *, cached: bool, padded: bool = False) -> int:
    mask = torch.ones(BATCH, LENGTH, dtype=torch.long)
    if padded:
        mask[0, -9:] = 0
    embeds = torch.randn(BATCH, LENGTH, WIDTH, generator=torch.Generator().manual_seed(0))
    given: dict[str, Any] = {"inputs_embeds": embeds, "attention_mask": mask, "use_cache": cached}
    with torch.no_grad(), MemoryMeter() as meter:
        if strategy is None:
            model.model(**given)
        else:
            with tp.prune(model, strategy, image_tokens=IMAGE):
                model.model(**given)
    return meter.peak


@functools.cache
def untouched(model: LlamaForCausalLM, cached: bool, padded: bool = False) -> int:
    return peak(model, None, cached=cached, padded=padded)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("budget", [0.35, 0.5, 0.85])
@pytest.mark.parametrize("name", ["uniform", "random", "fastv", "csp"])
def test_a_prefill_that_fills_a_cache_takes_less(
    model: LlamaForCausalLM, name: str, budget: float, padded: bool
) -> None:
    pruned = peak(model, tp.strategy(name, budget=budget), cached=True, padded=padded)
    assert pruned < peak(model, None, cached=True, padded=padded)


@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("name", ["none", "blind", "uniform", "random", "fastv"])
def test_without_a_cache_it_takes_no_more_than_bookkeeping(model: LlamaForCausalLM, name: str, cached: bool) -> None:
    assert peak(model, tp.strategy(name), cached=cached) <= untouched(model, cached) + BOOKKEEPING


@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize(("name", "budget"), [("csp", None), ("csp", 0.6), ("uniform", 0.99)])
def test_no_state_is_held_twice(model: LlamaForCausalLM, name: str, budget: float | None, cached: bool) -> None:
    """Where parked tokens return, and where hardly any token is dropped; only an eager mask stands beside its cut."""
    pruned = peak(model, tp.strategy(name, budget=budget), cached=cached)
    mask = MASK if model.config._attn_implementation == "eager" else 0
    assert pruned <= untouched(model, cached) + mask + TABLES + BOOKKEEPING


def test_the_meter_counts_what_is_alive() -> None:
    given = torch.ones(1000)
    with MemoryMeter() as meter:
        one = given + 1
        assert (meter.now, meter.peak) == (4000, 4000)
        view = one[10:]
        given.view(10, 100).add_(1)
        assert meter.now == 4000
        two = (one + 1).double()
        assert (meter.now, meter.peak) == (12000, 16000)
        del one
        assert meter.now == 12000
        del view
        assert meter.now == 8000
        del two
        assert (meter.now, meter.peak) == (0, 16000)
