"""A layer's arguments in a later turn of a conversation, whose tokens follow those of a filled KV cache."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tokenprune.engine.caches.filled_cache import FilledCache
from tokenprune.engine.decoder import Decoder
from tokenprune.engine.sequence.gathered import GatheredSequence
from tokenprune.engine.sequence.layer_inputs import LayerInputs
from tokenprune.engine.sequence.positions import new_tables, shifted_tables, where_renumbered


class LaterInputs(LayerInputs):
    """Shortens the arguments of a later turn. Each layer's cache may lack other tokens, and count other positions.

    Where positions are renumbered, those of the turn follow those of the tokens before it, in each layer.

    Args:
        decoder: the decoder.
        cache: what the layers' caches contain.
        valid: bool [batch, n], the turn's own tokens, False on padding.
    """

    def __init__(self, decoder: Decoder, cache: FilledCache, valid: Tensor) -> None:
        super().__init__(decoder)
        self._cache, self._valid = cache, valid
        self._whole = GatheredSequence.whole(len(valid), valid.shape[1], valid.device)

    def shorten(self, layer: int, kwargs: dict[str, Any], hidden: Tensor, frame: GatheredSequence | None) -> None:
        """See `LayerInputs.shorten`; `frame` is of the turn alone, None = all of it, whose keys may still lack some."""
        own = self._cache.layers[layer]
        self._apart = own.frame, own.renumbered
        super().shorten(layer, kwargs, hidden, self._whole if frame is None else frame)

    def positions(self, layer: int) -> Tensor | None:
        """See `LayerInputs.positions`; the positions before the turn are included."""
        counted = self._renumbered(layer)
        return None if counted is None else counted[0]

    def from_first(
        self, layer: int, now: tuple[Tensor, ...], whole: tuple[Tensor, ...], hidden: Tensor, valid: Tensor
    ) -> tuple[Tensor, ...]:
        """See `LayerInputs.from_first`: the first token of the turn."""
        first = self.first_tables(whole, valid)
        if first is None:
            return now
        counted = self._renumbered(layer)
        if counted is not None:
            length, ids = counted
            begun = ids.gather(1, valid.int().argmax(1, keepdim=True))
            new = new_tables(self.decoder, layer, hidden, begun.to(hidden.device))
            first = tuple([where_renumbered(length, *pair) for pair in zip(new, first, strict=True)])
        return shifted_tables(now, first, None)

    def _renumbered(self, layer: int) -> tuple[Tensor, Tensor] | None:
        before, valid = self._cache.layers[layer].renumbered, self._valid
        if before is None and self.length is None:
            return None
        none = torch.full((len(valid),), -1, device=valid.device)
        before, now = (none if one is None else one.to(valid.device) for one in (before, self.length))
        now = torch.where(valid.any(1), now, -1)  # a row that says nothing in the turn has no first position
        kept = (valid.long().cumsum(1) - 1).clamp(min=0)
        steps = kept if self._ids is None else torch.where(now[:, None] >= 0, self._ids, kept)
        begin = torch.where(before >= 0, before, self._first_position())
        counted = begin + torch.where(now >= 0, now, valid.sum(1))
        return torch.where((before >= 0) | (now >= 0), counted, -1), begin[:, None] + steps

    def _first_position(self) -> Tensor:
        """int64 [batch]: the model's position of each row's first token in the turn."""
        first = self._valid.int().argmax(1)
        if not isinstance(self.ids, Tensor):
            return self._cache.length + first
        ids = self.ids.to(first.device)
        ids = ids.reshape(-1, *ids.shape[-2:])[-1].expand(len(first), -1)  # all axes agree there
        return ids.gather(1, first[:, None])[:, 0]

    def _mask(self, layer: int, mask: Tensor | None, frame: GatheredSequence) -> Tensor | None:
        own = self._cache.layers[layer]
        before = own.frame or GatheredSequence.whole(len(self._valid), self._cache.length, self._valid.device)
        return before.turn_mask(mask, frame, own.room, two_d="flash" in self.decoder.attention_name)
