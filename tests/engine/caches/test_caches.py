"""Caches know their prefill: conversations in turn, copies, cuts, other orders of rows, and what is refused."""

from __future__ import annotations

import copy
import pickle
from contextlib import suppress
from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from meetings import elsewhere
from oracle_cases import CACHES, LAYERS, MODELS, WIDTH, empty_cache, random_layout
from transformers import Cache

from tokenprune.core.decisions import Keep
from tokenprune.core.layout import SequenceLayout
from tokenprune.core.stage import Stage
from tokenprune.core.strategy import Strategy
from tokenprune.engine import prune
from tokenprune.engine.calls.interception import shadowed
from tokenprune.engine.decoder import find_decoder
from tokenprune.engine.interface.bound_model import VisionCapture
from tokenprune.engine.interface.prompt_masks import PromptMasks
from tokenprune.engine.run import PruningRun
from tokenprune.errors import UnsupportedError
from tokenprune.testing.oracle import masked_full_length
from tokenprune.testing.scripted import Scripted, Step, random_script
from tokenprune.testing.tiny_decoders import tiny_llama


class Turns(Strategy):
    """Answers by the script of the conversation whose prefill is under way."""

    name = "turns"
    now: Scripted

    def stages(self, shape):
        return self.now.stages(shape)

    def choose(self, stage, tokens):
        return self.now.choose(stage, tokens)


@dataclass
class Conversation:
    """What one cache should hold, told to the oracle as one long prompt."""

    layout: SequenceLayout
    script: Scripted
    embeds: torch.Tensor
    ids: torch.Tensor
    padded: bool
    cache: Cache

    @property
    def length(self):
        return self.embeds.shape[1]

    def grown(self, new):
        """The same with random text tokens behind it."""
        draw = torch.Generator().manual_seed(self.length)
        more = torch.randn(len(self.embeds), new, WIDTH, generator=draw)
        last = self.layout.valid.long().sum(1, keepdim=True) - 1
        ids = last + torch.arange(1, new + 1)
        ones = torch.ones(len(more), new, dtype=torch.bool)
        layout = SequenceLayout.from_mask(
            torch.cat((self.layout.image_tokens, ~ones), 1), torch.cat((self.layout.valid, ones), 1)
        )
        return replace(self, layout=layout, embeds=torch.cat((self.embeds, more), 1), ids=torch.cat((self.ids, ids), 1))

    def rows(self, rows):
        """The same of other batch rows."""
        layout = SequenceLayout.from_mask(self.layout.image_tokens[rows], self.layout.valid[rows])
        steps = []
        for step in self.script.steps:
            parts = {
                name: value[rows] for name, value in vars(step.decision).items() if isinstance(value, torch.Tensor)
            }
            steps.append(replace(step, decision=replace(step.decision, **parts)))
        script = Scripted(steps, positions=self.script.positions)
        return replace(self, layout=layout, script=script, embeds=self.embeds[rows], ids=self.ids[rows])

    def call(self, model, start):
        """The model's states for everything from `start` on, which go into the cache."""
        output = model.model(
            inputs_embeds=self.embeds[:, start:],
            attention_mask=self.layout.valid.long() if self.padded else None,
            position_ids=self.ids[:, start:] if self.padded else None,
            past_key_values=self.cache,
            use_cache=True,
        )
        self.cache = output.past_key_values
        return output.last_hidden_state

    def expected(self, model):
        return masked_full_length(model.model, self.embeds, self.layout, self.script, self.ids)


def conversation(seed, positions, model, cache):
    padding = ("none", "left", "right")[seed % 3]
    layout, ids = random_layout(seed, 1 + seed % 2, padding)
    script = random_script(layout.slots >= 0, LAYERS, WIDTH, seed, positions=positions)
    embeds = torch.randn(*layout.valid.shape, WIDTH, generator=torch.Generator().manual_seed(seed))
    room = embeds.shape[1] + MOST * LONGEST
    return Conversation(layout, script, embeds, ids, padding != "none", empty_cache(cache, model, room))


