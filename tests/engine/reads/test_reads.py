"""What stages can read of a decoder, against what the layers really compute."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reader_runs import LAYERS, Reader, batch, run

from tokenprune.core.decisions import Keep
from tokenprune.core.ledger import LookAhead
from tokenprune.core.reads import (
    AttentionFrom,
    Embeddings,
    HiddenStates,
    LayerKeys,
    PositionKernel,
    TextEmbeddings,
    TextKeys,
    TextStates,
)
from tokenprune.core.stage import Stage
from tokenprune.core.strategy import Strategy
from tokenprune.cost import DecoderSpec, count_flops, flop_counter
from tokenprune.engine import prune
from tokenprune.engine.interface.compatibility import compatible
from tokenprune.errors import IncompatibleError, PluginError
from tokenprune.testing.tiny_decoders import tiny_llama

QUICK = settings(deadline=None, max_examples=15)


@QUICK
@given(st.integers(0, 10**6), st.sampled_from(["left", "right"]), st.sampled_from(["sdpa", "eager"]))
def test_attention_computed_ahead_is_the_layers_own(seed, padding, attention):
    """Read ahead of layer 3, and read back out of it: the same, as long as the stage in between changes nothing."""
    ahead, back = AttentionFrom("last", layer="next"), AttentionFrom("last")
    for positions in ("keep", "renumber"):
        strategy = Reader(batch(seed, padding)[3], {3: (ahead,), 4: (back,)}, positions)
        run(strategy, seed, padding, attention)
        torch.testing.assert_close(strategy.found[3][ahead], strategy.found[4][back], atol=1e-5, rtol=1e-4)


@QUICK
@given(st.integers(0, 10**6), st.sampled_from(["left", "right"]))
def test_heads_and_query_rows_apart_come_together_as_the_mean(seed, padding):
    def rater(tokens):
        after = tokens.text & (tokens.images_before == tokens.counts[:, None])
        after[1, 8:] = False  # fewer in one row than in the other, also where that row is padded on the left
        return after

    reads = {
        (heads, how): AttentionFrom("raters", how, heads)
        for heads in ("mean", "each")
        for how in ("mean", "max", "each")
    }
    strategy = Reader(batch(seed, padding)[3], {2: tuple(reads.values())}, rater=rater)
    run(strategy, seed, padding)
    found = {kind: strategy.found[2][read] for kind, read in reads.items()}
    raters = torch.tensor([7, 6 if padding == "left" else 1])
    assert found["each", "each"].shape == (2, 4, 7, 10)
    for row, count in enumerate(raters.tolist()):
        apart = found["each", "each"][row, :, :count]
        torch.testing.assert_close(found["mean", "mean"][row], apart.mean((0, 1)))
        torch.testing.assert_close(found["mean", "max"][row], apart.mean(0).amax(0))
        torch.testing.assert_close(found["each", "mean"][row], apart.mean(1))
        torch.testing.assert_close(found["each", "max"][row], apart.amax(1))
        torch.testing.assert_close(found["mean", "each"][row, :count], apart.mean(0))
        rest = found["each", "each"][row, :, count:]
        assert ((rest == 0) | (rest == float("-inf"))).all()


@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize("how", ["mean", "max", "each"])
def test_padding_does_not_spoil_rows_that_have_fewer_query_rows(how, padding):
    """On the full sequence a missing query row is read at its first position, which on the left is padding."""

    def rater(tokens):
        return tokens.text & (tokens.text_places < torch.tensor([[3], [1]]))

    read = AttentionFrom("raters", how, "each")
    strategy = Reader(torch.arange(10) < torch.tensor([[10], [6]]), {2: (read,)}, rater=rater)
    run(strategy, 0, padding)
    assert not torch.isnan(strategy.found[2][read]).any()


@QUICK
@given(st.integers(0, 10**6), st.sampled_from(["left", "right"]))
def test_keys_are_those_in_the_cache(seed, padding):
    kept = batch(seed, padding)[3]
    strategy = Reader(kept, {3: (LayerKeys(), TextKeys(), LayerKeys(heads="mean"))})
    _, output, found = run(strategy, seed, padding, counted=True)
    keys, text = strategy.found[3][LayerKeys()], strategy.found[3][TextKeys()]
    torch.testing.assert_close(strategy.found[3][LayerKeys(heads="mean")], keys.unflatten(2, (2, 8)).mean(2))
    cached = output.past_key_values.layers[2].keys.transpose(1, 2).flatten(2)
    layout = found.trace.layout
    for row in range(2):
        present = layout.valid[row] & ~layout.image_tokens[row]
        present[layout.slots[row, kept[row]]] = True
        places = present.nonzero().flatten().tolist()
        wanted = {place: cached[row, number] for number, place in enumerate(places)}
        for number, slot in enumerate(layout.slots[row].tolist()):
            expected = wanted[slot] if slot in wanted else torch.zeros(16)
            torch.testing.assert_close(keys[row, number], expected)
        for number, slot in enumerate(layout.text_slots[row].tolist()):
            torch.testing.assert_close(text[row, number], wanted[slot] if slot >= 0 else torch.zeros(16))


@QUICK
@given(st.integers(0, 10**6), st.sampled_from(["left", "right"]))
def test_states_of_text_and_image_tokens(seed, padding):
    """A stage before the last layer sees what that layer is given; embeddings are what the decoder was given."""
    reads = (HiddenStates(), HiddenStates(True), TextStates(), TextStates(True), Embeddings(), TextEmbeddings())
    exists = torch.arange(10) < torch.tensor([[10], [6]])
    strategy = Reader(exists, {4: reads})
    model = tiny_llama(LAYERS, seed=seed)
    embeds, image, mask, _ = batch(seed, padding)
    seen = []
    with torch.no_grad(), prune(model, strategy, image_tokens=image):
        model.model.layers[4].register_forward_pre_hook(lambda module, args: seen.append(args[0]))
        model.model(inputs_embeds=embeds, attention_mask=mask)
    found, norm = strategy.found[4], model.model.norm
    for row in range(2):
        own, words = image[row], mask[row].bool() & ~image[row]
        count, total = int(own.sum()), int(words.sum())
        torch.testing.assert_close(found[HiddenStates()][row, :count], seen[0][row, own])
        torch.testing.assert_close(found[HiddenStates(True)][row, :count], norm(seen[0][row, own]))
        torch.testing.assert_close(found[TextStates()][row, :total], seen[0][row, words])
        torch.testing.assert_close(found[TextStates(True)][row, :total], norm(seen[0][row, words]))
        torch.testing.assert_close(found[Embeddings()][row, :count], embeds[row, own])
        torch.testing.assert_close(found[TextEmbeddings()][row, :total], embeds[row, words])
        places = mask[row].cumsum(0) - 1
        assert strategy.tokens.places[row, :count].tolist() == places[own].tolist()
        assert strategy.tokens.text_places[row, :total].tolist() == places[words].tolist()
        before = own.long().cumsum(0)[words]
        assert strategy.tokens.images_before[row, :total].tolist() == before.tolist()
        assert strategy.tokens.text[row].sum() == total


@pytest.mark.parametrize("positions", ["keep", "renumber"])
def test_position_kernel_is_that_of_ones(positions):
    kept = batch(0, "right")[3]
    strategy = Reader(kept, {2: (PositionKernel("last"),)}, positions)
    model, _, found = run(strategy, 0, "right")
    kernel, layout = strategy.found[2][PositionKernel("last")], found.trace.layout
    frequencies = model.model.rotary_emb.inv_freq
    size = model.config.head_dim
    for row in range(2):
        present = layout.valid[row] & ~layout.image_tokens[row]
        present[layout.slots[row, kept[row]]] = True
        place = present.long().cumsum(0) - 1 if positions == "renumber" else torch.arange(20)
        last = int(place[layout.valid[row].nonzero().max()])
        for number in kept[row].nonzero().flatten().tolist():
            distance = last - int(place[layout.slots[row, number]])
            expected = 2 / size**0.5 * torch.cos(distance * frequencies).sum()
            torch.testing.assert_close(kernel[row, 0, number], expected, atol=1e-5, rtol=1e-5)


def test_what_is_computed_ahead_is_in_the_account():
    strategy = Reader(batch(1, "right")[3], {3: (AttentionFrom("last", layer="next"),)})
    model = tiny_llama(LAYERS, seed=1, kv_heads=2)
    embeds, image, _, kept = batch(1, "right")
    with flop_counter() as counter, torch.no_grad(), prune(model, strategy, image_tokens=image) as run:
        model.model(inputs_embeds=embeds)
    width = 10 + int(max(kept.sum(1) + torch.tensor([0, 4])))
    assert run.trace.ledger.entries[3].ahead == (LookAhead(keys=width, queries=1, scored=1, reused=width),)
    assert count_flops(run.trace.ledger, DecoderSpec.from_config(model.config)).total == counter.get_total_flops()


def test_each_row_has_the_stage_that_was_declared_for_it():
    """With a budget, rows of different sizes are bound apart; the numbers that a stage carries are then the row's."""

    @dataclass(frozen=True)
    class Halves(Stage):
        left: int = 0

    class Halving(Reader):
        left = 0

        def bind(self, shape):
            bound = copy.copy(self)
            bound.left = shape.image_tokens // 2
            return bound

        def stages(self, shape):
            yield Halves("halve", 2, shape.image_tokens, left=self.left)

        def choose(self, stage, tokens):
            self.found["left"] = [own.left for own in tokens.stages]
            return Keep.where(tokens.active)

    strategy = Halving(None, {})
    run(strategy, 0, "right")
    assert strategy.found["left"] == [5, 3]


