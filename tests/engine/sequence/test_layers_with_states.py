"""Decoders some of whose layers keep a state instead of keys: Qwen3.5's gated delta net, LFM2's short convolutions.

A stage shortens the sequence for all later layers; such a layer runs over what is left, in order.
"""

from __future__ import annotations

import copy
import threading

import pytest
import torch
from gathered_oracle import gathered
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle_cases import CACHES, LAYERS, WIDTH, random_layout
from transformers import (
    DynamicCache,
    Lfm2Config,
    Lfm2ForCausalLM,
    Lfm3Config,
    Lfm3ForCausalLM,
    LlamaConfig,
    Qwen3_5ForCausalLM,
    Qwen3_5TextConfig,
    StaticCache,
)

import tokenprune as tp
from tokenprune.core.decisions import Keep
from tokenprune.core.layout import SequenceLayout
from tokenprune.core.reads import AttentionFrom, HiddenStates, LayerKeys, RotaryTables
from tokenprune.core.stage import Stage
from tokenprune.cost import DecoderSpec
from tokenprune.engine import prune, shared_prefill
from tokenprune.errors import IncompatibleError, InputError, UnsupportedError
from tokenprune.testing.oracle import masked, masked_full_length
from tokenprune.testing.scripted import Scripted, Step, random_script
from tokenprune.testing.tiny_decoders import tiny_llama

SIZES = {
    "hidden_size": WIDTH,
    "intermediate_size": 48,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 64,
    "pad_token_id": 0,
    "initializer_range": 0.2,
}


def delta_net(attention="sdpa"):
    config = Qwen3_5TextConfig(
        **{**SIZES, "initializer_range": 0.1},  # more, and the norm of its small outputs amplifies rounding
        head_dim=8,
        layer_types=["linear_attention", "full_attention"] * 2,
        linear_key_head_dim=8,
        linear_value_head_dim=8,
        linear_num_key_heads=2,
        linear_num_value_heads=4,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    )
    config._attn_implementation = attention
    torch.manual_seed(0)
    return Qwen3_5ForCausalLM(config).eval()


def convolutions(attention="sdpa", **changes):
    config = Lfm2Config(
        **SIZES, layer_types=["conv", "full_attention", "conv", "full_attention"], block_multiple_of=8, **changes
    )
    config._attn_implementation = attention
    torch.manual_seed(0)
    return Lfm2ForCausalLM(config).eval()


MODELS = {
    f"{name}-{attention}": make(attention)
    for name, make in (("delta", delta_net), ("conv", convolutions))
    for attention in ("sdpa", "eager")
}
models, seeds = st.sampled_from(sorted(MODELS)), st.integers(0, 10**6)
policies = st.sampled_from(["keep", "renumber"])
each = pytest.mark.parametrize("name", ["delta-sdpa", "conv-sdpa"])
IDS = torch.arange(1, 25).reshape(2, 12)
IMAGE = torch.zeros(2, 12, dtype=torch.bool)
IMAGE[:, 2:8] = True
RAGGED = Keep.where(torch.tensor([[True, False, True, False, True, False], [False] * 5 + [True]]))


def halved(layer=1):
    return Scripted([Step(layer, RAGGED)])


def scripted(layout, seed, positions="keep"):
    return random_script(layout.slots >= 0, LAYERS, WIDTH, seed, positions=positions)


def embeddings(layout, seed, new=0):
    rows, length = layout.valid.shape
    return torch.randn(rows, length + new, WIDTH, generator=torch.Generator().manual_seed(seed))


def empty(cache, model, length):
    return DynamicCache(config=model.config) if cache == "dynamic" else StaticCache(model.config, max_cache_len=length)


@pytest.fixture(autouse=True)
def _without_gradients():
    with torch.no_grad():
        yield


