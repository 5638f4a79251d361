"""Plain forwards, without position ids: padding before or behind a row changes nothing of what is chosen in it."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import pytest
import torch

import tokenprune as tp
from tokenprune.core.decisions import Keep
from tokenprune.core.reads import LayerKeys, TextKeys
from tokenprune.core.stage import Shape, Stage
from tokenprune.core.strategy import Strategy
from tokenprune.core.trace import Trace
from tokenprune.errors import IncompatibleError
from tokenprune.testing.kit.cases import Row, SyntheticBatch
from tokenprune.testing.kit.decoder_families import FAMILIES, WIDTH, model_of, stack_of
from tokenprune.testing.kit.synthetic_vision import synthetic_vision_of

BUILT_IN = [name for name, entry in tp.strategies().items() if entry.distribution == "tokenprune-vlm"]
BATCHES = [
    (Row(((4, 4),), 2, 9, seed=10 * n), Row(((3, 5), (2, 2)), 3, 3, seed=10 * n + 1), Row(((2, 6),), 1, 2, seed=n))
    for n in range(2)
]


@torch.no_grad()
def forward(family: str, rows: tuple[Row, ...], padding: str, strategy: Strategy) -> Trace:
    made, model = SyntheticBatch(rows, padding), model_of(family)
    marks: dict[str, Any] = {"image_tokens": made.layout.image_tokens, "grid": made.grid, "image_number": made.number}
    with tp.prune(model, strategy, vision=synthetic_vision_of(made, WIDTH), **marks) as run:
        stack_of(model)(inputs_embeds=made.embeds(WIDTH), attention_mask=made.mask, use_cache=False)
    return run.trace


@pytest.mark.parametrize("name", BUILT_IN)
def test_every_strategy_chooses_in_a_padded_row_as_in_the_row_alone(name: str) -> None:
    """With both paddings on every family; the two batches in turn."""
    strategy = tp.strategy(name, budget=None if name in ("none", "blind") else 0.5)
    ran = set()
    for number, family in enumerate(FAMILIES, BUILT_IN.index(name)):
        rows = BATCHES[number % len(BATCHES)]
        with suppress(IncompatibleError):  # positions of three axes
            alone = [forward(family, (row,), "left", strategy) for row in rows]
            for padding in ("left", "right"):
                trace = forward(family, rows, padding, strategy)
                for row, own in enumerate(alone):
                    assert [stage.kept[row] for stage in trace.stages_of(row)] == [s.kept[0] for s in own.stages]
            ran.add(family)
    assert ran >= {*FAMILIES} - {"mrope"}


class Keys(Strategy):
    """Drops every other image token at layer 2, reads keys at layer 4, and keeps copies of them."""

    name = "keys"

    def __init__(self, positions: Any = "keep") -> None:
        super().__init__()
        self.positions = positions

    def stages(self, shape: Shape) -> list[Stage]:
        return [Stage("drop", 2), Stage("look", 4, reads=(LayerKeys(), TextKeys()))]

    def choose(self, stage: Stage, tokens: Any) -> Keep:
        if stage.name == "look":
            self.seen = tokens.layer_keys.clone(), tokens.text_keys.clone()
            return Keep.where(tokens.active)
        odd = torch.arange(tokens.exists.shape[1]) % 2 == 1
        return Keep.where(tokens.active & odd)


@pytest.mark.parametrize("positions", ["keep", "renumber"])
@pytest.mark.parametrize("family", list(FAMILIES))
def test_keys_are_those_of_the_row_alone(family: str, positions: str) -> None:
    if family == "mrope" and positions == "renumber":
        with pytest.raises(IncompatibleError, match="multimodal rotary"):
            forward(family, BATCHES[0], "left", Keys(positions))
        return
    together = Keys(positions)
    forward(family, BATCHES[0], "left", together)
    for row, one in enumerate(BATCHES[0]):
        alone = Keys(positions)
        forward(family, (one,), "left", alone)
        for keys, own in zip(together.seen, alone.seen, strict=True):
            assert (keys[row, : own.shape[1]] - own[0]).abs().max() < 1e-4
            assert not keys[row, own.shape[1] :].any()
