"""Images of later turns of a conversation, pruned by their own stages, against a masked full-length oracle."""

from __future__ import annotations

import copy
import random
from collections.abc import Mapping
from dataclasses import replace
from itertools import count
from typing import Any

import pytest
import torch
from conversation_oracle import Turn, conversation, placed
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle_cases import CACHES, LAYERS, MODELS, WIDTH, empty_cache
from torch import Tensor
from transformers import DynamicCache, Qwen2Config, Qwen2ForCausalLM
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

import tokenprune as tp
from tokenprune.core.decisions import Keep
from tokenprune.core.layout import SequenceLayout
from tokenprune.core.reads import AttentionFrom, LayerKeys, Read
from tokenprune.core.stage import Stage
from tokenprune.core.strategy import Strategy
from tokenprune.cost import DecoderSpec, count_flops, flop_counter
from tokenprune.engine import PromptMasks
from tokenprune.engine.decoder import find_decoder
from tokenprune.engine.interface.bound_model import VisionCapture
from tokenprune.engine.run import PruningRun
from tokenprune.errors import InputError, PruningWarning, UnsupportedError
from tokenprune.testing.scripted import Scripted, Step, random_script

TOLERANCE = 2e-5


def sliding() -> Any:
    """A decoder with windows of 5 tokens in every other layer."""
    sizes = {"hidden_size": WIDTH, "intermediate_size": 48, "num_hidden_layers": LAYERS, "vocab_size": 64}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    kinds = ["sliding_attention", "full_attention"] * 2
    torch.manual_seed(0)
    config = Qwen2Config(
        **sizes, **heads, use_sliding_window=True, sliding_window=5, layer_types=kinds, initializer_range=0.2
    )
    return Qwen2ForCausalLM(config).eval()


DECODERS = {**MODELS, ("sliding", 2): sliding()}


class ByTurn(Strategy):
    """The script of the current turn."""

    name = "by-turn"

    def __init__(self) -> None:
        super().__init__()
        self.script = Scripted([])

    def stages(self, shape: Any) -> Any:
        return self.script.stages(shape) or [Stage("nothing", 0)]

    def choose(self, stage: Stage, tokens: Any) -> Any:
        return Keep.where(tokens.active) if stage.name == "nothing" else self.script.choose(stage, tokens)


class Marks(VisionCapture):
    """The image tokens of the current turn."""

    turn: Turn
    mask: Tensor | None = None

    def prompt_masks(self, queries: Mapping[str, Tensor]) -> PromptMasks:
        return PromptMasks(self.turn.layout.image_tokens, queries, attention_mask=self.mask)

    def provide(self, read: Read) -> Any:
        raise AssertionError("nothing is offered")

    def later(self) -> Tensor:
        return self.turn.layout.image_tokens


class Conversation:
    """Turns on one cache, in one context."""

    def __init__(self, model: Any, strategy: Any, cache: Any, padded: bool = True) -> None:
        self.model, self.strategy, self.cache, self.marks = model, strategy, cache, Marks()
        self.run, self.padded = PruningRun(find_decoder(model), strategy, self.marks), padded
        self.mask: Tensor | None = None

    def say(self, turn: Turn, embeds: Tensor, ids: Tensor) -> Tensor:
        """The states of a turn, or of a decoded token."""
        valid = turn.layout.valid.long()
        grown = valid if self.mask is None else torch.cat((self.mask, valid), 1)
        self.marks.turn, self.marks.mask = turn, grown if self.padded else None
        if isinstance(self.strategy, ByTurn):
            self.strategy.script = turn.script
        where = slice(turn.start, turn.end)
        output = self.model.model(
            inputs_embeds=embeds[:, where],
            attention_mask=grown if self.padded else None,
            position_ids=ids[:, where] if self.padded else None,
            past_key_values=self.cache,
            use_cache=True,
        )
        self.mask = grown
        return output.last_hidden_state


def random_turn(
    draw: random.Random, batch: int, padding: bool, positions: str, image: bool = True, place: int = 0
) -> Turn:
    """Text, image tokens anywhere, and, where padded, padding before or behind them."""
    length = draw.randint(3, 9) if image else draw.randint(1, 2)
    seed = torch.Generator().manual_seed(draw.randrange(10**6))
    tokens = (torch.rand(batch, length, generator=seed) < 0.6) & image
    valid = torch.ones(batch, length, dtype=torch.bool)
    for row in range(batch):
        left = draw.randint(0, length - 2) if padding and image else 0
        valid[row, :left] = False
        tokens[row, left] = False  # text first
    if padding and place and batch > 1 and draw.random() < 0.2:
        valid[0] = False  # a row that says nothing in this turn
    layout = SequenceLayout.from_mask(tokens & valid, valid)
    script = random_script(layout.slots >= 0, LAYERS, WIDTH, draw.randrange(10**6))
    kinds = ("keep", "renumber") if positions == "mixed" else (positions,)
    steps = [replace(step, positions=draw.choice(kinds)) for step in script.steps]
    cut = [step.layer > 0 and draw.random() < 0.3 for step in steps]
    return Turn(
        layout, Scripted([replace(step, prune_earlier_caches=own) for step, own in zip(steps, cut, strict=True)])
    )


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


# what a strategy reads -----------------------------------------------------------------------------------------------