def check(model, positions, seeds, moves, cache="dynamic"):
    """Two conversations in one context, and what `moves` says: (kind, which conversation, number)."""
    talks = [conversation(seed, positions, model, cache) for seed in seeds]
    strategy = Turns()
    strategy.positions = positions
    strategy.now = talks[0].script
    pending = iter(talks)

    class Marked(VisionCapture):
        def prompt_masks(self, queries):
            now = next(pending)
            strategy.now = now.script
            return PromptMasks(now.layout.image_tokens)

        def provide(self, read):
            raise AssertionError(read)

    worst = 0.0
    with torch.no_grad(), PruningRun(find_decoder(model), strategy, Marked()).attached():
        prompts = [talk.length for talk in talks]
        for talk in talks:
            got = talk.call(model, 0)
            worst = max(worst, float((got - talk.expected(model))[talk.layout.valid].abs().max()))
        for kind, which, number in moves:
            which %= len(talks)
            talk = talks[which]
            if kind == "step":
                talks[which] = longer = talk.grown(number)
                got = longer.call(model, talk.length)
                worst = max(worst, float((got - longer.expected(model)[:, talk.length :]).abs().max()))
            elif kind == "fork":
                talks.append(replace(talk, cache=copy.deepcopy(talk.cache)))
                prompts.append(prompts[which])
            elif kind == "cut":
                number = min(number, talk.length - prompts[which])
                if number:  # to older releases 0 means that nothing stays
                    talk.cache.crop(-number)
                kept = talk.length - number
                layout = SequenceLayout.from_mask(talk.layout.image_tokens[:, :kept], talk.layout.valid[:, :kept])
                talks[which] = replace(talk, layout=layout, embeds=talk.embeds[:, :kept], ids=talk.ids[:, :kept])
            else:
                rows = torch.arange(len(talk.embeds)).roll(number)
                if kind == "repeat":
                    rows = rows.sort().values.repeat_interleave(2)
                    talk.cache.batch_repeat_interleave(2)
                elif kind == "select":
                    rows = rows[:1]
                    talk.cache.batch_select_indices(rows)
                else:
                    talk.cache.reorder_cache(rows)
                talks[which] = talk.rows(rows)
    return worst


MOVES = {
    "dynamic": ["step", "step", "step", "fork", "cut", "reorder", "repeat", "select"],
    "static": ["step", "step", "step", "fork", "reorder"],  # transformers' static caches know no others
}
MOST, LONGEST = 8, 3


def moves(cache):
    move = st.tuples(st.sampled_from(MOVES[cache]), st.integers(0, 5), st.integers(1, LONGEST))
    return st.tuples(st.just(cache), st.lists(move, min_size=2, max_size=MOST))


@settings(deadline=None, max_examples=80)
@given(
    st.sampled_from(sorted(MODELS)),
    st.lists(st.integers(0, 10**6), min_size=2, max_size=2),
    st.sampled_from(["keep", "renumber"]),
    st.sampled_from(CACHES).flatmap(moves),
)
def test_conversations_in_turn_equal_the_oracle(kind, seeds, positions, moves):
    cache, moves = moves
    assert check(MODELS[kind], positions, seeds, moves, cache) < 3e-5


HALF = Keep.where(torch.tensor([[True, False, True, False, True, False]] * 2))


class EverySecond(Strategy):
    """The same tokens whatever the states, so that recomputation prunes alike."""

    name = "every-second"

    def stages(self, shape):
        return [Stage("thin", 1)]

    def choose(self, stage, tokens):
        return Keep.where(tokens.exists & (torch.arange(tokens.exists.shape[1]) % 2 == 0))


@pytest.fixture(scope="module")
def model():
    return tiny_llama(4)


@pytest.fixture
def image():
    mask = torch.zeros(2, 12, dtype=torch.bool)
    mask[:, 2:8] = True
    return mask


IDS = torch.arange(24).reshape(2, 12)


