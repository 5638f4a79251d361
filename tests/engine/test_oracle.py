"""The engine against the masked full-length oracle: random schedules, layouts, ragged rows, paddings, merges."""

from __future__ import annotations

import random
from dataclasses import replace
from itertools import groupby

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from oracle_cases import CACHES, LAYERS, MODELS, WIDTH, empty_cache, random_layout

from tokenprune.core.decisions import Keep
from tokenprune.core.layout import SequenceLayout
from tokenprune.engine import prune
from tokenprune.testing.oracle import masked_full_length
from tokenprune.testing.scripted import Scripted, Step, random_script
from tokenprune.testing.tiny_decoders import tiny_llama

models = st.sampled_from(sorted(MODELS))
seeds = st.integers(0, 10**6)


def scripted(layout: SequenceLayout, seed: int, positions: str) -> Scripted:
    """A random script; "mixed" has another position policy at every stage."""
    if positions != "mixed":
        return random_script(layout.slots >= 0, LAYERS, WIDTH, seed, positions=positions)
    script, draw = random_script(layout.slots >= 0, LAYERS, WIDTH, seed), random.Random(seed)
    return Scripted([replace(step, positions=draw.choice(("keep", "renumber"))) for step in script.steps])


def run(model, embeds, layout, script, ids, **kwargs):
    padded = not bool(layout.valid.all())
    with torch.no_grad(), prune(model, script, image_tokens=layout.image_tokens) as pruning:
        output = model.model(
            inputs_embeds=embeds,
            attention_mask=layout.valid.long() if padded else None,
            position_ids=ids if padded else None,
            **kwargs,
        )
    return output, pruning


@settings(deadline=None, max_examples=120)
@given(
    models,
    seeds,
    st.integers(1, 3),
    st.sampled_from(["none", "left", "right"]),
    st.sampled_from(["keep", "renumber", "mixed"]),
)
@example(("eager", 2), 370464, 1, "left", "mixed")  # no image tokens, and a stage that would count positions anew
def test_engine_equals_oracle(kind, seed, batch, padding, positions):
    model = MODELS[kind]
    layout, ids = random_layout(seed, batch, padding)
    embeds = torch.randn(*layout.valid.shape, WIDTH, generator=torch.Generator().manual_seed(seed))
    script = scripted(layout, seed, positions)
    output, pruning = run(model, embeds, layout, script, ids)
    expected = masked_full_length(model.model, embeds, layout, script, ids)
    difference = (output.last_hidden_state - expected)[layout.valid].abs().max()
    assert difference < 2e-5
    entered = [list(entry.image) for entry in pruning.trace.ledger.entries]
    entered_stages = script.steps if layout.counts.any() else []  # text alone leaves nothing to choose from
    policies = [step.positions or positions for step in entered_stages] or [script.positions]
    assert pruning.trace.policies["positions"] == ", then ".join(kind for kind, _ in groupby(policies))
    assert entered == [pruning.trace.active(layer).sum(1).tolist() for layer in range(LAYERS)]


@settings(deadline=None, max_examples=40)
@given(models, seeds, st.sampled_from(["none", "left", "right"]), st.sampled_from(["keep", "renumber"]))
def test_a_row_in_a_batch_equals_the_row_alone(kind, seed, padding, positions):
    model = MODELS[kind]
    layout, ids = random_layout(seed, 3, padding)
    embeds = torch.randn(*layout.valid.shape, WIDTH, generator=torch.Generator().manual_seed(seed))
    script = random_script(layout.slots >= 0, LAYERS, WIDTH, seed, positions=positions)
    together, _ = run(model, embeds, layout, script, ids)
    for row in range(3):
        real = layout.valid[row]
        alone = SequenceLayout.from_mask(layout.image_tokens[row : row + 1, real])
        single, _ = run(
            model,
            embeds[row : row + 1, real],
            alone,
            script.row(row, int(layout.counts[row])),
            ids[row : row + 1, real],
        )
        assert (together.last_hidden_state[row, real] - single.last_hidden_state[0]).abs().max() < 2e-5


@pytest.mark.parametrize("kind", sorted(MODELS))
@pytest.mark.parametrize("padding", ["none", "left", "right"])
def test_keep_all_is_bit_identical(kind, padding):
    model = MODELS[kind]
    layout, ids = random_layout(5, 3, padding)
    embeds = torch.randn(*layout.valid.shape, WIDTH)
    inputs = {"inputs_embeds": embeds, "attention_mask": layout.valid.long(), "position_ids": ids}
    with torch.no_grad():
        untouched = model(**inputs, use_cache=True)
        script = Scripted([Step(layer, Keep.where(layout.slots >= 0)) for layer in range(LAYERS)])
        with prune(model, script, image_tokens=layout.image_tokens):
            pruned = model(**inputs, use_cache=True)
    assert torch.equal(untouched.logits, pruned.logits)
    for ours, theirs in zip(pruned.past_key_values.layers, untouched.past_key_values.layers, strict=True):
        assert torch.equal(ours.keys, theirs.keys)


