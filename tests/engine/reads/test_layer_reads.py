"""Values, unrotated attention, rotary tables and reads of plugins, against what the layers themselves are given."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reader_runs import LAYERS, WIDTH, Reader, batch, run
from torch.nn.functional import cosine_similarity

import tokenprune as tp
from tokenprune.core.reads import AttentionFrom, LayerRead, LayerValues, RotaryTables, TextValues
from tokenprune.core.reads.base import kinds_of_reads
from tokenprune.core.scheduling.plan import declared_ledger
from tokenprune.core.scorer import ScorerStrategy
from tokenprune.core.strategy import StrategyOptions
from tokenprune.cost import DecoderSpec, count_flops, flop_counter
from tokenprune.engine import prune
from tokenprune.errors import PluginError
from tokenprune.testing.kit.cases import Row, SyntheticBatch
from tokenprune.testing.kit.decoder_families import FAMILIES, model_of, stack_of
from tokenprune.testing.tiny_decoders import tiny_llama

QUICK = settings(deadline=None, max_examples=15)
seeds, paddings, policies = (
    st.integers(0, 10**6),
    st.sampled_from(["left", "right"]),
    st.sampled_from(["keep", "renumber"]),
)


def observed(strategy, seed, padding, layer, attention="sdpa"):
    """Run the strategy; also gives the model and the full-length states that enter a layer."""
    model, seen = tiny_llama(LAYERS, kv_heads=2, attention=attention, seed=seed), []
    embeds, image, mask, _ = batch(seed, padding)
    ids = (mask.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad(), prune(model, strategy, image_tokens=image) as found:
        model.model.layers[layer].register_forward_pre_hook(lambda module, args: seen.append(args[0]))
        model.model(inputs_embeds=embeds, attention_mask=mask, position_ids=ids)
    return model, seen[0], found.trace.layout


def present(layout, kept, row):
    """bool [S]: the positions of a row that take part."""
    positions = layout.valid[row] & ~layout.image_tokens[row]
    positions[layout.slots[row, kept[row]]] = True
    return positions


def unrotated(model, layer, states, keys_from, query):
    """float32 [keys]: attention of one row to some positions, by the layer's own projections, without rotation."""
    block = model.model.layers[layer]
    normed = block.input_layernorm(states)
    q = block.self_attn.q_proj(normed[query]).unflatten(-1, (4, 8))
    k = block.self_attn.k_proj(normed[keys_from]).unflatten(-1, (2, 8)).repeat_interleave(2, 1)
    return torch.einsum("hc,khc->hk", q, k).div(8**0.5).softmax(-1).mean(0)


@QUICK
@given(seeds, paddings, policies, st.sampled_from(["before", "next"]), st.sampled_from(["image", "all"]), st.booleans())
def test_attention_without_rotation(seed, padding, positions, layer, keys, eager):
    """Of layer 2, read after it or ahead of it; text before the image and after it is seen or not."""
    read = AttentionFrom("last", layer=layer, keys=keys, rotary=False)
    kept = batch(seed, padding)[3]
    kept[:, 0] = True
    strategy = Reader(kept, {3 if layer == "before" else 2: (read,)}, positions)
    with torch.no_grad():
        model, states, layout = observed(strategy, seed, padding, 2, "eager" if eager else "sdpa")
        (answers,) = strategy.found.values()
        for row in range(2):
            seen = present(layout, kept, row)
            if keys == "image":
                seen &= layout.image_tokens[row]
            numbers = seen.nonzero().flatten().tolist()
            last = int(layout.valid[row].nonzero().max())
            weights = dict(zip(numbers, unrotated(model, 2, states[row], seen, last), strict=True))
            for number in range(int(layout.counts[row])):
                slot = int(layout.slots[row, number])
                expected = weights[slot] if kept[row, number] else torch.tensor(float("-inf"))
                torch.testing.assert_close(answers[read][row, number], expected, atol=1e-5, rtol=1e-4)