def test_the_oracle_is_the_masked_one_where_every_layer_attends():
    model = tiny_llama(LAYERS)
    model.config.layer_types = ["full_attention"] * LAYERS
    for seed in range(5):
        layout, ids = random_layout(seed, 2, "left")
        embeds = embeddings(layout, seed)
        for positions in ("keep", "renumber"):
            script = scripted(layout, seed, positions)
            with gathered(model.model, layout, script):
                mask = layout.valid.long()
                ours = model.model(inputs_embeds=embeds, attention_mask=mask, position_ids=ids, use_cache=False)[0]
            expected = masked_full_length(model.model, embeds, layout, script, ids)
            assert (ours - expected)[layout.valid].abs().max() < 2e-5


def test_the_masked_oracle_refuses_such_layers():
    layout, ids = random_layout(1, 2, "none")
    model, told = MODELS["conv-sdpa"].model, "layers of type conv, from which no mask hides a token"
    with pytest.raises(InputError, match=told):
        masked_full_length(model, embeddings(layout, 1), layout, Scripted([]), ids)
    with pytest.raises(InputError, match=told), masked(model, layout, Scripted([])):
        pytest.fail("the context was opened")


@settings(deadline=None, max_examples=100)
@given(models, seeds, st.integers(1, 3), st.sampled_from(["none", "left", "right"]), policies)
def test_engine_equals_oracle(kind, seed, batch, padding, positions):
    model = MODELS[kind]
    layout, ids = random_layout(seed, batch, padding)
    inputs = {"inputs_embeds": embeddings(layout, seed), "position_ids": ids}
    inputs["attention_mask"] = None if layout.valid.all() else layout.valid.long()
    script = scripted(layout, seed, positions)
    with torch.no_grad():
        with prune(model, script, image_tokens=layout.image_tokens):
            output = model.model(**inputs).last_hidden_state
        with gathered(model.model, layout, script):
            expected = model.model(**inputs, use_cache=False).last_hidden_state
    assert (output - expected)[layout.valid].abs().max() < 2e-5


@pytest.mark.parametrize("name", sorted(MODELS))
@pytest.mark.parametrize("padding", ["none", "left", "right"])
def test_keep_all_is_bit_identical(name, padding):
    model = MODELS[name]
    layout, ids = random_layout(5, 3, padding)
    inputs = {"inputs_embeds": embeddings(layout, 5), "attention_mask": layout.valid.long(), "position_ids": ids}
    untouched = model(**inputs).logits
    script = Scripted([Step(layer, Keep.where(layout.slots >= 0)) for layer in range(LAYERS)])
    with prune(model, script, image_tokens=layout.image_tokens):
        assert torch.equal(model(**inputs).logits, untouched)


@settings(deadline=None, max_examples=100)
@given(models, seeds, st.sampled_from(["none", "left"]), policies, st.booleans(), st.sampled_from(CACHES))
def test_cached_decoding_equals_recomputation(kind, seed, padding, positions, stepwise, cache):
    model, new = MODELS[kind], 4
    layout, ids = random_layout(seed, 2, padding)
    length = layout.valid.shape[1]
    embeds, script = embeddings(layout, seed, new), scripted(layout, seed, positions)
    grown = SequenceLayout.from_mask(
        torch.cat((layout.image_tokens, torch.zeros(2, new, dtype=torch.bool)), 1),
        torch.cat((layout.valid, torch.ones(2, new, dtype=torch.bool)), 1),
    )
    every = torch.cat((ids, ids[:, -1:] + torch.arange(1, new + 1)), 1)
    mask = None if padding == "none" else grown.valid.long()
    with torch.no_grad():
        with gathered(model.model, grown, script):
            expected = model.model(
                inputs_embeds=embeds, attention_mask=mask, position_ids=every, use_cache=False
            ).last_hidden_state
        past, got = empty(cache, model, length + new + 2), []
        ends = [length, *(range(length + 1, length + new + 1) if stepwise else [length + new])]
        with prune(model, script, image_tokens=layout.image_tokens):
            for start, stop in zip([0, *ends], ends, strict=False):
                output = model.model(
                    inputs_embeds=embeds[:, start:stop],
                    attention_mask=None if mask is None else mask[:, :stop],
                    position_ids=every[:, start:stop],
                    past_key_values=past,
                    use_cache=True,
                )
                got.append(output.last_hidden_state)
            assert past.get_seq_length() == length + new
    assert (torch.cat(got, 1) - expected)[grown.valid].abs().max() < 2e-5