@settings(deadline=None, max_examples=120)
@given(
    models,
    seeds,
    st.sampled_from(["none", "left"]),
    st.sampled_from(["keep", "renumber", "mixed"]),
    st.booleans(),
    st.sampled_from(CACHES),
    st.integers(0, 4),
)
def test_cached_decoding_equals_recomputation(kind, seed, padding, positions, stepwise, cache, spare):
    """New tokens one by one (or all at once) on the pruned cache = the whole longer sequence in one oracle run."""
    model = MODELS[kind]
    layout, ids = random_layout(seed, 2, padding)
    draw = torch.Generator().manual_seed(seed)
    length, new = layout.valid.shape[1], 3
    embeds = torch.randn(2, length + new, WIDTH, generator=draw)
    script = scripted(layout, seed, positions)
    grown = SequenceLayout.from_mask(
        torch.cat((layout.image_tokens, torch.zeros(2, new, dtype=torch.bool)), 1),
        torch.cat((layout.valid, torch.ones(2, new, dtype=torch.bool)), 1),
    )
    more = ids[:, -1:] + torch.arange(1, new + 1)
    expected = masked_full_length(model.model, embeds, grown, script, torch.cat((ids, more), 1))
    padded = padding != "none"
    mask = grown.valid.long() if padded else None
    with torch.no_grad(), prune(model, script, image_tokens=layout.image_tokens):
        past = model.model(
            inputs_embeds=embeds[:, :length],
            attention_mask=mask[:, :length] if padded else None,
            position_ids=ids if padded else None,
            past_key_values=empty_cache(cache, model, length + new + spare),
            use_cache=True,
        ).past_key_values
        assert past.get_seq_length() == length
        got = []
        for start in range(length, length + new, 1 if stepwise else new):
            stop = start + (1 if stepwise else new)
            got.append(
                model.model(
                    inputs_embeds=embeds[:, start:stop],
                    attention_mask=mask[:, :stop] if padded else None,
                    position_ids=more[:, start - length : stop - length] if padded else None,
                    past_key_values=past,
                    use_cache=True,
                ).last_hidden_state
            )
        assert past.get_seq_length() == length + new
    assert (torch.cat(got, 1) - expected[:, length:]).abs().max() < 2e-5


@pytest.mark.parametrize("kind", sorted(MODELS))
def test_gradients_flow_through_gather_and_scatter(kind):
    model = tiny_llama(LAYERS, attention=kind[0], kv_heads=kind[1]).train()
    layout, ids = random_layout(11, 2, "right")
    embeds = torch.randn(*layout.valid.shape, WIDTH, requires_grad=True)
    script = random_script(layout.slots >= 0, LAYERS, WIDTH, 3)
    assert len(script.steps) > 1
    with prune(model, script, image_tokens=layout.image_tokens):
        out = model.model(inputs_embeds=embeds, attention_mask=layout.valid.long(), position_ids=ids).last_hidden_state
    probe = torch.randn(int(layout.valid.sum()), WIDTH, generator=torch.Generator().manual_seed(1))
    (out[layout.valid] * probe).sum().backward()
    step = 1e-3
    direction = torch.randn_like(embeds) * layout.valid[..., None]
    with torch.no_grad(), prune(model, script, image_tokens=layout.image_tokens):
        sides = [
            model.model(
                inputs_embeds=embeds + sign * step * direction, attention_mask=layout.valid.long(), position_ids=ids
            )
            .last_hidden_state[layout.valid]
            .mul(probe)
            .double()
            .sum()
            for sign in (1, -1)
        ]
    numeric = (sides[0] - sides[1]) / (2 * step)
    assert torch.isclose((embeds.grad * direction).sum().double(), numeric, rtol=2e-2, atol=1e-2)
    assert all(p.grad is not None for p in model.model.layers.parameters())


def test_bfloat16_prefill_and_generate():
    model = tiny_llama(LAYERS).to(torch.bfloat16)
    ids = torch.randint(1, 64, (2, 14))  # 0 is padding to generate()
    image = torch.zeros(2, 14, dtype=torch.bool)
    image[:, 2:10] = True
    layout = SequenceLayout.from_mask(image)
    script = random_script(layout.slots >= 0, LAYERS, WIDTH, 4, merges=True)
    with torch.no_grad(), prune(model, script, image_tokens=image):
        assert model(ids).logits.dtype == torch.bfloat16
        assert model.generate(ids, max_new_tokens=3, do_sample=True, pad_token_id=0).shape == (2, 17)
