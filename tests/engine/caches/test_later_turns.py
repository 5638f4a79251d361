"""Images of later turns of a conversation, pruned by their own stages, against a masked full-length oracle."""

from __future__ import annotations

import copy
import random
from dataclasses import replace
from itertools import count

import pytest
import torch
from conversation_oracle import Turn, conversation, placed
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle_cases import CACHES, LAYERS, WIDTH, empty_cache
from talks import DECODERS, ByTurn, Conversation, odd, random_turn, two_turns
from torch import Tensor
from transformers import DynamicCache

import tokenprune as tp
from tokenprune.core.decisions import Keep
from tokenprune.core.layout import SequenceLayout
from tokenprune.cost import DecoderSpec, count_flops, flop_counter
from tokenprune.engine.decoder import find_decoder
from tokenprune.engine.run import PruningRun
from tokenprune.errors import InputError, PruningWarning, UnsupportedError
from tokenprune.testing.scripted import Scripted, Step

TOLERANCE = 2e-5


@settings(deadline=None, max_examples=60)
@given(
    st.sampled_from(sorted(DECODERS)),
    st.integers(0, 10**6),
    st.integers(1, 3),
    st.booleans(),
    st.sampled_from(["keep", "renumber", "mixed"]),
    st.sampled_from(CACHES),
)
def test_every_turn_is_pruned_as_the_oracle_says(kind, seed, batch, padding, positions, cache):
    """Images, decoded tokens and text in turns: the same as one run over all of it, each turn with its own masks."""
    model, draw = DECODERS[kind], random.Random(seed)
    images = [draw.random() < 0.8, False, True, False, draw.random() < 0.5, False]
    turns = placed([random_turn(draw, batch, padding, positions, *turn) for turn in zip(images, count(), strict=False)])
    valid = torch.cat([turn.layout.valid for turn in turns], 1)
    ids = (valid.long().cumsum(1) - 1).clamp(min=0) if padding else torch.arange(valid.shape[1]).expand(batch, -1)
    embeds = torch.randn(*valid.shape, WIDTH, generator=torch.Generator().manual_seed(seed))
    expected = conversation(model.model, embeds, turns, ids)
    store = empty_cache(cache, model, valid.shape[1] + draw.randint(0, 3))
    talk = Conversation(model, ByTurn(), store, padding)
    with torch.no_grad(), talk.run.attached():
        for turn in turns:
            got = talk.say(turn, embeds, ids)
            wanted = expected[:, turn.start : turn.end]
            assert (got - wanted)[turn.layout.valid].abs().max() < TOLERANCE
            if bool(turn.layout.counts.any()):
                trace = talk.run.trace
                assert torch.equal(trace.layout.image_tokens, turn.layout.image_tokens)
                entered = [list(entry.image) for entry in trace.ledger.entries]
                assert entered == [trace.active(layer).sum(1).tolist() for layer in range(LAYERS)]
        assert talk.cache.get_seq_length() == valid.shape[1]


# around a turn -------------------------------------------------------------------------------------------------------


def test_the_exact_flops_of_a_later_turn_are_those_that_ran():
    model, turns, embeds, ids = two_turns("keep", padding=False)
    turns[1].script = Scripted([Step(2, odd(turns[1]))])
    talk = Conversation(model, ByTurn(), DynamicCache(), padded=False)
    with torch.no_grad(), talk.run.attached():
        talk.say(turns[0], embeds, ids)
        with flop_counter() as counter:
            talk.say(turns[1], embeds, ids)
    assert count_flops(talk.run.trace.ledger, DecoderSpec.from_config(model.config)).total == counter.get_total_flops()