@QUICK
@given(seeds, paddings, st.sampled_from(["mean", "each"]), st.sampled_from(["mean", "max"]))
def test_rotated_attention_among_image_tokens_is_the_share_of_them(seed, padding, heads, reduce):
    """A softmax over the image is the softmax over all, divided by the image's part of it, head by head."""
    whole, among = AttentionFrom("last", heads="each"), AttentionFrom("last", reduce, heads, keys="image")
    kept = batch(seed, padding)[3]
    kept[:, 0] = True
    strategy = Reader(kept, {3: (whole, among)})
    run(strategy, seed, padding)
    everything = strategy.found[3][whole].clamp(min=0)
    expected = everything / everything.sum(-1, keepdim=True)
    expected = expected if heads == "each" else expected.mean(1)
    taking_part = kept if heads == "mean" else kept[:, None].expand_as(expected)
    found = strategy.found[3][among]
    torch.testing.assert_close(found[taking_part], expected[taking_part], atol=1e-5, rtol=1e-4)
    assert (found[~taking_part] == float("-inf")).all()


def test_a_row_without_tokens_gives_no_nan():
    read = AttentionFrom("last", keys="image", rotary=False)
    kept = batch(0, "left")[3]
    kept[1] = False
    strategy = Reader(kept, {3: (read,)})
    run(strategy, 0, "left")
    assert (strategy.found[3][read][1] == float("-inf")).all()


@QUICK
@given(seeds, paddings)
def test_values_are_those_in_the_cache(seed, padding):
    kept = batch(seed, padding)[3]
    reads = [kind(heads) for kind in (LayerValues, TextValues) for heads in ("joint", "mean", "each")]
    strategy = Reader(kept, {3: tuple(reads)})
    _, output, found = run(strategy, seed, padding)
    cached, layout = output.past_key_values.layers[2].values.transpose(1, 2), found.trace.layout
    for row in range(2):
        places = present(layout, kept, row).nonzero().flatten().tolist()
        wanted = {place: cached[row, number] for number, place in enumerate(places)}
        for kind, slots in ((LayerValues, layout.slots[row]), (TextValues, layout.text_slots[row])):
            for number, slot in enumerate(slots.tolist()):
                each = wanted.get(slot, torch.zeros(2, 8))
                torch.testing.assert_close(strategy.found[3][kind("each")][row, number], each)
                torch.testing.assert_close(strategy.found[3][kind("joint")][row, number], each.flatten())
                torch.testing.assert_close(strategy.found[3][kind("mean")][row, number], each.mean(0))


@QUICK
@given(seeds, paddings, policies, st.booleans())
def test_rotary_tables_are_those_of_the_present_positions(seed, padding, positions, counted):
    """Also before the first layer, and where the model numbers padding too."""
    kept = batch(seed, padding)[3]
    strategy = Reader(kept, {3: (RotaryTables(),)}, positions)
    model, _, found = run(strategy, seed, padding, counted=counted)
    tables, layout = strategy.found[3][RotaryTables()], found.trace.layout
    assert tables.shape == (2, 10, 1, 2, 8)
    for row in range(2):
        counting = present(layout, kept, row) if positions == "renumber" else layout.valid[row]
        place = counting.long().cumsum(0) - 1
        for number, slot in enumerate(layout.slots[row].tolist()):
            if slot < 0 or not kept[row, number]:
                assert (tables[row, number] == 0).all()
                continue
            angles = (place[slot] * model.model.rotary_emb.inv_freq).repeat(2)
            expected = torch.stack([angles.cos(), angles.sin()])
            torch.testing.assert_close(tables[row, number, 0], expected, atol=1e-5, rtol=1e-4)


@dataclass(frozen=True)
class Likeness(LayerRead):
    """Cosine of each token's value, or of its unrotated key, and that of the last token."""

    field = "likeness"
    part: str = "value"

    def value(self, layer):
        states = getattr(layer, self.part).transpose(1, 2).flatten(2)
        last = layer.query_columns("last")[:, 0]
        assert layer.of_text(states).shape[:2] == layer.text_columns.shape
        return layer.of_image(cosine_similarity(states, states[torch.arange(len(last)), last][:, None], dim=-1))


@dataclass(frozen=True)
class UnrotatedLikeness(Likeness):
    rotary = False
    field = "unrotated_likeness"
    part: str = "key"


@dataclass(frozen=True)
class StateNorms(LayerRead):
    field = "state_norms"

    def value(self, layer):
        return layer.of_image(layer.states.norm(dim=-1))


