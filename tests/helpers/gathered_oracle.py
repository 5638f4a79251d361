"""The definition of pruning for decoders some of whose layers keep a state, computed row by row, without the engine.

Each layer runs on the row's own tokens alone: no padding, no fillers, no cache, its rotary tables picked by hand.
Decoding is the same for a longer sequence. The masked full-length oracle (`tokenprune.testing.oracle`) cannot be used:
no mask hides a token from a layer that runs over the sequence in order.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor

from tokenprune.core.layout import SequenceLayout
from tokenprune.testing.oracle import all_active, apply_step, rotary_tables
from tokenprune.testing.scripted import Scripted


@contextmanager
def gathered(decoder: Any, layout: SequenceLayout, script: Scripted) -> Iterator[None]:
    """A context in which calls without cache, of any model around `decoder`, compute the oracle of a script."""
    walk = _Walk(decoder, layout, script)
    for number, layer in enumerate(decoder.layers):
        layer.forward = partial(walk.layer, number, layer.forward)
    try:
        yield
    finally:
        for layer in decoder.layers:
            del layer.forward


class _Walk:
    def __init__(self, decoder: Any, layout: SequenceLayout, script: Scripted) -> None:
        self.decoder, self.layout, self.script = decoder, layout, script
        self.present: Tensor
        self.alive: dict[str, Tensor]
        self.counted: Tensor | None = None

    def layer(self, number: int, forward: Any, hidden: Tensor, **kwargs: Any) -> Tensor:
        if number == 0:
            self.present, self.alive, self.counted = self.layout.valid, all_active(self.layout), None
        for step in self.script.steps:
            if step.layer == number:
                hidden = apply_step(step, hidden, self.layout, self.alive)
                self.present = (self.layout.valid & ~self.layout.image_tokens) | self.alive["active"]
                if (step.positions or self.script.positions) == "renumber":
                    self.counted = (self.present.long().cumsum(1) - 1).clamp(min=0)
        result = hidden.clone()
        for row, present in enumerate(self.present):
            places = present.nonzero().flatten()
            if not len(places):
                continue
            own = hidden[row : row + 1, places]
            output = forward(own, **kwargs | self._arguments(number, row, places, own, kwargs))
            result[row, places] = (output[0] if isinstance(output, tuple) else output)[0]
        return result

    def _arguments(self, number: int, row: int, places: Tensor, own: Tensor, kwargs: dict[str, Any]) -> dict[str, Any]:
        def picked(table: Tensor) -> Tensor:
            row_of = min(row, table.shape[-3] - 1)
            return table[..., row_of : row_of + 1, places, :]

        given = kwargs["position_embeddings"]  # None for some layers that do not attend
        tables = given if given is None else tuple(map(picked, given))
        if self.counted is not None and given is not None:
            tables = rotary_tables(self.decoder, number, own, self.counted[row : row + 1, places])
        length = len(places)
        kind = self.decoder.config.layer_types[number]
        hidden = torch.ones(length, length, dtype=torch.bool).triu(1)
        if kind == "sliding_attention":
            hidden |= places[:, None] - places >= self.decoder.config.sliding_window
        causal = torch.zeros(1, 1, length, length).masked_fill(hidden, torch.finfo(torch.float32).min)
        ids = kwargs.get("position_ids")
        return {
            "attention_mask": causal if kind in ("full_attention", "sliding_attention") else None,
            "position_embeddings": tables,
            "position_ids": None if ids is None else picked(ids[..., None])[..., 0],
            "past_key_values": None,
        }
