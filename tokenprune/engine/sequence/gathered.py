"""The shortened sequence that the layers of a stage run on, and conversions from and to the full sequence."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor
from torch.nn.functional import pad

from tokenprune.core.layout import true_positions
from tokenprune.core.scheduling.state import as_mask, take_rows


@dataclass(frozen=True)
class GatheredSequence:
    """The positions of the full sequence that a shortened one (a *frame*) contains, in order.

    Rows shorter than the longest are filled at the *end* with copies of their last token; fillers are masked as keys
    and never written back. For a decoder with layers that keep a state they stand *first*, with copies of the first
    token: there such layers take them for padding, which leaves an empty state as it is.

    Attributes:
        index: int64 [batch, M], full-sequence positions.
        filled: bool [batch, M], False on fillers.
        length: S, length of the full sequence.
        fillers_first: whether fillers stand before a row's tokens.
        host: the same frame in the host's memory, which answers what would have to be waited for; None = this one is
            there, or it was not kept.
    """

    index: Tensor
    filled: Tensor
    length: int
    fillers_first: bool = False
    host: GatheredSequence | None = None

    @classmethod
    def of(cls, present: Tensor, fillers_first: bool = False) -> GatheredSequence:
        """The frame of bool [batch, S] `present`; a row without positions has fillers alone."""
        positions = true_positions(present)
        if not positions.shape[1]:  # a cache layer without keys would be taken for an empty one
            positions = positions.new_full((len(positions), 1), -1)
        if fillers_first:
            missing = (positions < 0).sum(1, keepdim=True)
            steps = torch.arange(positions.shape[1], device=positions.device) - missing
            index, filled = positions.gather(1, steps.clamp(min=0)), steps >= 0
            return cls(index, filled, present.shape[1], fillers_first=True)
        # fillers repeat a real position, to gather finite numbers, and come last, where causal attention hides them
        last = positions.amax(1, keepdim=True).clamp(min=0)
        return cls(torch.where(positions < 0, last, positions), positions >= 0, present.shape[1])

    @classmethod
    def whole(cls, batch: int, length: int, device: torch.device) -> GatheredSequence:
        """The frame of every position."""
        index = torch.arange(length).expand(batch, -1)
        return cls(index, torch.ones_like(index, dtype=torch.bool), length).to(device)

    def followed_by(self, other: GatheredSequence) -> GatheredSequence:
        """The frame of a sequence that goes on with another one, of which `other` is the frame."""
        index = torch.cat((self.index, self.length + other.index), 1)
        filled = torch.cat((self.filled, other.filled), 1)
        host = None if self.host is None or other.host is None else self.host.followed_by(other.host)
        return GatheredSequence(index, filled, self.length + other.length, host=host)

    def to(self, device: torch.device) -> GatheredSequence:
        """This frame, which is in the host's memory, on a device."""
        if device == self.index.device:
            return self
        index, filled = (part.to(device, non_blocking=True) for part in (self.index, self.filled))
        return replace(self, index=index, filled=filled, host=self)

    @property
    def on_host(self) -> GatheredSequence:
        """The frame in the host's memory, if it was kept; else this one."""
        return self if self.host is None else self.host

    def rows(self, rows: Tensor) -> GatheredSequence:
        """The frame of a new batch whose rows are int64 [new batch] of this one's."""
        rows = rows.to(self.index.device)
        return replace(self, index=self.index[rows], filled=self.filled[rows], host=None)

    @property
    def width(self) -> int:
        """M, positions computed per row."""
        return self.index.shape[1]

    @cached_property
    def ragged(self) -> bool:
        """True if any row has fillers. Asked once, since a GPU has to be waited for."""
        return not bool(self.on_host.filled.all())

    @property
    def counts(self) -> Tensor:
        """int64 [batch]: real tokens per row."""
        return self.filled.sum(1)

    @cached_property
    def absent(self) -> Tensor:
        """int64 [batch, S − fewest real tokens]: positions that are not in the frame, −1 if a row has fewer."""
        if self.host is not None:
            return self.host.absent.to(self.index.device, non_blocking=True)
        return true_positions(~self.present())

    def present(self) -> Tensor:
        """bool [batch, S]: the positions that are in the frame."""
        return as_mask(torch.where(self.filled, self.index, -1), self.length)

    def gather(self, full: Tensor) -> Tensor:
        """[batch, S, width] -> [batch, M, width]."""
        return take_rows(full, self.index)

    def split(self, full: Tensor) -> tuple[Tensor, Tensor]:
        """[batch, S, width] -> the frame's [batch, M, width], and the states of the absent positions."""
        # −1 gathers position 0, which `join` ignores
        return self.gather(full), take_rows(full, self.absent.clamp(min=0))

    def join(self, short: Tensor, rest: Tensor) -> Tensor:
        """Undo `split`: [batch, S, width]. Fillers are ignored."""
        return take_rows(torch.cat((short, rest.to(short)), 1), self._joined)

    @cached_property
    def _joined(self) -> Tensor:
        """int64 [batch, S]: where each position is in the frame followed by the absent positions."""
        if self.host is not None:
            return self.host._joined.to(self.index.device, non_blocking=True)
        index = torch.cat((torch.where(self.filled, self.index, -1), self.absent), 1)
        steps = torch.arange(index.shape[1], device=index.device).expand_as(index)
        order = torch.zeros(len(index), self.length + 1, dtype=torch.int64, device=index.device)
        # the spare column is where fillers go, which must not stand for the position that they repeat
        return order.scatter_(1, torch.where(index < 0, self.length, index), steps)[:, : self.length]

    def prefill_table(self, table: Tensor) -> Tensor:
        """Rotary tables [..., batch or 1, S, D] -> [..., batch, M, D]."""
        index = self.index.to(table.device)
        # tables may have one row for the whole batch, but each row keeps other positions
        table = table.expand(*table.shape[:-3], len(index), *table.shape[-2:])
        where = index[..., None].expand(*table.shape[:-2], self.width, table.shape[-1])
        return table.gather(-2, where)

    def prefill_ids(self, ids: Tensor) -> Tensor:
        """Position ids [..., batch or 1, S] -> [..., batch, M]."""
        return self.prefill_table(ids[..., None]).squeeze(-1)

    def places(self, positions: Tensor) -> Tensor:
        """Indices in the frame of full-sequence positions [batch, n]; −1 if they are not in it, or are −1."""
        # an extra column for fillers and −1
        table = torch.full((len(self.index), self.length + 1), -1, dtype=torch.int64, device=self.index.device)
        steps = torch.arange(self.width, device=self.index.device).expand_as(self.index)
        table.scatter_(1, torch.where(self.filled, self.index, self.length), torch.where(self.filled, steps, -1))
        return table.gather(1, torch.where(positions < 0, self.length, positions))

    def prefill_mask(self, mask: Tensor) -> Tensor:
        """The model's mask for the full sequence, cut down to this frame.

        A 2-D mask is [batch, S]; a 4-D one [batch or 1, heads or 1, S, S], bool (True = visible) or additive. Without
        a mask see `new_mask`.
        """
        index = self.index.to(mask.device)
        if mask.dim() == 2:
            # a filler copies the 1 of a real token, but is padding
            return mask.gather(1, index) * self.filled.to(mask.device, mask.dtype)
        return self._columns(self.query_rows(mask), self.index, self.filled)

    def new_mask(self, attends: bool, two_d: bool) -> Tensor | None:
        """The mask of a layer whose full sequence has none; None = it needs none here either.

        Args:
            attends: whether the layer attends to the sequence. Others take a 2-D mask, of padding.
            two_d: whether the attention implementation takes 2-D masks.
        """
        if not self.fillers_first or not self.ragged:
            return None  # causality hides fillers at the end
        if two_d or not attends:
            return self.filled
        causal = torch.ones(self.width, self.width, dtype=torch.bool, device=self.index.device).tril()
        itself = torch.eye(self.width, dtype=torch.bool, device=self.index.device)  # fillers see themselves
        return ((causal & self.filled[:, None]) | itself)[:, None]

    def decode_mask(
        self, mask: Tensor | None, new: int, past: int, room: int | None = None, *, two_d: bool = False
    ) -> Tensor | None:
        """The mask for `new` query tokens over this frame's keys and the tokens decoded since.

        Args:
            mask: the model's mask over the true length: None, [batch, T], or [batch or 1, heads or 1, new, T].
            new: query tokens of this step.
            past: tokens decoded in earlier steps, so that T = S + past + new.
            room: slots that the cache has for decoded tokens, filled or not, so that T = S + room in four dimensions;
                None = it has only those that are filled.
            two_d: whether the attention implementation takes 2-D masks.
        """
        device = self.index.device if mask is None else mask.device
        decoded = past + new if room is None else room
        # the cache holds this frame, fillers included, followed by the tokens decoded since
        since = torch.arange(self.length, self.length + decoded, device=device).expand(len(self.index), -1)
        index = torch.cat((self.index.to(device), since), 1)
        filled = torch.cat((self.filled.to(device), torch.ones_like(since, dtype=torch.bool)), 1)
        if mask is None:
            if room is None and new == 1 and not self.ragged:
                return None  # a single query attends to every key
            # each query sees the keys up to its own
            steps = torch.arange(index.shape[1], device=device)
            own = self.width + past + torch.arange(new, device=device)
            return filled & (steps <= own[-1]) if two_d else filled[:, None, None] & (steps[None] <= own[:, None])
        if mask.dim() == 2:
            mask = pad(mask, (0, self.length + decoded - mask.shape[1]))  # empty slots are hidden
            return mask.gather(1, index) * filled.to(mask.dtype)
        return self._columns(mask.expand(len(index), *mask.shape[1:]), index, filled)

    def turn_mask(
        self, mask: Tensor | None, turn: GatheredSequence, room: int | None = None, *, two_d: bool = False
    ) -> Tensor:
        """The mask for a later turn, on a frame of its own, over this frame's keys and the turn's.

        Args:
            mask: the model's mask over the true length: None, [batch, T], or [batch or 1, heads or 1, new, T], with
                T = S + new, or more for a static cache; if it has fewer columns they are the last ones, as those of a
                sliding window.
            turn: the frame of the turn.
            room: slots that the cache has for tokens after this frame, of which the turn's fill the first; None = it
                grows.
            two_d: whether the attention implementation takes 2-D masks.
        """
        keys = self.followed_by(turn)
        empty = 0 if room is None else room - turn.width
        index, filled = (pad(part, (0, empty)) for part in (keys.index, keys.filled))  # empty slots are hidden
        if mask is None:
            if two_d:
                return filled
            steps = torch.arange(index.shape[1], device=index.device)
            own = self.width + torch.arange(turn.width, device=index.device)
            return filled[:, None, None] & (steps[None] <= own[:, None])
        if mask.dim() == 2:
            mask = pad(mask, (0, keys.length - mask.shape[1]))
            return mask.gather(1, index.to(mask.device)) * filled.to(mask.device, mask.dtype)
        forgotten = max(keys.length - mask.shape[3], 0)
        hidden = False if mask.dtype == torch.bool else torch.finfo(mask.dtype).min
        return self._columns(pad(turn.query_rows(mask), (forgotten, 0), value=hidden), index, filled)

    def query_rows(self, mask: Tensor) -> Tensor:
        """The rows of a mask [batch or 1, heads or 1, S, keys] that are of this frame: [batch, heads or 1, M, keys]."""
        index = self.index.to(mask.device)
        mask = mask.expand(len(index), *mask.shape[1:])
        return mask.gather(2, index[:, None, :, None].expand(-1, mask.shape[1], -1, mask.shape[3]))

    @staticmethod
    def _columns(mask: Tensor, index: Tensor, filled: Tensor) -> Tensor:
        index, filled = index.to(mask.device), filled.to(mask.device)
        cut = mask.gather(3, index[:, None, None].expand(-1, mask.shape[1], mask.shape[2], -1))
        # the smallest finite number, since −inf would give NaN in a row without visible keys
        hidden = False if mask.dtype == torch.bool else torch.finfo(mask.dtype).min
        return cut.masked_fill(~filled[:, None, None], hidden)


def visible(mask: Tensor) -> Tensor:
    """Which keys an attention mask shows: of a bool one those that are True, of an additive one those not hidden."""
    return mask > torch.finfo(mask.dtype).min / 2 if mask.is_floating_point() else mask.bool()