class ManyHeads(Strategy):
    """Does not fit models with fewer than 14 heads, and says so."""

    name = "many-heads"

    def stages(self, shape):
        if 0 < shape.heads < 14:
            raise IncompatibleError(
                f"'many-heads' needs 14 heads, and the model has {shape.heads} in {shape.layers} layers"
            )
        yield Stage("keep", 1, reads=(PositionKernel("last"),))

    def choose(self, stage, tokens):
        return Keep.where(tokens.active)


def test_what_a_strategy_says_of_a_model_is_said_before_anything_runs():
    model, called = tiny_llama(LAYERS), []
    model.model.register_forward_pre_hook(lambda module, args: called.append(module))
    found = compatible(ManyHeads(), model)
    assert found.reason == f"'many-heads' needs 14 heads, and the model has 4 in {LAYERS} layers"
    image = torch.ones(1, 3, dtype=torch.bool)
    with pytest.raises(IncompatibleError) as refusal, prune(model, ManyHeads(), image_tokens=image):
        model.model(torch.arange(4)[None])
    assert str(refusal.value) == found.reason
    assert called == []
    assert compatible(ManyHeads(), tiny_llama(LAYERS, heads=16)).runs


def test_position_kernel_is_not_offered_where_positions_have_several_axes():
    model = tiny_llama(LAYERS, heads=16)
    model.config.rope_parameters = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1]}
    found = compatible(ManyHeads(), model)
    assert found.missing == ("PositionKernel",)
    assert "that needs a rotary embedding of one axis" in found.reason


def test_reads_that_do_not_go_together_are_named():
    kept = batch(0, "right")[3]
    with pytest.raises(
        PluginError, match="AttentionFrom: reduce='sum' is not known; expected 'mean' or 'max' or 'each'"
    ):
        AttentionFrom("last", "sum")
    both = Reader(kept, {2: (AttentionFrom("last"), AttentionFrom("last", "max"))})
    run(both, 0, "right")
    with pytest.raises(PluginError, match=r"declares 2 reads that give tokens\.attention"):
        _ = both.tokens.attention
    with pytest.raises(PluginError, match="without declaring it"):
        both.tokens.read(LayerKeys())
