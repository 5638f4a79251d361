"""What the stages of one prefill read of the decoder."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from tokenprune.core.layout import SequenceLayout
from tokenprune.core.ledger import LookAhead
from tokenprune.core.reads import (
    AttentionFrom,
    Embeddings,
    LayerKeys,
    LayerRead,
    PositionKernel,
    Read,
    RotaryTables,
    TextEmbeddings,
    TextKeys,
)
from tokenprune.engine.decoder import Decoder
from tokenprune.engine.reads.attention_tap import AttentionCall
from tokenprune.engine.reads.from_layer import from_layer, position_kernel, query_places, rotary_tables
from tokenprune.engine.reads.look_ahead import KeysAhead, look_ahead
from tokenprune.engine.sequence.gathered import GatheredSequence
from tokenprune.engine.sequence.layer_inputs import LayerInputs
from tokenprune.engine.sequence.positions import cos_and_sin, for_layer, no_rotation, tables_of
from tokenprune.errors import EngineError, InputError, PluginError, UnsupportedError


@dataclass(frozen=True)
class LayerInput:
    """What enters a layer, on the frame that it is about to run on.

    Attributes:
        layer: its number.
        hidden: [batch, M, width].
        kwargs: its keyword arguments for these states.
        whole: its keyword arguments for the full sequence.
        frame: the shortened sequence; None = the full one.
        active: bool [batch, N], the image tokens that take part.
        past: keys and values of its cache [batch, heads, K, size], in a later turn of a conversation; None = a prefill.
    """

    layer: int
    hidden: Tensor
    kwargs: dict[str, Any]
    whole: dict[str, Any]
    frame: GatheredSequence | None
    active: Tensor
    past: tuple[Tensor, Tensor] | None = None


class DecoderReads:
    """Collects what stages read of the layers before them and of their own first layer.

    Args:
        decoder: the decoder.
        due: the reads of the stages that begin at each layer.
        who: name of the strategy, for messages.

    Attributes:
        before: per layer, the reads of it, for the stage that begins after it.
        taps: per layer, those of them that its attention answers.
        costs: what was computed ahead for the layer that is about to run, for the ledger.
        keys_ahead: keys to hand on to the layer that is about to run; None = it computes them itself.
    """

    def __init__(self, decoder: Decoder, due: dict[int, set[Read]], who: str) -> None:
        self._decoder, self._who = decoder, who
        self.before: dict[int, list[Read]] = {
            layer - 1: reads for layer, known in due.items() if (reads := [read for read in known if read.looks_back])
        }
        seen = {layer: [read for read in reads if _is_rotated(read)] for layer, reads in self.before.items()}
        self.taps = {layer: reads for layer, reads in seen.items() if reads}
        self._kinds = {type(read) for known in due.values() for read in known}
        self.keys_ahead: KeysAhead | None = None
        self._answers: dict[Read, Tensor] = {}
        self._embeddings: dict[type[Read], Tensor] = {}
        self.costs: list[LookAhead] = []
        self._states: Tensor | None = None

    def keep_embeddings(self, kind: type[Embeddings] | type[TextEmbeddings], states: Callable[[], Tensor]) -> None:
        """Keep the states with which image or text tokens enter the decoder, if a stage reads them."""
        if kind in self._kinds:
            self._embeddings[kind] = states()

    def embeddings(self, kind: type[Embeddings] | type[TextEmbeddings]) -> Tensor | None:
        """What was kept; None before the first layer's stages have chosen."""
        return self._embeddings.get(kind)

    def known(self, read: Read) -> Tensor:
        """The answer of the layer before the stage."""
        return self._answers[read]

    def record(
        self,
        reads: Sequence[Read],
        seen: AttentionCall,
        layout: SequenceLayout,
        frame: GatheredSequence | None,
        active: Tensor,
    ) -> None:
        """Answer reads from the attention of a layer; those that are known already stay.

        Raises:
            InputError, EngineError: a query row is missing or was pruned; the error names the strategy.
            PluginError: a plugin's own read failed.
        """
        for read in reads:
            if read in self._answers:
                continue
            try:
                self._answers[read] = from_layer(read, seen, layout, frame, active, self._states)
            except (InputError, EngineError, PluginError) as error:
                raise type(error)(f"strategy {self._who!r}: {error}") from error

    def before_layer(self, given: LayerInput, layout: SequenceLayout, inputs: LayerInputs) -> int:
        """Answer what cannot be read of the layer's own attention; returns the query rows that will be read of it.

        Args:
            given: what enters the layer.
            layout: layout of the batch.
            inputs: the prefill's arguments.
        """
        reads = self.before[given.layer]
        if any(isinstance(read, LayerRead) for read in reads):
            self._states = given.hidden
        keys = [read for read in reads if isinstance(read, (LayerKeys, TextKeys))]
        if keys and inputs.first_tables(tables_of(given.whole), layout.valid) is not None:
            # padding shifts positions, which attention ignores but keys do not: undo the shift
            tables = inputs.from_first(
                given.layer, tables_of(given.kwargs), tables_of(given.whole), given.hidden, layout.valid
            )
            seen = self._look_ahead(given, tables)
            self.record(keys, seen, layout, given.frame, given.active)
        plain = [read for read in reads if not _is_rotated(read)]
        if plain:
            rows, own = self._needed(plain, given, layout)
            seen = self._look_ahead(given, no_rotation(tables_of(given.kwargs)), rows, own)
            if own:  # every row was projected, attention computed only for those that an AttentionFrom reads
                scored = sum(
                    layout.query_rows(read.query).shape[1] for read in plain if isinstance(read, AttentionFrom)
                )
                self.costs[-1] = replace(self.costs[-1], scored=scored)
            self.record(plain, seen, layout, given.frame, given.active)
        queries = [read.query for read in self.taps.get(given.layer, ()) if isinstance(read, AttentionFrom)]
        return sum(layout.query_rows(query).shape[1] for query in queries)

    def _needed(self, reads: Sequence[Read], given: LayerInput, layout: SequenceLayout) -> tuple[Tensor, bool]:
        """The query rows, int64 [batch, R], that these reads need of a layer, and whether they need its values."""
        if any(isinstance(read, LayerRead) for read in reads):
            every = torch.arange(given.hidden.shape[1], device=given.hidden.device)
            return every.expand(len(given.hidden), -1), True
        names = {read.query for read in reads if isinstance(read, AttentionFrom)}
        return torch.cat([query_places(name, layout, given.frame) for name in sorted(names)], 1), False

    def ahead(
        self,
        read: AttentionFrom | PositionKernel | RotaryTables,
        given: LayerInput,
        layout: SequenceLayout,
        inputs: LayerInputs,
    ) -> Tensor:
        """The answer of the stage's first layer, computed ahead of it on the states that enter it."""
        if given.kwargs.get("position_embeddings") is None and not self._decoder.attends[given.layer]:
            raise UnsupportedError(
                f"layer {given.layer} takes no rotary tables, so that {type(read).__name__} cannot be read of it; let "
                "the stage begin at a layer that attends to the sequence"
            )
        now = tables_of(given.kwargs)
        if isinstance(read, RotaryTables):
            apart = inputs.tables_by_axis(given.layer, tables_of(given.whole), given.hidden, layout.valid)
            if apart is None:
                apart = inputs.from_first(given.layer, now, tables_of(given.whole), given.hidden, layout.valid)
            elif given.frame is not None:
                apart = tuple(given.frame.prefill_table(table) for table in apart)
            return rotary_tables(cos_and_sin(apart or self._unrotated(given)), layout, given.frame, given.active)
        if isinstance(read, PositionKernel):
            scaling = float(getattr(self._decoder.attention(given.layer), "scaling"))  # noqa: B009
            tables = cos_and_sin(now or self._unrotated(given))
            return position_kernel(read, tables, scaling, layout, given.frame)
        rows = query_places(read.query, layout, given.frame)
        seen = self._look_ahead(given, now if read.rotary else no_rotation(now), rows, after=read.rotary)
        return from_layer(read, seen, layout, given.frame, given.active)

    def _unrotated(self, given: LayerInput) -> tuple[Tensor, ...]:
        """Rotary tables [1, M, D] that rotate nothing, of a layer that has none."""
        ids = torch.arange(given.hidden.shape[1], device=given.hidden.device)[None]
        return no_rotation(self._decoder.tables(given.layer, given.hidden[:1], ids))

    def _look_ahead(
        self,
        given: LayerInput,
        tables: tuple[Tensor, ...],
        rows: Tensor | None = None,
        values: bool = False,
        after: bool = False,
    ) -> AttentionCall:
        """See `look_ahead`; with these rotary tables. In a later turn the attention is among the turn's own tokens
        unless it is `after` the cached keys, which are rotated by the layer's own tables."""
        kwargs = {**given.kwargs, "position_embeddings": for_layer(tables)}
        ahead = look_ahead(self._decoder, given.layer, given.hidden, kwargs, given.frame, rows, values)
        seen, cost = ahead.seen, ahead.cost
        if given.past is not None and after:
            seen = seen.after(*given.past)
            cost = replace(cost, before=seen.earlier)
        elif given.past is not None and seen.mask is not None:
            seen = replace(seen, mask=seen.mask[..., given.past[0].shape[2] :])
        self.costs.append(cost)
        self.keys_ahead = ahead.keys
        return seen

    def stage_entered(self, frame: GatheredSequence | None) -> None:
        """After the stages at a layer have chosen: forget their answers, keep the keys of the frame that it runs on."""
        self._answers.clear()
        self._states = None
        if self.keys_ahead is not None:
            self.keys_ahead.keep(frame)

    def states_changed(self) -> None:
        """After a stage wrote states: keys that were computed ahead are of the states before."""
        if self.keys_ahead is not None:
            self.keys_ahead.forget()

    def forget(self) -> None:
        """Release all tensors after the last layer."""
        self._embeddings.clear()
        self._answers.clear()


def _is_rotated(read: Read) -> bool:
    """Whether a read of a layer can be answered by the layer's own attention."""
    return not isinstance(read, (AttentionFrom, LayerRead)) or read.rotary
