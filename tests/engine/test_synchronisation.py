"""How often the host waits for the device: for values of tensors, which on a GPU stops the queue of kernels."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from oracle_cases import CACHES, empty_cache
from torch.utils._python_dispatch import TorchDispatchMode

import tokenprune as tp
from tokenprune.testing.tiny_decoders import tiny_llama

WAITING = {"aten::_local_scalar_dense", "aten::equal", "aten::nonzero", "aten::is_nonzero", "aten::masked_select"}
PROMPT, WIDTH, ROWS = 60, 32, 2


class Waits(TorchDispatchMode):
    """Counts operations whose result the host needs, or whose shape depends on values."""

    def __init__(self):
        super().__init__()
        self.found = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name
        masks = [part for part in args[1] or [] if part is not None] if name == "aten::index" else []
        if name in WAITING or any(mask.dtype == torch.bool for mask in masks):
            self.found[name] += 1
        return func(*args, **(kwargs or {}))

    @property
    def count(self):
        return sum(self.found.values())


@pytest.fixture(params=[False, True], ids=["without mask", "with mask"])
def masked(request):
    return request.param


def prompt():
    image = torch.zeros(ROWS, PROMPT, dtype=torch.bool)
    image[0, 4:40], image[1, 4:30] = True, True
    return image, torch.randn(ROWS, PROMPT, WIDTH, generator=torch.Generator().manual_seed(0))


def test_the_counter_counts():
    values = torch.tensor([1.0, 0.0])
    with Waits() as waits:
        bool(values[0] > 0), values.nonzero(), values[values > 0], torch.equal(values, values)
        values + 1, values[torch.tensor([0])]
    assert waits.count >= 4


@pytest.mark.parametrize("name", ["uniform", "fastv", "divprune"])
def test_a_prefill_waits_per_stage_and_not_per_layer(name, masked):
    image, embeds = prompt()
    mask = torch.ones(ROWS, PROMPT, dtype=torch.long) if masked else None
    counts = []
    for layers in (6, 12):
        model, strategy = tiny_llama(layers), tp.strategy(name, budget=0.6)
        with torch.no_grad(), tp.prune(model, strategy, image_tokens=image) as run:
            model(inputs_embeds=embeds, attention_mask=mask)  # solves the budget
            with Waits() as waits:
                model(inputs_embeds=embeds, attention_mask=mask)
            assert len(run.trace.stages) == 1
        counts.append(waits.count)
    assert counts[0] == counts[1]


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("name", ["uniform", "fastv", "pyramiddrop", "divprune"])
def test_a_decoding_step_waits_at_most_once(name, masked, cache):
    image, embeds = prompt()
    model = tiny_llama(12)
    token = torch.ones(ROWS, 1, dtype=torch.long)

    def mask(length):
        return torch.ones(ROWS, length, dtype=torch.long) if masked else None

    with torch.no_grad(), tp.prune(model, tp.strategy(name, budget=0.5), image_tokens=image) as run:
        cache = empty_cache(cache, model, PROMPT + 4)
        model(inputs_embeds=embeds, attention_mask=mask(PROMPT), past_key_values=cache)
        model(input_ids=token, attention_mask=mask(PROMPT + 1), past_key_values=cache)
        with Waits() as waits:
            model(input_ids=token, attention_mask=mask(PROMPT + 2), past_key_values=cache)
        assert run.trace.stages
    assert waits.count <= int(masked)  # transformers looks into the mask, once for all layers