def test_a_cache_from_elsewhere_is_refused_inside(model, image):
    with torch.no_grad():
        cache = model(IDS, use_cache=True).past_key_values
        with prune(model, Scripted([Step(1, HALF)]), image_tokens=image):
            with pytest.raises(UnsupportedError, match="already contains tokens from outside this pruning context"):
                model(IDS[:, :1], past_key_values=cache)
            other = model(IDS, use_cache=True).past_key_values
        with (
            prune(model, Scripted([Step(1, HALF)]), image_tokens=image),
            pytest.raises(UnsupportedError, match="not filled in this pruning context but in one that is closed"),
        ):
            model(IDS[:, :1], past_key_values=other)


def test_a_cache_from_elsewhere_is_as_good_where_nothing_is_pruned(model, image):
    with torch.no_grad():
        cache, other = (model(IDS, use_cache=True).past_key_values for _ in range(2))
        expected = model(IDS[:, :1], past_key_values=cache).logits
        with prune(model, Scripted([]), image_tokens=image):
            assert torch.equal(model(IDS[:, :1], past_key_values=other).logits, expected)


@pytest.mark.parametrize("copied", [copy.deepcopy, copy.copy], ids=["deep", "shallow"])
def test_copies_do_not_outlive_the_context(model, image, copied):
    with torch.no_grad():
        with prune(model, Scripted([Step(1, HALF)]), image_tokens=image):
            cache = copied(model(IDS, use_cache=True).past_key_values)
        with pytest.raises(UnsupportedError, match="context is closed"):
            model(IDS[:, :1], past_key_values=cache)


def test_a_pickled_cache_is_refused_inside_and_outside(model, image):
    with torch.no_grad():
        with prune(model, Scripted([Step(1, HALF)]), image_tokens=image):
            cache = pickle.loads(pickle.dumps(model(IDS, use_cache=True).past_key_values))
            with pytest.raises(UnsupportedError, match="then pickled and loaded, which detached it from its context"):
                model(IDS[:, :1], past_key_values=cache)
        with pytest.raises(UnsupportedError, match="then pickled and loaded, which detached it from its context"):
            model(IDS[:, :1], past_key_values=cache)


@pytest.mark.parametrize("layer", [0, 1, 3])
@pytest.mark.parametrize("new", [1, 3])
@pytest.mark.parametrize("who", ["another model", "another thread"])
def test_calls_that_are_not_pruned_are_refused_a_pruned_cache_and_do_it_no_harm(model, image, who, new, layer):
    other, draw = copy.deepcopy(model), torch.Generator().manual_seed(0)
    more = torch.randint(1, 64, (2, new), generator=draw)
    with torch.no_grad(), prune(model, Scripted([Step(layer, HALF)]), image_tokens=image, threads="own"):
        cache = model(IDS, use_cache=True).past_key_values
        expected = model(more, past_key_values=copy.deepcopy(cache)).logits

        @torch.no_grad()
        def call():
            return (other if who == "another model" else model)(more, past_key_values=cache)

        with pytest.raises(UnsupportedError, match="but the call that continues it is not pruned"):
            call() if who == "another model" else elsewhere(call)
        assert torch.equal(model(more, past_key_values=cache).logits, expected)


def test_a_layer_that_fails_leaves_no_leave_to_go_on(model, image):
    with torch.no_grad(), prune(model, Scripted([Step(0, HALF)]), image_tokens=image):
        cache = model(IDS, use_cache=True).past_key_values
        with shadowed(model.model.layers[0].self_attn, "forward", _fail), pytest.raises(ZeroDivisionError):
            model(IDS[:, :1], past_key_values=cache)
        with pytest.raises(UnsupportedError, match="is not pruned"):
            copy.copy(cache).layers[0].update(*torch.zeros(2, 2, 4, 1, 8))