@QUICK
@given(seeds, paddings, policies)
def test_reads_that_a_plugin_defines(seed, padding, positions):
    reads = (Likeness(), UnrotatedLikeness(), UnrotatedLikeness("value"), StateNorms())
    kept = batch(seed, padding)[3]
    strategy = Reader(kept, {3: reads}, positions)
    with torch.no_grad():
        model, states, layout = observed(strategy, seed, padding, 2)
        block = model.model.layers[2]
        normed = block.input_layernorm(states)
        parts = {"value": block.self_attn.v_proj(normed), "key": block.self_attn.k_proj(normed)}
    for row in range(2):
        last = int(layout.valid[row].nonzero().max())
        for number, slot in enumerate(layout.slots[row].tolist()):
            for read in reads:
                if not (slot >= 0 and kept[row, number]):
                    expected = torch.tensor(0.0)
                elif isinstance(read, StateNorms):
                    expected = states[row, slot].norm()
                else:
                    expected = cosine_similarity(parts[read.part][row, slot], parts[read.part][row, last], dim=0)
                torch.testing.assert_close(strategy.found[3][read][row, number], expected, atol=1e-5, rtol=1e-4)


@dataclass(frozen=True)
class Wrong(LayerRead):
    field = "wrong"
    what: str = "shape"

    def value(self, layer):
        if self.what == "raises":
            raise ValueError("no such layer")
        if self.what == "heads":
            return layer.of_image(layer.value.norm(dim=-1))
        if self.what in ("states", "value"):
            getattr(layer, self.what).mul_(2)
            return layer.of_image(layer.states)
        return layer.states if self.what == "shape" else "text"


@pytest.mark.parametrize(
    ("attributes", "message"),
    [
        ({}, "read Own sets no `field`; expected the name of its value in `tokens`, such as 'value_norms'"),
        ({"field": "my read"}, "read Own has field = 'my read'"),
        ({"field": 3}, "read Own has field = 3"),
        ({"field": "hidden"}, "field = 'hidden', which is that of HiddenStates"),
        ({"field": "some", "axis": 0}, "axis = 0; expected that of image tokens"),
    ],
)
def test_a_read_without_a_name_of_its_own_is_refused(attributes, message):
    with pytest.raises(PluginError, match=message):
        dataclass(frozen=True)(type("Own", (LayerRead,), attributes))()


def test_a_read_whose_field_is_no_text_is_not_among_the_known():
    named = type("Named", (LayerRead,), {"field": 3})
    assert named not in kinds_of_reads()


def test_a_read_named_as_an_attribute_of_tokens_is_refused():
    value = {"value": lambda self, layer: layer.of_image(layer.states)}
    named = dataclass(frozen=True)(type("Named", (LayerRead,), {"field": "active", **value}))
    with pytest.raises(PluginError, match=r"read Named: tokens\.active is something else; choose another `field`"):
        run(Reader(batch(0, "right")[3], {3: (named(),)}), 0, "right")


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("shape", r"strategy 'reader': read Wrong: value\(\) gave \[2, \d+, 32\]; expected \[batch = 2, N = 10, …\]"),
        ("text", r"read Wrong: value\(\) gave str; expected \[batch = 2, N = 10, …\], image tokens on axis 1"),
        ("heads", r"of_image\(\) was given \[2, 2, \d+\]; expected \[batch = 2, M = \d+, …\] \(move heads behind"),
        ("states", r"read Wrong: value\(\) modified layer\.states in place; work on layer\.states\.clone\(\)"),
        ("value", r"read Wrong: value\(\) modified layer\.value in place"),
        ("raises", r"strategy 'reader': read Wrong: value\(\) raised ValueError: no such layer"),
    ],
)
def test_wrong_values_are_refused(what, message):
    with pytest.raises(PluginError, match=message):
        run(Reader(batch(0, "right")[3], {3: (Wrong(what),)}), 0, "right")


def test_a_plugins_read_is_provided_by_every_decoder_and_named_where_it_was_not_declared():
    assert tp.Shape(4, 8, readable=frozenset({LayerRead})).offers(StateNorms)
    assert not tp.Shape(4, 8, readable=frozenset({LayerValues})).offers(StateNorms)
    strategy = Reader(batch(0, "right")[3], {3: (StateNorms(),)})
    run(strategy, 0, "right")
    with pytest.raises(PluginError, match=r"tokens\.likeness without declaring it; add Likeness\(\)"):
        _ = strategy.tokens.likeness