@each
@pytest.mark.parametrize("layer", [1, 2])
def test_a_row_in_a_batch_equals_the_row_alone(name, layer):
    """Rows keep different numbers of tokens, so that all but the longest have fillers, also where a state is kept."""
    model = MODELS[name]
    with prune(model, halved(layer), image_tokens=IMAGE):
        together = model.generate(IDS, max_new_tokens=5, do_sample=False, eos_token_id=None)
    for row in range(2):
        own = halved(layer).row(row, 6)
        with prune(model, own, image_tokens=IMAGE[row : row + 1]):
            alone = model.generate(IDS[row : row + 1], max_new_tokens=5, do_sample=False, eos_token_id=None)
        assert torch.equal(together[row], alone[0])


def test_biases_that_padding_would_bring_into_a_state_are_refused():
    biased = convolutions(conv_bias=True)
    told = "layer 2 of Lfm2Model adds biases to padding, .* call the model row by row"
    with pytest.raises(UnsupportedError, match=told), prune(biased, halved(), image_tokens=IMAGE):
        biased(IDS)
    with prune(biased, halved().row(0, 6), image_tokens=IMAGE[:1]):
        biased(IDS[:1])
    even = Scripted([Step(1, Keep.where(torch.arange(6).expand(2, -1) < 3))])
    with prune(biased, even, image_tokens=IMAGE):
        biased(IDS)


# reads ---------------------------------------------------------------------------------------------------------------


def test_strategies_that_read_the_attention_of_such_a_layer_are_refused_by_name():
    model = MODELS["delta-sdpa"]
    told = (
        "strategy 'fastv' is incompatible with model 'Qwen3_5ForCausalLM': stage '.*' at layer 1 reads AttentionFrom "
        "of layer 0, which keeps a state instead; only layers 1 and 3 attend to the sequence: let the stage begin at "
        "layer 2"
    )
    strategy = tp.strategy("fastv", layer=1, keep=0.5)
    with pytest.raises(IncompatibleError, match=told), prune(model, strategy, image_tokens=IMAGE):
        pytest.fail("the context was opened")
    found = tp.compatible(strategy, model)
    assert not found
    assert "keeps a state" in found.reason
    assert tp.compatible(tp.strategy("fastv", layer=2, keep=0.5), model)
    assert tp.compatible(tp.strategy("uniform", keep=0.5), model)


class Reading(Scripted):
    name = "reading"

    def __init__(self, *stages, kept=RAGGED):
        super().__init__([])
        self.all, self.kept, self.seen = stages, kept, {}

    def stages(self, shape):
        return self.all

    def choose(self, stage, tokens):
        self.seen[stage.name] = [getattr(tokens, read.field) for read in stage.reads]
        return self.kept if stage.name == "thin" else Keep.where(tokens.active)


@pytest.mark.parametrize(
    ("layer", "read"),
    [(1, AttentionFrom("last")), (2, AttentionFrom("last", layer="next")), (3, LayerKeys())],
)
def test_no_read_of_its_attention_passes(layer, read):
    model = MODELS["conv-sdpa"]
    told = f"'read' at layer {layer} reads {type(read).__name__} of layer .* only layers 1 and 3 attend"
    strategy = Reading(Stage("read", layer, reads=read))
    with pytest.raises(IncompatibleError, match=told), prune(model, strategy, image_tokens=IMAGE):
        pytest.fail("the context was opened")