@pytest.mark.parametrize("layer", range(LAYERS))
@pytest.mark.parametrize("steps", [[], [Step(0, HALF)], [Step(1, HALF)]], ids=["unpruned", "pruned", "some layers"])
def test_a_step_that_failed_is_not_in_a_growing_cache(model, image, layer, steps):
    """Behind the layer's attention, which has appended the new tokens, in the last layer too."""
    with torch.no_grad(), prune(model, Scripted(steps), image_tokens=image):
        cache = model(IDS, use_cache=True).past_key_values
        expected = model(IDS[:, :3], past_key_values=copy.deepcopy(cache)).logits
        with shadowed(model.model.layers[layer].mlp, "forward", _fail), pytest.raises(ZeroDivisionError):
            model(IDS[:, :3], past_key_values=cache)
        assert torch.equal(model(IDS[:, :3], past_key_values=cache).logits, expected)


def _fail(original, *args, **kwargs):
    raise ZeroDivisionError


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 10**6), st.integers(0, LAYERS - 1), st.sampled_from(CACHES))
def test_a_cache_of_a_prefill_that_failed_is_refused_or_as_good_as_new(seed, layer, kind):
    model = MODELS["sdpa", 2]
    talk = conversation(seed, "keep", model, kind)
    assume(talk.script.steps)  # else it is transformers' own matter
    with torch.no_grad(), prune(model, talk.script, image_tokens=talk.layout.image_tokens):
        with shadowed(model.model.layers[layer].self_attn, "forward", _fail), pytest.raises(ZeroDivisionError):
            talk.call(model, 0)
        got = None
        with suppress(UnsupportedError):
            got = talk.call(model, 0)
        assert got is None or (got - talk.expected(model))[talk.layout.valid].abs().max() < 2e-5


def test_a_prefix_is_used_again_by_copies(model, image):
    """The usual recipe: prefill once, and continue a copy for every question."""
    tails = [torch.tensor([[5, 6], [7, 8]]), torch.tensor([[9, 1], [2, 3]])]
    script = Scripted([Step(1, HALF)], positions="renumber")
    with torch.no_grad(), prune(model, script, image_tokens=image):
        prefix = model(IDS, use_cache=True).past_key_values
        got = [model(tail, past_key_values=copy.deepcopy(prefix)).logits for tail in tails]
        for tail, logits in zip(tails, got, strict=True):
            whole = model(torch.cat((IDS, tail), 1), use_cache=False).logits[:, 12:]
            assert (logits - whole).abs().max() < 2e-5


def test_layers_that_disagree_are_refused(model, image):
    with torch.no_grad(), prune(model, Scripted([Step(1, HALF)]), image_tokens=image):
        cache = model(IDS, use_cache=True).past_key_values
        cache.layers[0].keys, cache.layers[0].values = (part[..., :9, :] for part in (cache.layers[0].keys,) * 2)
        with pytest.raises(UnsupportedError, match=r"layers of the KV cache have 9, 12 tokens"):
            model(IDS[:, :1], past_key_values=cache)


@pytest.mark.parametrize("layer", [0, 1, 3])
@pytest.mark.parametrize("kind", sorted(MODELS))
def test_a_prefill_cannot_be_cut_in_any_layer(kind, image, layer):
    model = MODELS[kind]
    with torch.no_grad(), prune(model, Scripted([Step(layer, HALF)]), image_tokens=image):
        cache = model(IDS, use_cache=True).past_key_values
        expected = model(IDS[:, :2], past_key_values=copy.deepcopy(cache)).logits
        with pytest.raises(UnsupportedError, match="cannot crop the KV cache to 10 of 12 tokens"):
            cache.crop(-2)
        assert {layer.get_seq_length() for layer in cache.layers} == {12}
        assert torch.equal(model(IDS[:, :2], past_key_values=cache).logits, expected)
        with pytest.raises(UnsupportedError, match="cannot crop the KV cache to 11 of 14 tokens"):
            cache.crop(-3)
        cache.crop(-2)
        assert torch.equal(model(IDS[:, :2], past_key_values=cache).logits, expected)


