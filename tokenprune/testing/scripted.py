"""Scripted strategies: schedules of fixed decisions, to compare the engine with the oracle."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from tokenprune.core.decisions import Decision, Keep, Merge, Restore
from tokenprune.core.reads import Read
from tokenprune.core.stage import Positions, Shape, Stage
from tokenprune.core.strategy import Strategy
from tokenprune.core.tokens import Tokens


@dataclass(frozen=True)
class Step:
    """One scripted decision on entering `layer`, and what its stage declares.

    `rows`, bool [batch], are the batch rows of the decision if it is not for all; for the oracle.
    """

    layer: int
    decision: Decision
    positions: Positions | None = None
    rows: Tensor | None = None
    prune_earlier_caches: bool = False
    caches_from: int = 0

    def is_for(self, row: int) -> bool:
        """Whether the decision is for that batch row."""
        return self.rows is None or bool(self.rows[row])


class Scripted(Strategy):
    """A strategy whose decisions are fixed in advance."""

    name = "scripted"

    def __init__(self, steps: Sequence[Step], *, positions: str = "keep") -> None:
        super().__init__()
        self.steps = list(steps)
        self.positions = positions  # type: ignore[assignment]

    def stages(self, shape: Shape) -> Iterable[Stage]:
        """One stage per step."""
        return [
            Stage(
                str(n),
                step.layer,
                positions=step.positions,
                prune_earlier_caches=step.prune_earlier_caches,
                caches_from=step.caches_from,
            )
            for n, step in enumerate(self.steps)
        ]

    def choose(self, stage: Stage, tokens: Tokens) -> Decision:
        """The scripted decision."""
        return self.steps[int(stage.name)].decision

    def row(self, number: int, count: int) -> Scripted:
        """The same script for one batch row alone, of `count` image tokens."""
        steps = [replace(step, decision=_row(step.decision, number, count), rows=None) for step in self.steps]
        return Scripted(steps, positions=self.positions)


class Asking(Strategy):
    """Has one read, keeps every token, and stores a copy of the read's value."""

    name = "asking"

    def __init__(self, read: Read) -> None:
        super().__init__()
        self.asked = read
        self.answer: Tensor | None = None

    def stages(self, shape: Shape) -> Iterable[Stage]:
        """One, before the first layer."""
        return [Stage("ask", 0, reads=(self.asked,))]

    def choose(self, stage: Stage, tokens: Tokens) -> Decision:
        """All."""
        answer = tokens.read(self.asked)
        self.answer = answer.clone() if isinstance(answer, Tensor) else None
        return Keep.where(tokens.active)


def random_script(
    exists: Tensor, layers: int, width: int, seed: int, *, merges: bool = True, positions: str = "keep"
) -> Scripted:
    """A random valid sequence of keep, park, restore and merge decisions.

    Args:
        exists: bool [batch, N].
        layers: decoder layers.
        width: hidden size, for new values.
        seed: of the draw.
        merges: whether to merge.
        positions: position policy.
    """
    draw = torch.Generator().manual_seed(seed)

    def chance(shape: Sequence[int], share: float) -> Tensor:
        return torch.rand(tuple(shape), generator=draw) < share

    active, parked = exists.clone(), torch.zeros_like(exists)
    steps: list[Step] = []
    for layer in range(layers):
        if not chance((1,), 0.6).item():
            continue
        kind = int(torch.randint(0, 4, (1,), generator=draw))
        share = float(torch.rand(1, generator=draw))
        if kind == 2:
            back = parked & chance(parked.shape, 0.5 + share / 2)
            values = torch.randn(*back.shape, width, generator=draw) if chance((1,), 0.3).item() else None
            decision: Decision = Restore.where(back, values=values)
            active, parked = active | back, parked & ~back
        else:
            kept = active & chance(active.shape, share)
            if kind == 3 and merges:
                rest = "park" if chance((1,), 0.5).item() else "drop"
                decision = _random_merge(kept, active, draw, rest)
                if rest == "park":
                    parked = parked | (active & ~kept & (decision.weights == 0).all(1))
            else:
                rest = "park" if kind == 1 else "drop"
                decision = Keep.where(kept, rest=rest)
                parked = parked | (active & ~kept) if rest == "park" else parked
            active = kept
        steps.append(Step(layer, decision))
    return Scripted(steps, positions=positions)


def _random_merge(kept: Tensor, active: Tensor, draw: torch.Generator, rest: str) -> Merge:
    index = Keep.where(kept).index
    weights = torch.rand(*index.shape, active.shape[1], generator=draw)
    weights = weights * (weights < 0.3) * active[:, None]
    own = torch.zeros_like(weights).scatter_(2, index.clamp(min=0)[..., None], 1.0)
    weights = (weights + own) / (weights + own).sum(2, keepdim=True)
    return Merge(index, weights=weights.masked_fill((index < 0)[..., None], 0), rest=rest)


def _row(decision: Decision, row: int, count: int) -> Decision:
    index = decision.index[row : row + 1]
    width = int((index >= 0).sum())
    index = index[:, :width]
    values = None if decision.values is None else decision.values[row : row + 1, :width]
    if isinstance(decision, Merge):
        weights = decision.weights[row : row + 1, :width, :count]
        return Merge(index, values=values, weights=weights, rest=decision.rest)
    if isinstance(decision, Restore):
        return Restore(index, values=values)
    assert isinstance(decision, Keep)
    return Keep(index, values=values, rest=decision.rest)
