"""Caches of earlier layers that lose tokens after a prefill, since a later stage has dropped them."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import pad

from tokenprune.core.stage import Stage
from tokenprune.engine.sequence.gathered import GatheredSequence


class EarlierCaches:
    """What the caches of a prefill's layers keep, where that is less than what the layers ran on.

    Args:
        valid: bool [batch, S], on the host, False on padding.

    Attributes:
        layers: per layer that loses some, or might, bool [batch, S], the positions that stages leave.
    """

    def __init__(self, valid: Tensor) -> None:
        self._valid = valid
        self.layers: dict[int, Tensor] = {}

    def prune(self, stage: Stage, rows: Tensor, present: Tensor) -> None:
        """Remove from the caches of earlier layers what a stage has dropped.

        Args:
            stage: declares `prune_earlier_caches`.
            rows: bool [batch], on the host, the rows that it is for.
            present: bool [batch, S], on the host, the positions that are left from it on.
        """
        for layer in range(stage.caches_from, stage.layer):
            self.layers[layer] = self.layers.get(layer, self._valid) & (present | ~rows[:, None])

    def kept(self, layer: int, frame: GatheredSequence | None) -> Tensor:
        """bool [batch, S], on the host: the positions in the cache of one of `layers`, which ran on a frame (None =
        all)."""
        kept = self.layers[layer]
        return kept if frame is None else kept & frame.on_host.present().to(kept.device)

    def behind(self, length: int) -> EarlierCaches:
        """The same in a sequence in which so many positions, which the caches keep, stand before these."""
        found = EarlierCaches(pad(self._valid, (length, 0), value=True))
        found.layers = {layer: pad(kept, (length, 0), value=True) for layer, kept in self.layers.items()}
        return found