def test_an_emptied_cache_is_a_new_one(model, image):
    with torch.no_grad():
        untouched = model(IDS, use_cache=True).past_key_values
        untouched.reset()
        if untouched.get_seq_length():
            pytest.skip("this release of transformers fills an emptied cache with zeros, pruned or not")
        with prune(model, Scripted([Step(1, HALF)]), image_tokens=image):
            cache = model(IDS, use_cache=True).past_key_values
            cache.reset()
            again = model(IDS, past_key_values=cache).logits
            assert (again - model(IDS).logits).abs().max() < 1e-6
            cache.reset()
        with prune(model, Scripted([]), image_tokens=image):
            first = model(IDS, past_key_values=cache).logits
        assert torch.equal(first, model(IDS).logits)
        assert torch.equal(
            model(IDS[:, :1], past_key_values=cache).logits,
            model(IDS[:, :1], past_key_values=model(IDS, use_cache=True).past_key_values).logits,
        )


@pytest.mark.parametrize("kind", sorted(MODELS))
def test_an_emptied_cache_is_a_new_one_outside_too(kind, image):
    model = MODELS[kind]
    with torch.no_grad():
        with prune(model, Scripted([Step(1, HALF)], positions="renumber"), image_tokens=image):
            cache = model(IDS, use_cache=True).past_key_values
        cache.reset()
        if cache.get_seq_length():
            pytest.skip("this release of transformers fills an emptied cache with zeros, pruned or not")
        longer = torch.cat((IDS, IDS.flip(0)), 1)
        again = [model(longer, past_key_values=cache).logits, model(IDS[:, :1], past_key_values=cache).logits]
        cache.crop(-1)
        again.append(model(IDS[:, :1], past_key_values=cache).logits)
        whole = model(torch.cat((longer, IDS[:, :1]), 1), use_cache=False).logits
        for got, expected in zip(again, (whole[:, :-1], whole[:, -1:], whole[:, -1:]), strict=True):
            assert (got - expected).abs().max() < 2e-5
        with (
            prune(model, Scripted([Step(1, HALF)]), image_tokens=image),
            pytest.raises(UnsupportedError, match="already contains tokens from outside this pruning context"),
        ):
            model(IDS[:, :1], past_key_values=cache)


@pytest.mark.parametrize("positions", ["keep", "renumber"])
@pytest.mark.parametrize("how", [{"num_beams": 3}, {"num_beams": 2, "num_return_sequences": 2}], ids=str)
def test_beams_equal_recomputation(model, image, positions, how):
    """Beam search reorders and repeats the cache's rows."""
    strategy = EverySecond()
    strategy.positions = positions
    settings = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "eos_token_id": None, **how}
    with torch.no_grad(), prune(model, strategy, image_tokens=image):
        got = model.generate(IDS, **settings)
        expected = model.generate(IDS, use_cache=False, **settings)
    assert torch.equal(got, expected)


@pytest.mark.parametrize("how", ["prompt_lookup_num_tokens", "assistant_model", "configured"])
def test_assisted_decoding_is_refused_where_anything_is_pruned(model, image, how):
    """Its first call holds guesses behind the prompt, so that they would be the row that attention is read from."""
    settings = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    config = copy.deepcopy(model.generation_config)
    config.prompt_lookup_num_tokens = 2
    asked = {"prompt_lookup_num_tokens": 2, "assistant_model": model, "configured": config}[how]
    extra = {"generation_config": asked} if how == "configured" else {how: asked}
    name = "prompt_lookup_num_tokens" if how == "configured" else how
    with torch.no_grad():
        expected = model.generate(IDS[:1], **settings, **extra)
        with (
            prune(model, EverySecond(), image_tokens=image[:1]),
            pytest.raises(UnsupportedError, match=f"{name} is not supported under"),
        ):
            model.generate(IDS[:1], **settings, **extra)
        if how != "assistant_model":
            with prune(model, Scripted([]), image_tokens=image[:1]):  # nothing is chosen, so nothing by guesses
                assert torch.equal(model.generate(IDS[:1], **settings, **extra), expected)
