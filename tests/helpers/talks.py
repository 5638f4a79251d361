"""Conversations in turns on one cache, on tiny decoders, and random turns for them."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from conversation_oracle import Turn, placed
from oracle_cases import LAYERS, MODELS, WIDTH
from torch import Tensor
from transformers import Qwen2Config, Qwen2ForCausalLM

from tokenprune.core.decisions import Keep
from tokenprune.core.layout import SequenceLayout
from tokenprune.core.reads import Read
from tokenprune.core.stage import Stage
from tokenprune.core.strategy import Strategy
from tokenprune.engine import PromptMasks
from tokenprune.engine.decoder import find_decoder
from tokenprune.engine.interface.bound_model import VisionCapture
from tokenprune.engine.run import PruningRun
from tokenprune.testing.scripted import Scripted, Step, random_script


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