@pytest.mark.parametrize("kind", CACHES)
@pytest.mark.parametrize("pruned_at", [0, 1])
@pytest.mark.parametrize("layer", [0, 2, LAYERS - 1])
def test_a_turn_that_failed_can_be_said_again(layer, pruned_at, kind):
    """Also in the last layer, when all hold the turn: one that was pruned before layer 0 has the same length in all."""
    model, turns, embeds, ids = two_turns("keep", padding=False)
    turns[1].script = Scripted([Step(pruned_at, odd(turns[1]))])
    expected = conversation(model.model, embeds, turns, ids)[:, turns[1].start :]
    talk = Conversation(model, ByTurn(), empty_cache(kind, model, turns[1].end))
    with torch.no_grad(), talk.run.attached():
        talk.say(turns[0], embeds, ids)
        mask = talk.mask
        handle = model.model.layers[layer].mlp.register_forward_pre_hook(lambda *args: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            talk.say(turns[1], embeds, ids)
        handle.remove()
        assert talk.cache.get_seq_length() == turns[0].end
        talk.mask = mask
        assert (talk.say(turns[1], embeds, ids) - expected).abs().max() < TOLERANCE


def test_rows_of_a_cache_are_reordered_and_copied_between_turns():
    """As beam search and branches of a conversation do."""
    model, turns, embeds, ids = two_turns("renumber", padding=False)
    turns[1].script = Scripted([Step(1, odd(turns[1]), positions="renumber")])
    order = torch.tensor([1, 1])
    both = [Turn(_rows(turns[0].layout, order), turns[0].script.row(1, int(turns[0].layout.counts[1]))), turns[1]]
    both[0].script = _twice(both[0].script)
    swapped = torch.cat((embeds[order, : turns[0].end], embeds[:, turns[0].end :]), 1)
    expected = conversation(model.model, swapped, placed(both), ids)[:, turns[1].start :]
    talk = Conversation(model, ByTurn(), DynamicCache())
    with torch.no_grad(), talk.run.attached():
        talk.say(turns[0], embeds, ids)
        kept, mask = copy.deepcopy(talk.cache), talk.mask
        talk.cache.reorder_cache(order)
        first = talk.say(turns[1], embeds, ids)
        talk.cache, talk.mask = kept, mask
        second = talk.say(turns[1], embeds, ids)
    assert (first - expected).abs().max() < TOLERANCE
    plain = conversation(model.model, embeds, turns, ids)[:, turns[1].start :]
    assert (second - plain).abs().max() < TOLERANCE


def _rows(layout: SequenceLayout, order: Tensor) -> SequenceLayout:
    return SequenceLayout.from_mask(layout.image_tokens[order], layout.valid[order])


def _twice(script: Scripted) -> Scripted:
    steps = [replace(step, decision=Keep(step.decision.index.repeat(2, 1))) for step in script.steps]
    return Scripted(steps, positions=script.positions)


def test_a_static_cache_without_room_for_a_turn_is_refused_and_unchanged():
    model, turns, embeds, ids = two_turns("keep", padding=False)
    turns[1].script = Scripted([Step(1, odd(turns[1]))])
    length = turns[1].end
    talk = Conversation(model, ByTurn(), empty_cache("static", model, length - 1))
    with torch.no_grad(), talk.run.attached():
        talk.say(turns[0], embeds, ids)
        with pytest.raises(UnsupportedError, match=f"max_cache_len={length - 1}, but this call needs {length}"):
            talk.say(turns[1], embeds, ids)
        assert talk.cache.get_seq_length() == turns[0].end


@pytest.mark.parametrize("image", [True, False])
def test_a_turn_with_another_number_of_rows_is_refused_and_can_be_said_again(image):
    model, turns, embeds, ids = two_turns("keep", padding=False)
    turns[1].script = Scripted([Step(1, odd(turns[1]))] if image else [])
    if not image:
        turns[1].layout = SequenceLayout.from_mask(torch.zeros_like(turns[1].layout.image_tokens))
    expected = conversation(model.model, embeds, turns, ids)[:, turns[1].start :]
    row = Turn(_rows(turns[1].layout, torch.tensor([0])), turns[1].script, turns[1].start)
    talk = Conversation(model, ByTurn(), DynamicCache(), padded=False)
    with torch.no_grad(), talk.run.attached():
        talk.say(turns[0], embeds, ids)
        mask = talk.mask
        talk.mask = mask[:1]
        with pytest.raises(InputError, match="the KV cache has 2 rows, but the call that continues it has 1"):
            talk.say(row, embeds[:1], ids[:1])
        talk.mask = mask
        assert (talk.say(turns[1], embeds, ids) - expected).abs().max() < TOLERANCE


@pytest.mark.parametrize("kind", CACHES)
@pytest.mark.parametrize("rows", [1, 2])
def test_a_window_whose_tokens_are_all_lost_is_no_empty_cache(kind, rows):
    """A prompt that ends with more image tokens than the window has, all of them dropped from earlier layers too."""
    model, length = DECODERS["sliding", 2], 12
    tokens = torch.zeros(rows, length, dtype=torch.bool)
    tokens[0, 2:] = True
    kept = torch.full((rows, 1), -1)
    kept[0] = 0
    first = Turn(SequenceLayout.from_mask(tokens), Scripted([Step(2, Keep(kept), prune_earlier_caches=True)]))
    turns = placed([first, *(Turn(SequenceLayout.from_mask(tokens[:, :1]), Scripted([])) for _ in range(2))])
    embeds = torch.randn(rows, turns[-1].end, WIDTH, generator=torch.Generator().manual_seed(1))
    ids = torch.arange(turns[-1].end).expand(rows, -1)
    expected = conversation(model.model, embeds, turns, ids)
    talk = Conversation(model, ByTurn(), empty_cache(kind, model, turns[-1].end))
    with torch.no_grad(), talk.run.attached():
        for turn in turns:
            got = talk.say(turn, embeds, ids)
            assert (got - expected[:, turn.start : turn.end]).abs().max() < TOLERANCE


def test_a_strategy_that_prunes_nothing_only_counts(recwarn):
    model, turns, embeds, ids = two_turns("keep", padding=False)
    talk = Conversation(model, tp.strategy("none"), DynamicCache(), padded=False)
    with torch.no_grad(), talk.run.attached():
        got = [talk.say(turn, embeds, ids) for turn in turns]
    cache = DynamicCache()
    with torch.no_grad():
        plain = [
            model.model(inputs_embeds=embeds[:, turn.start : turn.end], past_key_values=cache).last_hidden_state
            for turn in turns
        ]
    assert all(torch.equal(*pair) for pair in zip(got, plain, strict=True))
    assert [turn.image for turn in talk.run.trace.ledger.later_turns] == [tuple(turns[1].layout.counts.tolist())]
    assert not [warning for warning in recwarn if issubclass(warning.category, PruningWarning)]


def test_marked_query_rows_are_of_the_first_prompt_so_that_later_images_are_kept():
    model, turns, embeds, ids = two_turns("keep", padding=False)
    script = ByTurn()
    talk = Conversation(model, script, DynamicCache(), padded=False)
    marked = torch.zeros_like(turns[0].layout.image_tokens)
    marked[:, 0] = True
    talk.run = PruningRun(find_decoder(model), script, talk.marks, queries={"seg": marked})
    with torch.no_grad(), talk.run.attached():
        talk.say(turns[0], embeds, ids)
        with pytest.warns(PruningWarning, match="kept whole in all layers, since query rows were marked"):
            talk.say(turns[1], embeds, ids)
