"""The definition of pruning in a conversation: each turn has a schedule of its own for its own image tokens.

Every layer runs on the whole conversation at once, with masks and without a cache: positions that are not active are
hidden as keys, and their states pass through unchanged, as in `tokenprune.testing.oracle`. Positions that are
renumbered go on from those of the turns before, layer by layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tokenprune.core.layout import SequenceLayout
from tokenprune.testing.oracle import all_active, apply_step, rotary_tables
from tokenprune.testing.scripted import Scripted, Step

HIDDEN = torch.finfo(torch.float32).min


@dataclass
class Turn:
    """A call: its tokens, the schedule of its image tokens, and where it stands in the conversation."""

    layout: SequenceLayout
    script: Scripted
    start: int = 0

    @property
    def end(self) -> int:
        return self.start + self.layout.valid.shape[1]

    @property
    def steps(self) -> Sequence[Step]:
        """Those that there is anything to choose from for."""
        return self.script.steps if bool(self.layout.counts.any()) else []


def placed(turns: Sequence[Turn]) -> list[Turn]:
    """Turns one behind the other."""
    found, start = [], 0
    for turn in turns:
        found.append(Turn(turn.layout, turn.script, start))
        start = found[-1].end
    return found


def conversation(decoder: Any, embeds: Tensor, turns: Sequence[Turn], ids: Tensor) -> Tensor:
    """Final hidden states [batch, S, width] of the whole conversation.

    Args:
        decoder: layers, rotary_emb and norm.
        embeds: [batch, S, width].
        turns: from `placed`.
        ids: int64 [batch, S], the positions that the untouched model would use.
    """
    hidden, (batch, length) = embeds.clone(), ids.shape
    valid = torch.cat([turn.layout.valid for turn in turns], 1)
    alive = [all_active(turn.layout) for turn in turns]
    counted: list[list[bool]] = [[False] * batch for _ in turns]
    given = [turn.layout.valid.clone() for turn in turns]  # what was there when positions were renumbered last
    removed = [_removed(turn, embeds[:, turn.start : turn.end], len(decoder.layers)) for turn in turns]
    for number, layer in enumerate(decoder.layers):
        present = []
        for place, turn in enumerate(turns):
            for step in turn.steps:
                if step.layer == number:
                    part = apply_step(step, hidden[:, turn.start : turn.end], turn.layout, alive[place])
                    hidden = torch.cat((hidden[:, : turn.start], part, hidden[:, turn.end :]), 1)
                    if (step.positions or turn.script.positions) == "renumber":
                        for row in range(batch):
                            if bool(turn.layout.counts[row]):
                                counted[place][row] = True
                                given[place][row] = _present(turn, alive[place])[row]
            present.append(_present(turn, alive[place]))
        now = ids.clone()
        for row in range(batch):
            begin = None  # where positions go on, once any turn was renumbered
            for place, turn in enumerate(turns):
                there = given[place][row] if counted[place][row] else turn.layout.valid[row]
                if begin is None and counted[place][row]:
                    first = int(turn.layout.valid[row].int().argmax())
                    begin = int(ids[row, turn.start + first]) if place else 0
                if begin is not None:
                    now[row, turn.start : turn.end] = begin + (there.long().cumsum(0) - 1).clamp(min=0)
                    begin += int(there.sum())
        shown = torch.cat(present, 1)
        seen = _seen(decoder.config, number, length) & shown[:, None, :] & valid[:, None, :]
        for turn, lost in zip(turns, removed, strict=True):
            seen[:, turn.end :, turn.start : turn.end] &= ~lost[number][:, None, :]
        seen |= torch.eye(length, dtype=torch.bool)  # hidden positions see themselves: their output is discarded
        output = layer(
            hidden,
            attention_mask=torch.zeros(seen.shape).masked_fill(~seen, HIDDEN)[:, None],
            position_embeddings=rotary_tables(decoder, number, hidden, now),
            position_ids=now,
        )
        output = output[0] if isinstance(output, tuple) else output
        hidden = torch.where(shown[..., None], output, hidden)
    normed: Tensor = decoder.norm(hidden)
    return normed


def _present(turn: Turn, alive: dict[str, Tensor]) -> Tensor:
    return (turn.layout.valid & ~turn.layout.image_tokens) | alive["active"]


def _removed(turn: Turn, embeds: Tensor, layers: int) -> list[Tensor]:
    """Per layer, bool [batch, n], what its cache loses once the turn has run."""
    removed = [torch.zeros_like(turn.layout.image_tokens) for _ in range(layers)]
    alive = all_active(turn.layout)
    for step in turn.steps:
        apply_step(step, embeds, turn.layout, alive)
        if step.prune_earlier_caches:
            for layer in range(step.caches_from, step.layer):
                removed[layer] |= turn.layout.image_tokens & ~alive["active"]
    return removed


def _seen(config: Any, layer: int, length: int) -> Tensor:
    places = torch.arange(length)
    seen = places[None, :] <= places[:, None]
    if (getattr(config, "layer_types", None) or ["full_attention"] * (layer + 1))[layer] == "sliding_attention":
        seen = seen & (places[:, None] - places[None, :] < config.sliding_window)
    return seen