def test_what_is_computed_without_rotation_is_in_the_account():
    for reads in ({3: (AttentionFrom("last", rotary=False, keys="image"),)}, {3: (UnrotatedLikeness(),)}):
        model = tiny_llama(LAYERS, seed=1, kv_heads=2)
        embeds, image, _, kept = batch(1, "right")
        with flop_counter() as counter, torch.no_grad(), prune(model, Reader(kept, reads), image_tokens=image) as found:
            model.model(inputs_embeds=embeds)
        (ahead,) = found.trace.ledger.entries[2].ahead
        assert ahead.reused == ahead.keys == 10 + int(max(kept.sum(1) + torch.tensor([0, 4])))
        total = count_flops(found.trace.ledger, DecoderSpec.from_config(model.config)).total
        assert total == counter.get_total_flops()


@pytest.mark.parametrize("read", [AttentionFrom("last", rotary=False, keys="image"), UnrotatedLikeness(), Likeness()])
def test_the_declared_account_is_that_of_a_run(read):
    """Of one row on a plain decoder, whose layers take the keys that were computed ahead."""

    class Half(ScorerStrategy):
        name, reads = "half", (read,)

        class Options(StrategyOptions):
            layer: int = 3
            keep: float = 0.5

        def score(self, stage, tokens):
            return tokens.read(read)

    model, ids = tiny_llama(LAYERS, kv_heads=2), torch.arange(1, 21)[None]
    image = (torch.arange(20)[None] >= 4) & (torch.arange(20)[None] < 16)
    with torch.no_grad(), prune(model, Half(), image_tokens=image) as found:
        model(ids)
    declared = declared_ledger(Half(), tp.Shape(LAYERS, 12, 8))
    assert [entry.ahead for entry in declared.entries] == [entry.ahead for entry in found.trace.ledger.entries]


def test_a_query_that_sees_no_image_token_gives_no_nan():
    """As in a sliding window behind the image: nothing is attended to."""
    for family in ("sliding-window", "mixed-windows"):
        made = SyntheticBatch((Row(((2, 3),), 2, 20), Row(((3, 3),), 1, 9)), "left")
        exists = made.layout.slots >= 0
        for rotary in (True, False):
            read = AttentionFrom("last", keys="image", rotary=rotary)
            strategy = Reader(exists, {2: (read,)})
            ids = FAMILIES[family].positions(made)
            with torch.no_grad(), prune(model_of(family), strategy, image_tokens=made.layout.image_tokens):
                stack_of(model_of(family))(inputs_embeds=made.embeds(WIDTH), attention_mask=made.mask, position_ids=ids)
            assert (strategy.found[2][read][exists] == 0).all()


@pytest.mark.parametrize("padding", ["left", "right"])
def test_rotary_tables_of_several_axes_have_all_channels_of_each(padding):
    """Also where the model joins them into one table."""
    made = SyntheticBatch((Row(((3, 4),), 2, 5), Row(((4, 2), (2, 2)), 3, 1)), padding)
    model, exists = model_of("mrope"), made.layout.slots >= 0
    kept = exists & (torch.arange(exists.shape[1]) != 3)
    strategy, ids = Reader(kept, {3: (RotaryTables(),)}), made.positions_3d
    ids = ids + (0 if padding == "left" else 4)  # positions count from the row's first token
    with torch.no_grad(), prune(model, strategy, image_tokens=made.layout.image_tokens):
        model(inputs_embeds=made.embeds(WIDTH), attention_mask=made.mask, position_ids=ids)
    tables = strategy.found[3][RotaryTables()]
    assert tables.shape == (*exists.shape, 3, 2, 8)
    for row, number in kept.nonzero().tolist():
        first = ids[:, row, made.layout.valid[row].nonzero()[0, 0]]
        places = ids[:, row, made.layout.slots[row, number]] - first
        angles = (places[:, None] * model.rotary_emb.inv_freq).repeat(1, 2)
        expected = torch.stack([angles.cos(), angles.sin()], 1)
        torch.testing.assert_close(tables[row, number], expected, atol=1e-5, rtol=1e-4)
    assert (tables[~kept] == 0).all()
