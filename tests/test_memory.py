"""Peak memory of a prefill: bytes of live tensors, counted, against those of the untouched model."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from memory_meter import MemoryMeter
from transformers import LlamaForCausalLM

import tokenprune as tp
from tokenprune.testing.models import tiny_llama

LAYERS, WIDTH, BATCH, LENGTH, IMAGES = 8, 128, 2, 320, 280
IMAGE = torch.zeros(BATCH, LENGTH, dtype=torch.bool)
IMAGE[:, 20 : 20 + IMAGES] = True
STATES = 4 * BATCH * LENGTH * WIDTH  # bytes of one tensor of hidden states
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
    assert peak(model, tp.strategy(name), cached=cached) <= peak(model, None, cached=cached) + BOOKKEEPING


def test_coming_back_costs_the_representatives_states(model: LlamaForCausalLM) -> None:
    """In the layer where parked tokens return, the caller still holds the shorter states of the layer before."""
    short = STATES * (IMAGES // 4 + LENGTH - IMAGES) // LENGTH
    pruned = peak(model, tp.strategy("csp", clustering="grid"), cached=False)
    assert pruned <= peak(model, None, cached=False) + short + MASK + BOOKKEEPING


@pytest.mark.parametrize("cached", [False, True])
def test_hardly_any_token_dropped_costs_one_tensor_of_states(model: LlamaForCausalLM, cached: bool) -> None:
    pruned = peak(model, tp.strategy("uniform", budget=0.99), cached=cached)
    assert pruned <= peak(model, None, cached=cached) + STATES + MASK + BOOKKEEPING


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
