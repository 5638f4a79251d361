"""Images of later turns: kept by a strategy that keeps all, to the bit, and pruned as masks say."""

from __future__ import annotations

import pytest
import torch
from vlm_cases import TOLERANCE, inputs_of, layout_of, model_of, names
from vlm_families import FAMILIES
from vlm_oracle import attends
from vlm_turns import later, thinned

import tokenprune
from tokenprune.core.decisions import Keep
from tokenprune.core.stage import Stage
from tokenprune.core.strategy import Strategy
from tokenprune.errors import IncompatibleError, InputError, OptionError, PruningWarning

STAGE = 1


class Alternate(Strategy):
    """Every second token, or all of them."""

    name = "alternate"

    def __init__(self, step: int) -> None:
        super().__init__()
        self._step = step

    def stages(self, shape):
        return [Stage("thin", STAGE)]

    def choose(self, stage, tokens):
        return Keep.where(tokens.active & (torch.arange(tokens.exists.shape[1]) % self._step == 0))


def turns_of(name):
    """Two prompts with images, the second as a turn after the first, and what it takes to continue."""
    first = inputs_of(name, sizes=((24, 32),))
    return first, later(model_of(name), first, FAMILIES[name].inputs([(32, 24)], seed=5))


def said(model, turns):
    """The logits of the second turn, on a cache that the first has filled."""
    cache = model(**turns[0], use_cache=True).past_key_values
    return model(**turns[1], past_key_values=cache, use_cache=True).logits


def unpruned(name, model, turns):
    try:
        return said(model, turns)
    except Exception as error:
        pytest.skip(f"{name} itself takes no images in a later turn: {type(error).__name__}: {str(error)[:80]}")


def present(layout):
    """What `Alternate(2)` leaves."""
    slots = torch.where(layout.image_tokens, layout.image_tokens.long().cumsum(1) - 1, 0)
    return layout.valid & ~(layout.image_tokens & (slots % 2 == 1))


@names
def test_keeping_all_of_a_later_turn_is_the_models_own_to_the_bit(name):
    model, turns = model_of(name), turns_of(name)
    with torch.no_grad():
        expected = unpruned(name, model, turns)
        with tokenprune.prune(model, Alternate(1)):
            if _whole(name, model):
                with pytest.warns(PruningWarning, match="kept whole in all layers, since some layers of this decoder"):
                    got = said(model, turns)
            else:
                got = said(model, turns)
    assert torch.equal(got, expected)


@names
def test_a_pruned_later_turn_is_as_masks_say(name):
    model, turns = model_of(name), turns_of(name)
    if _whole(name, model):
        pytest.skip(f"{name}'s images of later turns are kept whole")
    with torch.no_grad():
        unpruned(name, model, turns)
        decoder = FAMILIES[name].decoder(model)
        layouts = [layout_of(name, turns[0]), layout_of(name, FAMILIES[name].inputs([(32, 24)], seed=5))]
        left = torch.cat([present(layout) for layout in layouts], 1)
        with thinned(decoder, STAGE, left[:, : layouts[0].valid.shape[1]]):
            cache = model(**turns[0], use_cache=True).past_key_values
        with thinned(decoder, STAGE, left):
            expected = model(**turns[1], past_key_values=cache, use_cache=True).logits
        with tokenprune.prune(model, Alternate(2)) as run:
            got = said(model, turns)
    assert (got - expected).abs().max() < TOLERANCE
    assert torch.equal(run.trace.layout.image_tokens, layouts[1].image_tokens)
    assert run.trace.ledger.entries[-1].image == tuple(((layouts[1].counts + 1) // 2).tolist())


@pytest.mark.parametrize("strategy", sorted({*tokenprune.strategies()} - {"none"}))
def test_every_strategy_prunes_a_later_turn(strategy):
    """As far as it prunes the first one. The same method, options and budget."""
    model, turns = model_of("llava"), turns_of("llava")
    try:
        chosen = tokenprune.strategy(strategy, budget=0.5)
    except OptionError:
        chosen = tokenprune.strategy(strategy)
    try:
        with torch.no_grad(), tokenprune.prune(model, chosen) as run:
            cache = model(**turns[0], use_cache=True).past_key_values
            first = run.trace.ledger
            model(**turns[1], past_key_values=cache)
            later_ledger = run.trace.ledger
    except IncompatibleError as error:
        pytest.skip(str(error)[:160])
    assert later_ledger is not first
    assert later_ledger.image_tokens == first.image_tokens
    assert later_ledger.equivalent_tokens <= first.equivalent_tokens + 1
    cached = [image + other for e in first.entries for image, other in zip(e.in_cache, e.other, strict=True)]
    assert [entry.before for entry in later_ledger.entries] == cached


def test_positions_of_a_whole_conversation_are_refused_for_a_turn():
    """As Qwen2.5-VL makes them from the mask in a plain call, where it then fails without pruning."""
    model, (first, second) = model_of("qwen2_5_vl"), turns_of("qwen2_5_vl")
    del second["position_ids"]
    with (
        torch.no_grad(),
        tokenprune.prune(model, Alternate(1)),
        pytest.raises(InputError, match=r"position_ids: \d+ positions found for the \d+ tokens of a later turn"),
    ):
        said(model, (first, second))


@pytest.mark.parametrize("name", ["llava", "gemma3", "qwen2_5_vl"])
def test_generation_goes_on_in_a_later_turn(name):
    """As on the page of transformers' models: new ids and pixels, the mask of the whole conversation."""
    model, (first, second) = model_of(name), turns_of(name)
    second = {key: value for key, value in second.items() if key != "position_ids"}
    settings = {"max_new_tokens": 4, "do_sample": False, "return_dict_in_generate": True}

    def conversation():
        output = model.generate(**first, **settings)
        ids = torch.cat((output.sequences, second["input_ids"]), 1)
        new = ids[:, output.past_key_values.get_seq_length() :]
        types = {
            key: torch.nn.functional.pad(value, (new.shape[1] - value.shape[1], 0))
            for key, value in second.items()
            if key.endswith("token_type_ids")
        }
        turn = {**second, **types, "input_ids": new, "attention_mask": torch.ones_like(ids)}
        return model.generate(**turn, past_key_values=output.past_key_values, **settings).sequences

    with torch.no_grad():
        expected = conversation()
        with tokenprune.prune(model, Alternate(1)):
            assert torch.equal(conversation(), expected)
        with tokenprune.prune(model, Alternate(2)) as run:
            conversation()
    assert run.trace.ledger.entries[0].before > 0


def _whole(name, model):
    """Whether images of later turns are kept: layers keep a state, or scale queries by their place."""
    decoder = FAMILIES[name].decoder(model)
    return not all(attends(decoder)) or name == "llama4"