def test_layers_without_rotary_tables_cannot_be_asked_for_them():
    layers = ["full_attention", "conv", "sliding_attention", "full_attention"]
    torch.manual_seed(0)
    model = Lfm3ForCausalLM(Lfm3Config(**SIZES, head_dim=8, layer_types=layers, sliding_window=6)).eval()
    told = (
        "layer 1 takes no rotary tables, so that RotaryTables cannot be read of it; let the stage begin at a layer that"
    )
    strategy = Reading(Stage("tables", 1, reads=RotaryTables()))
    with prune(model, strategy, image_tokens=IMAGE), pytest.raises(UnsupportedError, match=told):
        model(IDS)
    strategy = Reading(Stage("tables", 2, reads=RotaryTables()))
    with prune(model, strategy, image_tokens=IMAGE):
        model(IDS)
    assert strategy.seen["tables"][0].shape == (2, 6, 1, 2, 8)


def test_stages_that_depend_on_the_prompt_are_checked_when_it_is_known():
    class Late(Reading):
        def stages(self, shape):
            return [Stage("read", 1, reads=AttentionFrom("last"))] if shape.image_tokens == 6 else []

    model = MODELS["conv-sdpa"]
    with prune(model, Late(), image_tokens=IMAGE), pytest.raises(IncompatibleError, match="keeps a state instead"):
        model(IDS)


def test_caches_of_such_layers_lose_nothing_afterwards():
    model = MODELS["conv-sdpa"]
    told = "'prune' prunes the KV caches of layers 0 to 1, some of which keep a state, .* only layers 1 and 3 attend"
    strategy = Reading(Stage("prune", 2, prune_earlier_caches=True))
    with pytest.raises(IncompatibleError, match=told), prune(model, strategy, image_tokens=IMAGE):
        pytest.fail("the context was opened")
    allowed = Scripted([Step(2, RAGGED, prune_earlier_caches=True, caches_from=1)])
    with prune(model, allowed, image_tokens=IMAGE) as run:
        model(IDS)
    assert [entry.cached for entry in run.trace.ledger.entries] == [None, (3, 1), None, None]


@each
def test_what_is_read_of_attention_is_what_the_layers_compute(name):
    """Of the rows alone; before the layer as in it; and the other reads in layers that keep a state."""
    model = MODELS[name]
    stages = [
        Stage("thin", 0),
        Stage("tables", 0, reads=(RotaryTables(), HiddenStates())),
        Stage("ahead", 1, reads=AttentionFrom("last", layer="next")),
        Stage("back", 2, reads=(AttentionFrom("last"), HiddenStates())),
    ]
    together = Reading(*stages)
    with prune(model, together, image_tokens=IMAGE):
        model(IDS)
    (ahead,), (back, _) = together.seen["ahead"], together.seen["back"]
    assert torch.allclose(ahead, back, atol=1e-6)
    for row in range(2):
        alone = Reading(*stages, kept=RAGGED if row == 0 else Keep.where(torch.arange(6)[None] == 5))
        alone.kept = Keep.where(torch.tensor([[True, False] * 3] if row == 0 else [[False] * 5 + [True]]))
        with prune(model, alone, image_tokens=IMAGE[row : row + 1]):
            model(IDS[row : row + 1])
        for name_, values in alone.seen.items():
            for ours, theirs in zip(values, together.seen[name_], strict=True):
                assert torch.allclose(ours[0], theirs[row], atol=1e-5)


# caches --------------------------------------------------------------------------------------------------------------


@each
def test_beam_search_and_copies(name):
    model = MODELS[name]
    options = {"max_new_tokens": 4, "do_sample": False, "num_beams": 3, "eos_token_id": None}
    with prune(model, tp.strategy("random", keep=0.5), image_tokens=IMAGE):
        got = model.generate(IDS, **options)
        assert torch.equal(got, model.generate(IDS, **options, cache_implementation="static"))
        assert torch.equal(got, model.generate(IDS, **options, use_cache=False))
        past = model(IDS, use_cache=True).past_key_values
        twin = copy.deepcopy(past)
        expected = model(IDS[:, :3], past_key_values=past).logits
        assert torch.equal(model(IDS[:, :3], past_key_values=twin).logits, expected)


