"""A filled cache that a pruned turn of a conversation continues: what it contains before the turn, and after it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from tokenprune.core.ledger import Ledger
from tokenprune.engine.caches.cache_layers import CachedPrefill, PrunedLayer, PrunedStaticLayer, drop_behind
from tokenprune.engine.caches.earlier import EarlierCaches
from tokenprune.engine.caches.kv_cache import unify_layers
from tokenprune.engine.sequence.gathered import GatheredSequence


class FilledCache:
    """A cache whose layers are all of tokenprune's kind, as if one prefill had filled it.

    Args:
        cache: the cache.
        known: the prefill that filled it.
        length: positions of a row in it, those decoded since the prefill included.
        mask: [batch, length or more], 0 on padding; None = no padding.
        batch: number of rows.
        device: where frames are.

    Attributes:
        length: see above.
        layers: its layers, by number; frames and renumbered positions are those before the turn until it ends.
    """

    layers: list[PrunedLayer]

    def __init__(
        self, cache: Any, known: CachedPrefill, length: int, mask: Tensor | None, batch: int, device: torch.device
    ) -> None:
        self.length, self._cache, self._batch, self._device = length, cache, batch, device
        valid = torch.ones(batch, length, dtype=torch.bool, device=device)
        if mask is not None:
            given = mask[:, :length].to(device).bool()
            valid = pad(given, (0, length - given.shape[1]), value=True)
        self._record = known.extended(length, known.ledger)
        since = GatheredSequence.whole(batch, length - known.length, device)
        more = valid[:, known.length - known.drafted :].sum(1)
        for own in cache.layers:
            if isinstance(own, PrunedLayer) and own.keys is not None:
                own.frame = None if own.frame is None else own.frame.followed_by(since)
                own.renumbered = _advanced(own.renumbered, more)
                own.prefill = self._record
        unify_layers(cache, valid, self._record, EarlierCaches(valid))
        self._record.sign(cache)
        self.layers = cache.layers
        self._ended = False
        self.before = [length - own.absent for own in self.layers]

    def keys(self, layer: int) -> tuple[Tensor, Tensor]:
        """Keys and values of a layer before the turn, [batch, heads, K, size]."""
        own, held = self.layers[layer], self.before[layer]
        assert own.keys is not None
        assert own.values is not None
        return own.keys[:, :, :held], own.values[:, :, :held]

    def expect(self, layer: int, width: int) -> None:
        """Allow a layer to append that many tokens per row."""
        own = self.layers[layer]
        own.expected = True
        if isinstance(own, PrunedStaticLayer):
            own.slots = torch.arange(own.held, own.held + width, device=own.device)

    def undo(self) -> None:
        """After an error: remove what layers have appended, so that the turn can be said again."""
        if self._ended:
            return
        for own, held in zip(self.layers, self.before, strict=True):
            if not isinstance(own, PrunedStaticLayer):  # whose slots are written anew
                drop_behind(own, held)

    def finish(
        self,
        ledger: Ledger,
        frames: list[GatheredSequence | None],
        renumbered: list[Tensor | None],
        valid: Tensor,
        earlier: EarlierCaches,
    ) -> None:
        """After the last layer: the cache contains the turn.

        Args:
            ledger: of the turn.
            frames: of the turn, by layer; None = all of it.
            renumbered: int64 [batch], by layer, the number of positions with the turn; see `PrunedLayer`.
            valid: bool [batch, n], the turn's own tokens, False on padding.
            earlier: what the caches lose of the turn.
        """
        new = valid.shape[1]
        record = self._record.extended(self.length + new, ledger)
        self._ended = True
        before = GatheredSequence.whole(self._batch, self.length, self._device)
        turn = GatheredSequence.whole(self._batch, new, self._device)
        for own, frame, positions in zip(self.layers, frames, renumbered, strict=True):
            if own.frame is not None or frame is not None:
                own.frame = (own.frame or before).followed_by(frame or turn)
            own.renumbered, own.prefill = positions, record
        unify_layers(self._cache, valid, record, earlier.behind(self.length))
        record.sign(self._cache)


def _advanced(renumbered: Tensor | None, more: Tensor) -> Tensor | None:
    """Numbers of positions after `more` tokens, int64 [batch] each; −1 stays."""
    return None if renumbered is None else torch.where(renumbered >= 0, renumbered + more.to(renumbered.device), -1)
