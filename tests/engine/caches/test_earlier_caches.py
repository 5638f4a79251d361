"""Caches of earlier layers that lose what a later stage drops (IVC-Prune), against the masked full-length oracle."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle_cases import CACHES, LAYERS, MODELS, WIDTH, empty_cache, random_layout

from tokenprune.core.decisions import Keep
from tokenprune.core.layout import SequenceLayout
from tokenprune.core.stage import Stage
from tokenprune.cost import DecoderSpec, kv_bytes
from tokenprune.engine import prune
from tokenprune.errors import PluginError
from tokenprune.testing.oracle import masked_full_length
from tokenprune.testing.scripted import Scripted, Step, random_script
from tokenprune.testing.tiny_decoders import tiny_llama


def cutting(layout: SequenceLayout, seed: int, positions: str) -> Scripted:
    """A random script, some of whose stages cut the caches of earlier layers."""
    script, draw = random_script(layout.slots >= 0, LAYERS, WIDTH, seed, positions=positions), random.Random(seed)
    steps = []
    for step in script.steps:
        cut = step.layer > 0 and draw.random() < 0.6
        first = draw.randrange(min(step.layer, 2)) if cut else 0
        steps.append(replace(step, prune_earlier_caches=cut, caches_from=first))
    return Scripted(steps, positions=positions)


@settings(deadline=None, max_examples=120)
@given(
    st.sampled_from(sorted(MODELS)),
    st.integers(0, 10**6),
    st.sampled_from(["none", "left"]),
    st.sampled_from(["keep", "renumber"]),
    st.booleans(),
    st.sampled_from(CACHES),
)
def test_decoding_on_cut_caches_equals_the_oracle(kind, seed, padding, positions, stepwise, cache):
    model = MODELS[kind]
    layout, ids = random_layout(seed, 2, padding)
    length, new = layout.valid.shape[1], 3
    embeds = torch.randn(2, length + new, WIDTH, generator=torch.Generator().manual_seed(seed))
    script = cutting(layout, seed, positions)
    later = torch.ones(2, new, dtype=torch.bool)
    grown = SequenceLayout.from_mask(torch.cat((layout.image_tokens, ~later), 1), torch.cat((layout.valid, later), 1))
    more = ids[:, -1:] + torch.arange(1, new + 1)
    every = torch.cat((ids, more), 1)
    expected = masked_full_length(model.model, embeds, grown, script, every, decoded=new)
    mask = grown.valid.long()
    with torch.no_grad(), prune(model, script, image_tokens=layout.image_tokens) as run:
        past = model.model(
            inputs_embeds=embeds[:, :length],
            attention_mask=mask[:, :length],
            position_ids=ids,
            past_key_values=empty_cache(cache, model, length + new),
            use_cache=True,
        ).past_key_values
        outputs = []
        for step in range(new) if stepwise else [slice(0, new)]:
            start, end = (step, step + 1) if stepwise else (0, new)
            outputs.append(
                model.model(
                    inputs_embeds=embeds[:, length + start : length + end],
                    attention_mask=mask[:, : length + end],
                    position_ids=every[:, length + start : length + end],
                    past_key_values=past,
                    use_cache=True,
                ).last_hidden_state
            )
    assert (torch.cat(outputs, 1) - expected[:, length:]).abs().max() < 2e-5
    for entry, layer in zip(run.trace.ledger.entries, past.layers, strict=True):
        most = max(image + other for image, other in zip(entry.in_cache, entry.other, strict=True))
        if cache == "dynamic" and padding == "none":
            assert layer.keys.shape[2] == most + new


@pytest.mark.parametrize("cache", CACHES)
def test_memory_follows_and_the_ledger_tells_it(cache):
    model, ids = tiny_llama(LAYERS), torch.arange(1, 13)[None]
    image = torch.zeros(1, 12, dtype=torch.bool)
    image[:, 2:10] = True
    half = Keep.where(torch.arange(8)[None] % 2 == 0)
    with torch.no_grad():
        sizes, totals = [], []
        for first in (None, 0, 1):
            step = Step(2, half, prune_earlier_caches=first is not None, caches_from=first or 0)
            with prune(model, Scripted([step]), image_tokens=image) as run:
                past = model(ids, past_key_values=empty_cache(cache, model, 16)).past_key_values
            sizes.append([layer.keys.shape[2] for layer in past.layers])
            totals.append(kv_bytes(run.trace.ledger, DecoderSpec.from_config(model.config)).total)
            assert [sum(entry.image) for entry in run.trace.ledger.entries] == [8, 8, 4, 4]
    spare = 0 if cache == "dynamic" else 4
    assert sizes == [[length + spare for length in row] for row in ([12, 12, 8, 8], [8] * 4, [12, 8, 8, 8])]
    assert [total / totals[0] for total in totals] == [1, 32 / 40, 36 / 40]


def test_generate_goes_on_from_cut_caches():
    """As the oracle above, through transformers' own loop: positions and masks count the tokens that are gone."""
    model, ids = tiny_llama(LAYERS), torch.arange(1, 13)[None]
    image = torch.zeros(1, 12, dtype=torch.bool)
    image[:, 2:10] = True
    script = Scripted([Step(2, Keep.where(torch.arange(8)[None] < 3), prune_earlier_caches=True)])
    options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    with torch.no_grad(), prune(model, script, image_tokens=image):
        said = model.generate(ids, **options)
    embeds = model.get_input_embeddings()(said)
    layout = SequenceLayout.from_mask(torch.cat((image, torch.zeros(1, 5, dtype=torch.bool)), 1))
    with torch.no_grad():
        # the first new token is of the prefill, which sees every token; the others of decoding
        states = masked_full_length(model.model, embeds, layout, script, torch.arange(17)[None], decoded=5)
    assert model.lm_head(states[:, 11:16]).argmax(-1).tolist() == said[:, 12:].tolist()


@pytest.mark.parametrize(
    ("layer", "given", "message"),
    [
        (2, {"prune_earlier_caches": True, "caches_from": "x"}, "stage 'prune': caches_from='x' is str; expected int"),
        (2, {"prune_earlier_caches": True, "caches_from": 2}, "from layer 2 on, but the stage is at layer 2; expected"),
        (2, {"prune_earlier_caches": True, "caches_from": -1}, "from layer -1 on, but the stage is at layer 2"),
        (0, {"prune_earlier_caches": True}, "and a stage at layer 1 or later"),
        (2, {"prune_earlier_caches": "no"}, "prune_earlier_caches='no', caches_from=0; expected True or False"),
        (2, {"prune_earlier_caches": True, "caches_from": None}, "caches_from=None; expected True or False, and"),
        (2, {"caches_from": 1}, "caches_from=1 has no effect without prune_earlier_caches=True"),
    ],
)
def test_caches_of_no_earlier_layer_are_refused(layer, given, message):
    with pytest.raises(PluginError, match=message):
        Stage("prune", layer, **given)
