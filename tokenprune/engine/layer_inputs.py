"""The arguments of a layer, cut down to the remaining tokens: its mask, rotary tables and position ids."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tokenprune.engine.decoder import Decoder
from tokenprune.engine.gathered import GatheredSequence
from tokenprune.engine.positions import new_or_kept, new_tables, tables_of


class LayerInputs:
    """Shortens the keyword arguments of a prefill's layers, and renumbers positions where a stage asks for it.

    Args:
        decoder: whose layers they are.

    Attributes:
        length: int64 [batch], how many positions there were when they were renumbered, −1 in rows where they were not;
            None = in no row.
    """

    def __init__(self, decoder: Decoder) -> None:
        self.decoder = decoder
        self.length: Tensor | None = None
        self._ids: Tensor | None = None
        self._frame: GatheredSequence | None = None
        self._cuts: dict[tuple[int, ...], tuple[Any, dict[str, Any]]] = {}

    def renumber(self, rows: Tensor, present: Tensor) -> None:
        """Number the positions of some rows from 0, without those that are gone.

        Args:
            rows: bool [batch].
            present: bool [batch, S], positions that are still there.
        """
        before = present.new_full((len(rows),), -1, dtype=torch.int64) if self.length is None else self.length
        # a position that is gone shares the number before it; clamped, since nothing may stand before the first one
        ids = (present.long().cumsum(1) - 1).clamp(min=0)
        self._ids = torch.where(rows[:, None], ids, 0 if self._ids is None else self._ids)
        self.length = torch.where(rows, present.sum(1), before)

    def shorten(self, layer: int, kwargs: dict[str, Any], hidden: Tensor, frame: GatheredSequence) -> None:
        """Cut the arguments down to a frame; `kwargs` is changed in place.

        Args:
            layer: decoder layer.
            kwargs: the layer's keyword arguments, made for the full sequence.
            hidden: [batch, M, width], for type and device.
            frame: that the layer runs on.

        Raises:
            UnsupportedError: arguments of a kind that cannot be cut down.
        """
        mask, tables, ids = kwargs.get("attention_mask"), tables_of(kwargs), kwargs.get("position_ids")
        if frame is not self._frame:  # what was cut for an earlier stage is needed no more
            self._frame, self._cuts = frame, {}
        # the layers of a stage are given the same tensors, so that one cut serves them all
        key = id(mask), *map(id, tables), id(ids)
        if key not in self._cuts:
            # with the originals, so that no other tensor is given their ids meanwhile
            self._cuts[key] = (mask, tables, ids), self._cut(layer, hidden, frame, mask, tables, ids)
        kwargs.update(self._cuts[key][1])

    def forget(self) -> None:
        """The last layer has run: let go of masks and tables."""
        self._frame, self._cuts = None, {}

    def _cut(
        self,
        layer: int,
        hidden: Tensor,
        frame: GatheredSequence,
        mask: Tensor | None,
        tables: tuple[Tensor, ...],
        ids: Tensor | None,
    ) -> dict[str, Any]:
        self.decoder.check_mask(mask)
        cut = tuple([frame.prefill_table(table) for table in tables])
        short = None if ids is None else frame.prefill_ids(ids)
        if self._ids is not None and self.length is not None:
            new = frame.prefill_ids(self._ids).to(hidden.device)
            renumbered = new_tables(self.decoder, layer, hidden, new)
            cut = tuple([new_or_kept(self.length, *pair) for pair in zip(renumbered, cut, strict=True)])
            short = new if short is None else new_or_kept(self.length, new, short)
        return {
            "attention_mask": None if mask is None else frame.prefill_mask(mask),
            "position_embeddings": cut,
            "position_ids": short,
        }
