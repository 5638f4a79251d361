"""The tokens that earlier parts of a composition kept, presented as if there were no others."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from tokenprune.core.decisions import Decision, Merge, index_of
from tokenprune.core.layout import true_positions
from tokenprune.core.reads import Read
from tokenprune.core.scheduling.state import TokenState, spread_rows
from tokenprune.core.stage import Stage
from tokenprune.core.tokens import Tokens
from tokenprune.utils.host_copies import on_host


@dataclass(frozen=True)
class RemainingTokens:
    """The image tokens that were active when a part began, numbered 0 … n−1 in sequence order.

    Attributes:
        index: int64 [batch, n], their numbers among all image tokens, −1 where a row has fewer.
        origin: int64 [batch, n], the original token whose place each has, −1 for none.
        carried: bool [batch, n, N], the original tokens that contribute to each; None = each only itself.
        index_on_host: `index` in the host's memory.
    """

    index: Tensor
    origin: Tensor
    carried: Tensor | None
    index_on_host: Tensor

    @classmethod
    def of(cls, tokens: Tokens) -> RemainingTokens:
        """Those that are active now."""
        known = true_positions(tokens.on_host("active"))
        index = known.to(tokens.device, non_blocking=True)
        carried = None if tokens.lineage is None else _take(tokens.lineage, index, 1)
        return cls(index, _take(tokens.origin, index, 1, -1), carried, known)

    @property
    def exists(self) -> Tensor:
        """bool [batch, n]."""
        return self.index >= 0

    def state(self, tokens: Tokens) -> TokenState:
        """The current state of the remaining tokens."""
        size = tokens.exists.shape[1]
        numbers = torch.arange(self.index.shape[1], device=self.index.device).expand_as(self.index)
        mine = self.exists & (self.origin >= 0)
        known = torch.full((len(self.index), size + 1), -1, dtype=torch.int64, device=self.index.device)
        known.scatter_(1, torch.where(mine, self.origin, size), numbers)
        known[:, size] = -1  # tokens without a place of their own
        origin = _take(tokens.origin, self.index, 1, -1)
        active, parked, mass = (_take(values, self.index, 1) for values in (tokens.active, tokens.parked, tokens.mass))
        return TokenState(self.exists, active, parked, mass, known.gather(1, torch.where(origin < 0, size, origin)))

    def read(self, tokens: Tokens, read: Read) -> Any:
        """The value of a read for the remaining tokens.

        A token that was moved to another token's place has that token's value. A token without a place has the mean
        over the tokens that contribute to it, or over its image if there are none, as for a [CLS] (ours).
        """
        value = tokens.read(read)
        if read.axis is None:
            return value
        if read.present:
            return _take(value, self.index, read.axis, read.missing)
        placed = torch.where(self.origin >= 0, self.origin, self.index)
        taken = _take(value, placed, read.axis, read.missing)
        spread = self.exists & (self.origin < 0)
        if self.carried is None or not taken.is_floating_point() or not bool(spread.any()):
            return taken
        taken = taken.movedim(read.axis, 1).clone()
        for row, token in spread.nonzero().tolist():
            of = self.carried[row, token]
            if not bool(of.any()):
                of = tokens.image[row] == tokens.image[row, self.index[row, token]]
            taken[row, token] = value[row].movedim(read.axis - (read.axis > 0), 0)[of].mean(0)
        return taken.movedim(1, read.axis)

    def whole(self, decision: Decision, size: int) -> Decision:
        """A decision about the remaining tokens, with the numbers that they have among all `size` tokens."""
        scores = decision.scores
        if scores is not None:
            base = scores.new_full((len(scores), size), float("-inf"))
            scores = spread_rows(scores, self.index, size, base=base)
        if decision.mask is not None and decision.mask.shape == self.index.shape:
            marked = spread_rows(decision.mask, self.index, size)
            return replace(decision, index=index_of(marked), scores=scores)
        moved = replace(decision, index=self._numbers(decision.index), scores=scores)
        if not isinstance(moved, Merge):
            return moved
        weights = spread_rows(moved.weights.transpose(1, 2), self.index, size).transpose(1, 2)
        return replace(moved, weights=weights, origin=None if moved.origin is None else self._numbers(moved.origin))

    def _numbers(self, index: Tensor) -> Tensor:
        return torch.where(index < 0, -1, self.index.gather(1, index.clamp(min=0)))


class PartTokens(Tokens):
    """The view of a part of a composition: the remaining tokens, renumbered, of a sequence without the others."""

    def __init__(
        self, whole: Tokens, left: RemainingTokens, stage: Stage, stages: Sequence[Stage], memory: dict[str, Any]
    ) -> None:
        self._whole, self._left = whole, left
        self.left_state = left.state(whole)
        super().__init__(
            stage=stage.name,
            layout=whole._layout,
            state=self.left_state,
            target=whole._target,
            memory=memory,
            seed=whole._seed,
            reads=stage.reads,
            provide=lambda read: left.read(whole, read),
            mark=whole.mark,
            stages=stages,
            strict=whole.strict,
        )

    @cached_property
    def image(self) -> Tensor:
        """See `Tokens`."""
        return _take(self._whole.image, self._left.index, 1, -1)

    def on_host(self, name: str) -> Tensor:
        """See `Tokens`; others than "active" and "image" are waited for."""
        if name in ("active", "image"):
            return _take(self._whole.on_host(name), self._left.index_on_host, 1, -1 if name == "image" else 0)
        if name not in self._hosted:
            (self._hosted[name],) = on_host(getattr(self, name))
        return self._hosted[name]

    @cached_property
    def grid(self) -> Tensor:
        """See `Tokens`: the cell of each token's place."""
        return _take(self._whole.grid, self._left.origin, 1, -1)

    @cached_property
    def places(self) -> Tensor:
        """See `Tokens`: counted over text and remaining tokens."""
        index = self._left.index
        text_before = _take(self._whole.places, index, 1) - index
        return torch.where(index < 0, -1, text_before + torch.arange(index.shape[1], device=index.device))

    @cached_property
    def images_before(self) -> Tensor:
        """See `Tokens`: counted over remaining tokens."""
        before = self._whole.images_before
        ascending = torch.where(self._left.exists, self._left.index, self._whole.exists.shape[1])
        return torch.where(self.text, torch.searchsorted(ascending, before.clamp(min=0)), before)

    @cached_property
    def text_places(self) -> Tensor:
        """See `Tokens`: counted over text and remaining tokens."""
        whole = self._whole
        return torch.where(self.text, whole.text_places - whole.images_before + self.images_before, whole.text_places)


def _take(values: Tensor, index: Tensor, axis: int, missing: float = 0.0) -> Tensor:
    """Values at `index` [batch, n] of one of their axes, `missing` at −1."""
    moved = values.movedim(axis, 1)
    where = index.to(values.device).reshape(*index.shape, *[1] * (moved.dim() - 2))
    taken = moved.gather(1, where.clamp(min=0).expand(*index.shape, *moved.shape[2:]))
    return taken.masked_fill(where < 0, missing).movedim(1, axis)