@each
def test_caches_without_states_are_refused(name):
    model = MODELS[name]
    other = DynamicCache(config=LlamaConfig(num_hidden_layers=LAYERS))
    with prune(model, halved(), image_tokens=IMAGE):
        for cache, told in ((DynamicCache(), "made one by one"), (other, "DynamicLayer")):
            with pytest.raises(UnsupportedError, match=rf"{told} .* DynamicCache\(config=model.config\)"):
                model(IDS, past_key_values=cache, use_cache=True)


@each
def test_an_emptied_cache_begins_anew(name):
    model = MODELS[name]
    with prune(model, halved(), image_tokens=IMAGE):
        expected = model(IDS).logits
        past = model(IDS, use_cache=True).past_key_values
        past.reset()
        assert torch.equal(model(IDS, past_key_values=past).logits, expected)


@each
def test_calls_that_fail_leave_no_state_behind(name):
    """A state cannot be told from that before: the call after a failed one is refused, or begins anew."""
    model = MODELS[name]
    layer = model.model.layers[1]
    with prune(model, halved(2), image_tokens=IMAGE):
        expected = model(IDS, use_cache=True)
        past = DynamicCache(config=model.config)
        hook = layer.register_forward_pre_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            model(IDS, past_key_values=past)
        hook.remove()
        assert torch.equal(model(IDS, past_key_values=past).logits, expected.logits)
        hook = layer.register_forward_pre_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            model(IDS[:, :1], past_key_values=past)
        hook.remove()
        with pytest.raises(UnsupportedError, match="a call that continued this KV cache failed"):
            model(IDS[:, :1], past_key_values=past)


@each
def test_calls_outside_of_the_context_are_refused_and_leave_no_state_behind(name):
    model = MODELS[name]
    with prune(model, halved(2), image_tokens=IMAGE, threads="own"):
        past = model(IDS, use_cache=True).past_key_values
        found = []

        def outside():
            try:
                with torch.no_grad():
                    model(IDS[:, :1], past_key_values=past)
            except UnsupportedError as error:
                found.append(str(error))

        thread = threading.Thread(target=outside)
        thread.start()
        thread.join()
        assert "the call that continues it is not pruned" in found[0]
        with pytest.raises(UnsupportedError, match="a call that continued this KV cache failed"):
            model(IDS[:, :1], past_key_values=past)


# other ways to run ---------------------------------------------------------------------------------------------------


@each
def test_rows_that_begin_alike_are_computed_whole(name):
    model = MODELS[name]
    ids = IDS.clone()
    ids[1, :8] = ids[0, :8]
    expected = model(ids).logits
    with shared_prefill(model, 8, torch.ones(2, 12, dtype=torch.bool)):
        assert torch.equal(model(ids).logits, expected)


@pytest.mark.parametrize("make", [delta_net, convolutions])
def test_compiled_layers(make):
    model = make()
    with prune(model, halved(), image_tokens=IMAGE):
        expected = model(IDS, use_cache=True)
        later = model(IDS[:, :1], past_key_values=expected.past_key_values).logits
    compiled = torch.compile(model, backend="eager")
    with prune(compiled, halved(), image_tokens=IMAGE):
        output = compiled(IDS, use_cache=True)
        assert (output.logits - expected.logits).abs().max() < 1e-5
        assert (compiled(IDS[:, :1], past_key_values=output.past_key_values).logits - later).abs().max() < 1e-5


@pytest.mark.parametrize("make", [delta_net, convolutions])
def test_gradient_checkpointing_gives_the_same_gradients(make):
    gradients = []
    for checkpoints in (False, True):
        model = make().train()
        if checkpoints:
            model.gradient_checkpointing_enable()
        with torch.enable_grad(), prune(model, halved(), image_tokens=IMAGE):
            model(IDS, use_cache=False).logits.sum().backward()
        gradients.append([parameter.grad for parameter in model.parameters() if parameter.grad is not None])
    assert all(torch.allclose(*pair, atol=1e-5) for pair in zip(*gradients, strict=True))


def test_costs_of_other_layers_are_not_estimated():
    with pytest.raises(UnsupportedError, match="layers of type conv found; the cost model counts attention"):
        DecoderSpec.from_config(MODELS["conv-sdpa"].config)
