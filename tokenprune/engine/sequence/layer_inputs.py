"""A layer's arguments for the remaining tokens: mask, rotary tables, position ids, other values of each position."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from tokenprune.engine.decoder import Decoder
from tokenprune.engine.sequence.gathered import GatheredSequence
from tokenprune.engine.sequence.positions import (
    first_tables,
    for_layer,
    new_tables,
    shifted_tables,
    tables_of,
    where_renumbered,
)

T = TypeVar("T")
_OWN = ("attention_mask", "position_embeddings", "position_ids")


class SharedArguments(Generic[T]):
    """Shortened arguments of layers, made once for all layers that receive the same tensors, as those of a stage do."""

    def __init__(self) -> None:
        self._made: dict[tuple[int, ...], tuple[tuple[Any, ...], T]] = {}

    def once(self, given: tuple[Any, ...], make: Callable[[], T]) -> T:
        """What `make` returned when these objects were given before, else what it returns now.

        Args:
            given: what the result depends on; compared by identity.
            make: makes the arguments.
        """
        key = tuple(map(id, given))
        if key not in self._made:
            # keep the originals alive, so that their ids are not reused
            self._made[key] = given, make()
        return self._made[key][1]


class LayerInputs:
    """Shortens the keyword arguments of a prefill's layers, and renumbers positions.

    Args:
        decoder: the decoder.

    Attributes:
        length: int64 [batch], the number of positions when they were renumbered, −1 in rows that were not renumbered;
            None = no row was.
        ids: the position ids that the decoder was given, if any.
    """

    def __init__(self, decoder: Decoder) -> None:
        self.decoder = decoder
        self.ids: Any = None
        self.length: Tensor | None = None
        self._ids: Tensor | None = None
        self._frame: GatheredSequence | None = None
        self._apart: tuple[Any, ...] = ()  # what the arguments of a layer depend on besides what it is given
        self._cuts = SharedArguments[dict[str, Any]]()
        self._firsts = SharedArguments[tuple[Tensor, ...] | None]()

    def renumber(self, rows: Tensor, present: Tensor, drafted: Tensor | None = None) -> None:
        """Renumber the positions of some rows from 0, without the pruned ones.

        Args:
            rows: bool [batch], the rows to renumber.
            present: bool [batch, S], positions that are not pruned.
            drafted: bool [batch, S], those of a drafted answer, which continue the numbers of the prompt; None = none.
        """
        before = present.new_full((len(rows),), -1, dtype=torch.int64) if self.length is None else self.length
        # a pruned position gets the number of the one before it, or 0 if there is none
        ids = (present.long().cumsum(1) - 1).clamp(min=0)
        self._ids = torch.where(rows[:, None], ids, 0 if self._ids is None else self._ids)
        # a later step counts on from the prompt, since not every drafted token may be accepted
        prompt = present if drafted is None else present & ~drafted
        self.length = torch.where(rows, prompt.sum(1), before)

    def shorten(self, layer: int, kwargs: dict[str, Any], hidden: Tensor, frame: GatheredSequence | None) -> None:
        """Shorten the arguments to a frame; `kwargs` is changed in place.

        Args:
            layer: decoder layer.
            kwargs: the layer's keyword arguments, made for the full sequence.
            hidden: [batch, M, width], for dtype and device.
            frame: the shortened sequence that the layer runs on; None = the full one, whose arguments stay.

        Raises:
            UnsupportedError: a mask or position embeddings of an unsupported kind.
        """
        if frame is None:
            return
        mask, tables, ids = kwargs.get("attention_mask"), tables_of(kwargs), kwargs.get("position_ids")
        others: dict[str, Tensor] = {}  # by position, such as the kinds of tokens, by which some layers choose experts
        full = (len(frame.index), frame.length)
        for name, value in kwargs.items():
            if name not in _OWN and isinstance(value, Tensor) and value.shape == full:
                others[name] = value
        if frame is not self._frame:  # a new stage
            self._frame, self._cuts = frame, SharedArguments()
        make = partial(self._cut, layer, hidden, frame, mask, tables, ids, others)
        attends = self.decoder.attends[layer]  # layers of both kinds may have no mask
        kwargs.update(self._cuts.once((attends, mask, ids, *tables, *others.values(), *self._apart), make))

    def positions(self, layer: int) -> Tensor | None:
        """As `length`, once a layer has run."""
        return self.length

    def from_first(
        self, layer: int, now: tuple[Tensor, ...], whole: tuple[Tensor, ...], hidden: Tensor, valid: Tensor
    ) -> tuple[Tensor, ...]:
        """Rotary tables of a layer at positions counted from each row's first token.

        Args:
            layer: decoder layer.
            now: its tables on the current frame, [..., batch or 1, M, D].
            whole: its tables for the full sequence.
            hidden: for dtype and device.
            valid: bool [batch, S], False on padding.
        """
        first = self.first_tables(whole, valid)
        return now if first is None else shifted_tables(now, first, self.length)

    def first_tables(self, tables: tuple[Tensor, ...], valid: Tensor) -> tuple[Tensor, ...] | None:
        """See `positions.first_tables`; asked once for the same tables, since a device has to be waited for."""
        return self._firsts.once(tables, partial(first_tables, tables, valid))

    def tables_by_axis(
        self, layer: int, tables: tuple[Tensor, ...], hidden: Tensor, valid: Tensor
    ) -> tuple[Tensor, ...] | None:
        """Rotary tables [axes, batch, S, D] of each axis of M-RoPE, at positions counted from a row's first token.

        None if the model has one axis, or keeps the tables of several apart.

        Args:
            layer: decoder layer.
            tables: its cos and sin for the full sequence.
            hidden: for the device.
            valid: bool [batch, S], False on padding.
        """
        ids = self.ids
        joined = self.decoder.multimodal_rope and len(tables) > 0 and tables[0].dim() == 3
        if not (joined and isinstance(ids, Tensor) and ids.dim() == 3):
            return None
        count = self.decoder.axes
        axes = ids[-count:].expand(-1, len(valid), -1)  # those of text may stand before them
        first = valid.int().argmax(1).to(axes.device)[None, :, None].expand(len(axes), -1, 1)
        counted = (axes - axes.gather(2, first)).to(hidden.device)
        # where all axes are at the same positions, the joined table is that of each
        alone = [new_tables(self.decoder, layer, hidden[:1, :1].float(), one.expand(count, -1, -1)) for one in counted]
        cos, sin = (torch.stack(parts) for parts in zip(*alone, strict=True))
        return cos, sin

    def forget(self) -> None:
        """Release masks and tables after the last layer."""
        self.ids = None
        self._frame, self._cuts, self._firsts = None, SharedArguments(), SharedArguments()

    def _cut(
        self,
        layer: int,
        hidden: Tensor,
        frame: GatheredSequence,
        mask: Tensor | None,
        tables: tuple[Tensor, ...],
        ids: Tensor | None,
        others: dict[str, Tensor],
    ) -> dict[str, Any]:
        self.decoder.check_mask(mask)
        cut = tuple([frame.prefill_table(table) for table in tables])
        short = None if ids is None else frame.prefill_ids(ids)
        renumbered = self._renumbered(layer)
        if renumbered is not None:
            length, own = renumbered
            new = frame.prefill_ids(own).to(hidden.device)
            if cut:
                tables = new_tables(self.decoder, layer, hidden, new)
                cut = tuple([where_renumbered(length, *pair) for pair in zip(tables, cut, strict=True)])
            short = new if short is None else where_renumbered(length, new, short)
        if not self.decoder.attends[layer] and frame.ragged:
            self.decoder.check_padding(layer)
        return {
            **{name: frame.prefill_ids(value) for name, value in others.items()},
            "attention_mask": self._mask(layer, mask, frame),
            "position_embeddings": for_layer(cut),
            "position_ids": short,
        }

    def _renumbered(self, layer: int) -> tuple[Tensor, Tensor] | None:
        """The number of positions, −1 in rows that were not renumbered, and the new ids int64 [batch, S]; None = no row
        was."""
        return None if self.length is None or self._ids is None else (self.length, self._ids)

    def _mask(self, layer: int, mask: Tensor | None, frame: GatheredSequence) -> Tensor | None:
        """The mask of a layer, from that of the full sequence."""
        if mask is None:
            return frame.new_mask(self.decoder.attends[layer], "flash" in self.decoder.attention_name)
        return frame.prefill_mask(mask)
