"""Decoders whose layers attend in chunks of positions, with layers without rotary embedding whose attention is scaled
by place, and complex rotary tables: Llama 4's."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle_cases import CACHES, LAYERS, WIDTH, random_layout
from transformers import DynamicCache, Llama4ForCausalLM, Llama4TextConfig, StaticCache

import tokenprune as tp
from tokenprune.core.decisions import Keep
from tokenprune.core.layout import SequenceLayout
from tokenprune.core.reads import AttentionFrom, LayerKeys, PositionKernel, RotaryTables
from tokenprune.core.stage import Stage
from tokenprune.engine import prune, shared_prefill
from tokenprune.errors import UnsupportedError
from tokenprune.testing.oracle import masked_full_length
from tokenprune.testing.scripted import Scripted, Step, random_script


def tiny(attention="sdpa", **changes):
    """Layers 1 and 3 have neither chunks nor rotary embedding; from place 3 on, their queries are scaled."""
    options = {"hidden_size": WIDTH, "intermediate_size": 24, "intermediate_size_mlp": 48, "num_hidden_layers": LAYERS}
    options |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "num_local_experts": 2}
    options |= {"no_rope_layer_interval": 2, "attention_chunk_size": 5, "floor_scale": 3, "attn_scale": 0.5}
    options |= {"interleave_moe_layer_step": 2, "vocab_size": 64, "initializer_range": 0.2, "pad_token_id": 0}
    config = Llama4TextConfig(**{**options, **changes})
    config._attn_implementation = attention
    torch.manual_seed(0)
    return Llama4ForCausalLM(config).eval()


MODELS = {attention: tiny(attention) for attention in ("sdpa", "eager")}
models, seeds = st.sampled_from(sorted(MODELS)), st.integers(0, 10**6)
policies = st.sampled_from(["keep", "renumber"])


def empty(cache, model, length):
    return DynamicCache(config=model.config) if cache == "dynamic" else StaticCache(model.config, max_cache_len=length)


def scripted(layout, seed, positions="keep"):
    return random_script(layout.slots >= 0, LAYERS, WIDTH, seed, positions=positions)


def embeddings(layout, seed, new=0):
    rows, length = layout.valid.shape
    return torch.randn(rows, length + new, WIDTH, generator=torch.Generator().manual_seed(seed))


@settings(deadline=None, max_examples=60)
@given(models, seeds, st.integers(1, 3), st.sampled_from(["none", "left", "right"]), policies)
def test_engine_equals_oracle(kind, seed, batch, padding, positions):
    model = MODELS[kind]
    layout, ids = random_layout(seed, batch, padding)
    embeds, script = embeddings(layout, seed), scripted(layout, seed, positions)
    mask = None if layout.valid.all() else layout.valid.long()
    with torch.no_grad(), prune(model, script, image_tokens=layout.image_tokens):
        output = model.model(inputs_embeds=embeds, attention_mask=mask, position_ids=ids).last_hidden_state
        expected = masked_full_length(model.model, embeds, layout, script, ids)
    assert (output - expected)[layout.valid].abs().max() < 2e-5


def test_keep_all_is_bit_identical():
    layout, ids = random_layout(5, 3, "left")
    inputs = {"inputs_embeds": embeddings(layout, 5), "attention_mask": layout.valid.long(), "position_ids": ids}
    script = Scripted([Step(layer, Keep.where(layout.slots >= 0)) for layer in range(LAYERS)])
    for model in MODELS.values():
        with torch.no_grad():
            untouched = model(**inputs).logits
            with prune(model, script, image_tokens=layout.image_tokens):
                assert torch.equal(model(**inputs).logits, untouched)


@settings(deadline=None, max_examples=60)
@given(models, seeds, st.sampled_from(["none", "left"]), policies, st.booleans(), st.sampled_from(CACHES))
def test_cached_decoding_equals_recomputation(kind, seed, padding, positions, stepwise, cache):
    model, new = MODELS[kind], 7  # into the next chunk
    layout, ids = random_layout(seed, 2, padding)
    length = layout.valid.shape[1]
    embeds, script = embeddings(layout, seed, new), scripted(layout, seed, positions)
    grown = SequenceLayout.from_mask(
        torch.cat((layout.image_tokens, torch.zeros(2, new, dtype=torch.bool)), 1),
        torch.cat((layout.valid, torch.ones(2, new, dtype=torch.bool)), 1),
    )
    every = torch.cat((ids, ids[:, -1:] + torch.arange(1, new + 1)), 1)
    mask = None if padding == "none" else grown.valid.long()
    past, got = empty(cache, model, length + new + 2), []
    ends = [length, *(range(length + 1, length + new + 1) if stepwise else [length + new])]
    with torch.no_grad(), prune(model, script, image_tokens=layout.image_tokens):
        expected = masked_full_length(model.model, embeds, grown, script, every)
        for start, stop in zip([0, *ends], ends, strict=False):
            output = model.model(
                inputs_embeds=embeds[:, start:stop],
                attention_mask=None if mask is None else mask[:, :stop],
                position_ids=every[:, start:stop],
                past_key_values=past,
                use_cache=True,
            )
            got.append(output.last_hidden_state)
    difference = (torch.cat(got, 1) - expected).abs()
    assert difference[grown.valid].max() < 2e-5


class Reading(Scripted):
    """Keeps what a script says, and what stages read."""

    name = "reading"

    def __init__(self, layer, read, kept):
        super().__init__([])
        self.layer, self.read, self.kept, self.seen = layer, read, kept, []

    def stages(self, shape):
        return [Stage("first", 1), Stage("read", self.layer, reads=self.read)]

    def choose(self, stage, tokens):
        if stage.name == "read":
            self.seen.append(getattr(tokens, self.read.field))
            return Keep.where(tokens.active)
        return self.kept


def read(model, layer, read_, kept, layout, embeds):
    strategy = Reading(layer, read_, kept)
    with torch.no_grad(), prune(model, strategy, image_tokens=layout.image_tokens):
        output = model.model(inputs_embeds=embeds, attention_mask=layout.valid.long()).last_hidden_state
    return strategy.seen[0], output


@pytest.mark.parametrize("layer", [1, 2])
@pytest.mark.parametrize("attention", sorted(MODELS))
def test_attention_that_is_read_is_that_of_the_layer(layer, attention):
    """Before the layer runs as in it, and whether its keys are handed on or not."""
    model = MODELS[attention]
    image = torch.zeros(2, 15, dtype=torch.bool)
    image[:, 4:13] = True
    valid = torch.ones(2, 15, dtype=torch.bool)
    valid[1, :3] = False
    layout = SequenceLayout.from_mask(image, valid)
    embeds = embeddings(layout, 11)
    kept = Keep.where((layout.slots >= 0) & (layout.slots % 3 != 0))
    ahead, output = read(model, layer, AttentionFrom("last", layer="next"), kept, layout, embeds)
    after, again = read(model, layer + 1, AttentionFrom("last"), kept, layout, embeds)
    assert torch.allclose(ahead, after, atol=1e-6)
    assert (output - again)[layout.valid].abs().max() < 1e-6


def test_tables_and_kernels_have_all_channels():
    model = MODELS["sdpa"]
    layout, _ = random_layout(11, 1, "none")
    embeds, every = embeddings(layout, 11), Keep.where(layout.slots >= 0)
    tables, _ = read(model, 2, RotaryTables(), every, layout, embeds)
    angles = layout.slots[..., None] / 500000.0 ** (torch.arange(0, 8, 2) / 8).repeat_interleave(2)
    assert torch.allclose(tables[:, :, 0], torch.stack((angles.cos(), angles.sin()), 2), atol=1e-5)
    kernel, _ = read(model, 2, PositionKernel("last"), every, layout, embeds)
    last = torch.tensor(layout.valid.shape[1] - 1)
    apart = (last - layout.slots)[..., None] / 500000.0 ** (torch.arange(0, 8, 2) / 8)
    assert torch.allclose(kernel[:, 0], 2 * apart.cos().sum(-1) * 8**-0.5, atol=1e-5)


def test_keys_do_not_depend_on_padding():
    model = tiny(floor_scale=100)  # else the model itself counts padding
    layout, _ = random_layout(3, 2, "left")
    embeds, every = embeddings(layout, 3), Keep.where(layout.slots >= 0)
    together, _ = read(model, 3, LayerKeys(), every, layout, embeds)
    for row in range(2):
        real = layout.valid[row]
        alone = SequenceLayout.from_mask(layout.image_tokens[row : row + 1, real])
        own = Keep.where(alone.slots >= 0)
        single, _ = read(model, 3, LayerKeys(), own, alone, embeds[row : row + 1, real])
        found = together[row][layout.slots[row] >= 0]
        assert torch.allclose(found, single[0], atol=1e-5)


def test_rows_that_begin_alike_are_computed_as_alone():
    model = tiny()
    ids = torch.arange(1, 25).reshape(2, 12)
    ids[1, :8] = ids[0, :8]
    valid = torch.ones(2, 12, dtype=torch.bool)
    with torch.no_grad():
        expected = model(ids).logits
        with shared_prefill(model, 8, valid):
            assert (model(ids).logits - expected).abs().max() < 1e-5


def test_checkpoints_of_scaled_attention_are_refused():
    model = tiny().train()
    model.gradient_checkpointing_enable()
    image = torch.zeros(1, 12, dtype=torch.bool)
    image[:, 2:8] = True
    kept = Scripted([Step(1, Keep.where(torch.arange(6)[None] % 2 == 0))])
    told = "strategy 'scripted': gradient checkpointing found .* scales its attention by place"
    with pytest.raises(UnsupportedError, match=told), prune(model, kept, image_tokens=image):
        model(torch.arange(1, 13)[None], use_cache=False)
    short = tiny(floor_scale=100).train()
    short.gradient_checkpointing_enable()
    with prune(short, kept, image_tokens=image):
        short(torch.arange(1, 13)[None], use_cache=False).logits.sum().backward()
    assert all(layer.self_attn.q_proj.weight.grad.any() for layer in short.model.layers)


def test_compiled_layers():
    model = tiny()
    ids = torch.arange(1, 25).reshape(2, 12)
    image = torch.zeros(2, 12, dtype=torch.bool)
    image[:, 2:8] = True
    strategy = tp.strategy("uniform", keep=0.5)
    with torch.no_grad(), prune(model, strategy, image_tokens=image):
        expected = model(ids).logits
    compiled = torch.compile(model, backend="eager")
    with torch.no_grad(), prune(compiled, strategy, image_tokens=image):
        assert (compiled(ids).logits - expected).abs().max() < 1e-5