class Reads(ByTurn):
    """The script in the first turn; in later ones it keeps all, and stores what a stage at layer 2 reads."""

    def __init__(self, read: Read) -> None:
        super().__init__()
        self.read, self.answer = read, torch.empty(0)

    def stages(self, shape: Any) -> Any:
        return [*super().stages(shape), Stage("read", 2, reads=(self.read,))]

    def choose(self, stage: Stage, tokens: Any) -> Any:
        if stage.name != "read":
            return super().choose(stage, tokens)
        self.answer = tokens.read(self.read).clone()
        return Keep.where(tokens.active)


def odd(turn: Turn) -> Keep:
    """The image tokens at odd positions."""
    return Keep.where((turn.layout.slots >= 0) & (turn.layout.slots % 2 == 1))


def two_turns(positions: str, padding: bool) -> tuple[Any, list[Turn], Tensor, Tensor]:
    draw = random.Random(11)
    first = random_turn(draw, 2, padding, positions)
    first.script = Scripted([Step(1, odd(first), positions=positions)])
    second = random_turn(draw, 2, padding, positions)
    second.script = Scripted([])
    turns = placed([first, second])
    valid = torch.cat([turn.layout.valid for turn in turns], 1)
    ids = (valid.long().cumsum(1) - 1).clamp(min=0)
    return MODELS["eager", 2], turns, torch.randn(*valid.shape, WIDTH, generator=torch.Generator().manual_seed(3)), ids


def layer_of(model: Any, layer: int, turns: list[Turn], embeds: Tensor, ids: Tensor) -> tuple[Tensor, Tensor, Any]:
    """What enters a layer in the oracle, its attention weights, and the rotary tables that it is given."""
    seen: list[Any] = []
    handle = model.model.layers[layer].self_attn.register_forward_hook(
        lambda module, args, kwargs, output: seen.append((kwargs["hidden_states"], output[1], kwargs)), with_kwargs=True
    )
    with torch.no_grad():
        conversation(model.model, embeds, turns, ids)
    handle.remove()
    (normed, weights, kwargs) = seen[0]
    return normed, weights, kwargs["position_embeddings"]


def read_in_turn_two(model: Any, read: Read, turns: list[Turn], embeds: Tensor, ids: Tensor) -> Tensor:
    strategy = Reads(read)
    talk = Conversation(model, strategy, DynamicCache())
    with torch.no_grad(), talk.run.attached():
        for turn in turns:
            talk.say(turn, embeds, ids)
    return strategy.answer


@pytest.mark.parametrize("padding", [False, True])
@pytest.mark.parametrize("positions", ["keep", "renumber"])
@pytest.mark.parametrize("layer", ["before", "next"])
@pytest.mark.parametrize("keys", ["all", "image"])
def test_attention_of_a_later_turn_sees_the_earlier_ones(layer, positions, padding, keys):
    model, turns, embeds, ids = two_turns(positions, padding)
    found = read_in_turn_two(model, AttentionFrom("last", heads="each", layer=layer, keys=keys), turns, embeds, ids)
    _, weights, _ = layer_of(model, {"before": 1, "next": 2}[layer], turns, embeds, ids)
    second = turns[1].layout
    row = turns[1].start + second.query_rows("last")[:, 0]
    wanted = weights[torch.arange(2), :, row, turns[1].start :]  # [batch, heads, n]
    if keys == "image":
        wanted = wanted * second.image_tokens[:, None]
        wanted = wanted / wanted.sum(-1, keepdim=True)
    for batch_row in range(2):
        real = second.image_tokens[batch_row]
        torch.testing.assert_close(
            found[batch_row][:, : int(real.sum())], wanted[batch_row][:, real], atol=1e-5, rtol=1e-4
        )


@pytest.mark.parametrize("padding", [False, True])
@pytest.mark.parametrize("positions", ["keep", "renumber"])
def test_keys_of_a_later_turn_are_counted_from_its_first_token(positions, padding):
    model, turns, embeds, ids = two_turns(positions, padding)
    found = read_in_turn_two(model, LayerKeys(), turns, embeds, ids)
    normed, _, _ = layer_of(model, 1, turns, embeds, ids)
    own = turns[1].layout
    counted = (own.valid.long().cumsum(1) - 1).clamp(min=0)
    states = normed[:, turns[1].start :]
    with torch.no_grad():
        keys = model.model.layers[1].self_attn.k_proj(states).unflatten(-1, (2, -1)).transpose(1, 2)
        cos, sin = model.model.rotary_emb(states, counted)
        _, keys = apply_rotary_pos_emb(keys, keys, cos, sin)
    keys = keys.transpose(1, 2).flatten(2)
    for row in range(2):
        real = own.image_tokens[row]
        torch.testing.assert_close(found[row][: int(real.sum())], keys[row, real], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("positions", ["keep", "renumber"])
def test_attention_without_rotation_is_among_the_turns_own_tokens(positions):
    model, turns, embeds, ids = two_turns(positions, padding=False)
    read = AttentionFrom("last", heads="each", rotary=False)
    found = read_in_turn_two(model, read, turns, embeds, ids)
    normed, _, _ = layer_of(model, 1, turns, embeds, ids)
    attention, states = model.model.layers[1].self_attn, normed[:, turns[1].start :]
    with torch.no_grad():
        query = attention.q_proj(states[:, -1]).unflatten(-1, (4, -1))
        keys = attention.k_proj(states).unflatten(-1, (2, -1)).repeat_interleave(2, 2)
        weights = (torch.einsum("bhd,bnhd->bhn", query, keys) * attention.scaling).softmax(-1)
    for row, real in enumerate(turns[1].layout.image_tokens):
        torch.testing.assert_close(found[row][:, : int(real.sum())], weights[row][:, real], atol=1e-5, rtol=1e-4)


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
