"""Pruning on transformers' own vision-language models: against the oracle, and what users rely on."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from vlm_cases import LAYERS, SIZES, TOLERANCE, inputs_of, layout_of, model_of, names, script_of, several_images_of
from vlm_families import FAMILIES, NAMES, RECOMPUTES, VIDEO_NAMES, generates_otherwise
from vlm_known import SEPARATED
from vlm_oracle import attends, grown, oracle

import tokenprune
from tokenprune.core.decisions import Keep
from tokenprune.core.layout import SequenceLayout
from tokenprune.core.reads import AttentionFrom
from tokenprune.core.stage import Stage
from tokenprune.testing.scripted import Scripted, Step
from tokenprune_adapters.hf.families import FAMILIES as KNOWN
from tokenprune_adapters.hf.families import ROWS_DIFFER

attentions = pytest.mark.parametrize("attention", ["sdpa", "eager"])
OTHERWISE_WITH_A_STATIC_CACHE = {
    "paligemma2",  # fails in transformers untouched
    "gemma4_unified",  # untouched, its full layers see pictures both ways with a dynamic cache alone
}
OPTIONS = {"max_new_tokens": 4, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}


def traces_on(model):
    """Hooks on every module, and what was put on the modules themselves."""
    hooks = [(len(module._forward_hooks), len(module._forward_pre_hooks)) for module in model.modules()]
    return hooks, [set(vars(module)) for module in model.modules()]


def grown_mask(layout, longer):
    new = longer["input_ids"].shape[1] - layout.image_tokens.shape[1]
    return torch.nn.functional.pad(layout.image_tokens, (0, new))


def keep_all(name, inputs):
    exists = layout_of(name, inputs).slots >= 0
    return Scripted([Step(layer, Keep.where(exists)) for layer in range(LAYERS)])


def against_oracle(name, attention, inputs, seed):
    model, script = model_of(name, attention), script_of(name, inputs, seed)
    layout = layout_of(name, inputs)
    with torch.no_grad():
        with tokenprune.prune(model, script) as run:
            pruned = model(**inputs).logits
        with oracle(FAMILIES[name].decoder(model), layout, script):
            expected = model(**inputs, use_cache=False).logits
    entered = [list(entry.image) for entry in run.trace.ledger.entries]
    assert entered == [run.trace.active(layer).sum(1).tolist() for layer in range(LAYERS)]
    assert (pruned - expected)[layout.valid].abs().max() < TOLERANCE


@names
@attentions
@settings(deadline=None, max_examples=3)
@given(seed=st.integers(0, 10**6), padding=st.sampled_from(["left", "right"]))
def test_pruned_equals_the_oracle(name, attention, seed, padding):
    against_oracle(name, attention, inputs_of(name, padding=padding), seed)


@names
@settings(deadline=None, max_examples=2)
@given(seed=st.integers(0, 10**6))
def test_a_single_row_and_several_images_equal_the_oracle(name, seed):
    """A single row has no padding, so that most models make no mask at all."""
    against_oracle(name, "sdpa", inputs_of(name, sizes=(SIZES[0],)), seed)
    against_oracle(name, "sdpa", several_images_of(name), seed)


@pytest.mark.parametrize("name", VIDEO_NAMES)
@settings(deadline=None, max_examples=2)
@given(seed=st.integers(0, 10**6))
def test_videos_equal_the_oracle(name, seed):
    against_oracle(name, "sdpa", inputs_of(name, sizes=((2, 16, 24), (2, 24, 16))), seed)


@names
def test_the_adapter_finds_the_image_tokens(name):
    for inputs in (inputs_of(name), several_images_of(name)):
        found, expected = layout_of(name, inputs).image_tokens, FAMILIES[name].image_tokens(inputs)
        if name in (*SEPARATED, "hunyuan_vl"):
            assert not (found & ~expected).any()
            assert (found.sum(1) < expected.sum(1)).all()
        else:
            assert torch.equal(found, expected)


@names
@attentions
def test_keep_all_generates_the_same_to_the_bit(name, attention):
    model, inputs = model_of(name, attention), inputs_of(name)
    untouched = model.generate(**inputs, **OPTIONS)
    with tokenprune.prune(model, keep_all(name, inputs)):
        pruned = model.generate(**inputs, **OPTIONS)
    assert torch.equal(untouched.sequences, pruned.sequences)
    for ours, theirs in zip(pruned.logits, untouched.logits, strict=True):
        assert torch.equal(ours, theirs)


@names
@attentions
@settings(deadline=None, max_examples=2)
@given(seed=st.integers(0, 10**6), batched=st.booleans())
def test_cached_decoding_equals_recomputation(name, attention, seed, batched):
    family, model = FAMILIES[name], model_of(name, attention)
    inputs = inputs_of(name) if batched else inputs_of(name, sizes=(SIZES[1],))
    script, start = script_of(name, inputs, seed), inputs["input_ids"].shape[1]
    with tokenprune.prune(model, script):
        pruned = model.generate(**inputs, **OPTIONS)
    longer = grown(inputs, pruned.sequences[:, start:])
    layout = SequenceLayout.from_mask(grown_mask(layout_of(name, inputs), longer), longer["attention_mask"])
    with torch.no_grad(), oracle(family.decoder(model), layout, script):
        expected = model(**longer, use_cache=False).logits
    for step, logits in enumerate(pruned.logits):
        assert (logits - expected[:, start - 1 + step]).abs().max() < TOLERANCE


@pytest.mark.parametrize("name", [name for name in NAMES if name not in OTHERWISE_WITH_A_STATIC_CACHE])
@attentions
@settings(deadline=None, max_examples=2)
@given(seed=st.integers(0, 10**6))
def test_decoding_with_a_static_cache_equals_cached_decoding(name, attention, seed):
    model, inputs = model_of(name, attention), inputs_of(name)
    with tokenprune.prune(model, script_of(name, inputs, seed)):
        expected = model.generate(**inputs, **OPTIONS)
        got = model.generate(**inputs, **OPTIONS, cache_implementation="static")
    assert torch.equal(got.sequences, expected.sequences)
    assert all((a - b).abs().max() < TOLERANCE for a, b in zip(got.logits, expected.logits, strict=True))


@RECOMPUTES
@names
@attentions
@settings(deadline=None, max_examples=2)
@given(seed=st.integers(0, 10**6), batched=st.booleans())
def test_decoding_without_a_cache_equals_cached_decoding(name, attention, seed, batched):
    """Every step is a prefill of a longer prompt."""
    if reason := generates_otherwise(name, {"use_cache": False}):
        pytest.skip(reason)
    model = model_of(name, attention)
    inputs = inputs_of(name) if batched else inputs_of(name, sizes=(SIZES[1],))
    script = script_of(name, inputs, seed)
    with tokenprune.prune(model, script):
        pruned = model.generate(**inputs, **OPTIONS)
        again = model.generate(**inputs, **OPTIONS, use_cache=False)
    assert torch.equal(again.sequences, pruned.sequences)
    assert all((a - b).abs().max() < TOLERANCE for a, b in zip(again.logits, pruned.logits, strict=True))


@names
@settings(deadline=None, max_examples=2)
@given(seed=st.integers(0, 10**6))
def test_a_row_in_a_batch_equals_the_row_alone(name, seed):
    family, model, inputs = FAMILIES[name], model_of(name), inputs_of(name)
    script, layout = script_of(name, inputs, seed), layout_of(name, inputs)
    with torch.no_grad(), tokenprune.prune(model, script):
        together = model(**inputs).logits
    for row, size in enumerate(SIZES[:1] if ROWS_DIFFER in KNOWN[model.config.model_type].limits else SIZES):
        alone = family.inputs([size], first=row)
        own = script.row(row, int(layout.counts[row]))
        with torch.no_grad(), tokenprune.prune(model, own):
            single = model(**alone).logits[0]
        assert (together[row, layout.valid[row]] - single).abs().max() < TOLERANCE


class Look(Scripted):
    """Shows the attention of the last row in the layer before each stage, and keeps what is there."""

    name = "look"

    def __init__(self, layers):
        super().__init__([])
        self.layers, self.seen = layers, {}

    def stages(self, shape):
        return [Stage(str(layer), layer + 1, reads=AttentionFrom("last")) for layer in self.layers]

    def choose(self, stage, tokens):
        self.seen[stage.layer - 1] = tokens.attention
        return Keep.where(tokens.active)


@names
@attentions
@pytest.mark.parametrize("padding", ["left", "right"])
def test_attention_that_strategies_read_is_what_eager_attention_computes(name, attention, padding):
    """With grouped heads, soft caps, sliding windows, padding and bidirectional blocks."""
    model = model_of(name, attention)
    layers = [layer for layer, attends_too in enumerate(attends(FAMILIES[name].decoder(model))) if attends_too]
    look = Look([layer for layer in layers if layer + 1 < LAYERS])
    inputs = inputs_of(name, padding=padding)
    layout = layout_of(name, inputs)
    with torch.no_grad():
        weights = model_of(name, "eager")(**inputs, output_attentions=True).attentions
        with tokenprune.prune(model, look):
            model(**inputs)
    last = torch.where(layout.valid, torch.arange(layout.valid.shape[1]), -1).amax(1)
    for layer, seen in look.seen.items():
        for row in range(2):
            expected = weights[layers.index(layer)].mean(1)[row, last[row], layout.image_tokens[row]]
            assert torch.allclose(seen[row, : len(expected)], expected, atol=1e-6)


@names
def test_kept_tokens_stand_at_the_positions_of_the_full_run(name):
    """Under multimodal rotary embeddings too: every layer gets the full run's tables at the tokens it still has."""
    model, inputs = model_of(name), inputs_of(name)
    decoder, layout = FAMILIES[name].decoder(model), layout_of(name, inputs)
    layers = decoder.layers
    numbers = [number for number, layer in enumerate(layers) if hasattr(layer, "self_attn")]
    tables: list[list[torch.Tensor]] = []

    def look(module, args, kwargs):
        given = kwargs["position_embeddings"]  # cos and sin, one complex table, or none
        both = [given] if isinstance(given, torch.Tensor) else given or ()
        tables.append([table.expand(*table.shape[:-3], 2, *table.shape[-2:]) for table in both])

    def watched(run):
        tables.clear()
        handles = [layers[n].self_attn.register_forward_pre_hook(look, with_kwargs=True) for n in numbers]
        run()
        for handle in handles:
            handle.remove()
        return list(tables)

    def forward():
        with torch.no_grad():
            model(**inputs)

    full = watched(forward)
    kept = Keep.where((layout.slots >= 0) & (torch.arange(layout.slots.shape[1]) % 3 == 1))
    with tokenprune.prune(model, Scripted([Step(2, kept)])):
        pruned = watched(forward)
    present = (layout.valid & ~layout.image_tokens) | (layout.image_tokens & (layout.image_tokens.cumsum(1) % 3 == 2))
    for layer, ours, theirs in zip(numbers, pruned, full, strict=True):
        for short, long in zip(ours, theirs, strict=True):
            if layer < 2:
                assert torch.equal(short, long)
                continue
            assert short.shape[-2] == int(present.sum(1).max())
            for row in range(2):
                expected = long[..., row, present[row], :]
                fillers = short.shape[-2] - expected.shape[-2]
                first = 0 if all(attends(decoder)) else fillers  # where fillers stand before the tokens
                assert torch.equal(short[..., row, first : first + expected.shape[-2], :], expected)


class Failing(Scripted):
    """Raises in its second stage."""

    def choose(self, stage, tokens):
        if stage.name == "1":
            raise ZeroDivisionError("on purpose")
        return super().choose(stage, tokens)


@names
def test_nothing_stays_on_the_model(name):
    model, inputs = FAMILIES[name].build(), inputs_of(name)
    with torch.no_grad():
        untouched = model(**inputs).logits  # transformers puts hooks of its own on towers at the first call
        before = traces_on(model)
        slots = layout_of(name, inputs).slots
        kept = Keep.where((slots >= 0) & (slots % 2 == 1))
        with tokenprune.prune(model, Scripted([Step(1, kept)])):
            assert not torch.equal(model(**inputs).logits, untouched)
        assert traces_on(model) == before
        failing = Failing([Step(1, kept), Step(2, kept)])
        with pytest.raises(Exception, match="on purpose"), tokenprune.prune(model, failing):
            model(**inputs)
        assert traces_on(model) == before
        assert torch.equal(model(**inputs).logits, untouched)
