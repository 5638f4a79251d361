"""What a strategy reads in a later turn of a conversation: attention over the earlier tokens too, its own keys."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conversation_oracle import Turn, conversation
from talks import ByTurn, Conversation, two_turns
from torch import Tensor
from transformers import DynamicCache
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from tokenprune.core.decisions import Keep
from tokenprune.core.reads import AttentionFrom, LayerKeys, Read
from tokenprune.core.stage import Stage


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
