"""One pruned prefill: the scheduler's decisions carried out on the hidden states of a real decoder."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from tokenprune.core.layout import SequenceLayout
from tokenprune.core.reads import (
    AttentionFrom,
    Embeddings,
    HiddenStates,
    PositionKernel,
    Read,
    RotaryTables,
    TextEmbeddings,
    TextStates,
)
from tokenprune.core.scheduling.plan import PlannedStage
from tokenprune.core.scheduling.requirements import check_layers
from tokenprune.core.scheduling.scheduler import TokenScheduler
from tokenprune.core.scheduling.state import spread_rows
from tokenprune.core.strategy import Strategy
from tokenprune.engine.caches.earlier import EarlierCaches
from tokenprune.engine.caches.filled_cache import FilledCache
from tokenprune.engine.caches.later_inputs import LaterInputs
from tokenprune.engine.decoder import Decoder
from tokenprune.engine.interface.vision_source import VisionSource, check_aligned
from tokenprune.engine.reads.attention_tap import AttentionCall
from tokenprune.engine.reads.decoder_reads import DecoderReads, LayerInput
from tokenprune.engine.sequence.deepstack import DeepStack
from tokenprune.engine.sequence.gathered import GatheredSequence
from tokenprune.engine.sequence.layer_inputs import LayerInputs
from tokenprune.engine.sequence.shared_prefix import SharedPrefix
from tokenprune.engine.sequence.temperature import lacking_scale
from tokenprune.errors import EngineError


class Prefill(TokenScheduler):
    """Holds the full-length states of a prefill, and the shortened sequence (frame) that the current layer runs on.

    Attributes:
        frames: per layer, the frame that it ran on; None = the full sequence.
        lengths: per layer, int64 [batch], the number of positions when they were renumbered, −1 in rows that were
            not renumbered; None = no row was.
        full: [batch, S, width], the last state of every position; available only while a stage is entered.
        reads: what the stages read of the decoder.
        earlier_caches: what the KV caches of earlier layers lose after the prefill.
        shared: runs the layers, if the rows are said to begin with the same tokens.
        filled: the cache that it continues, as a later turn of a conversation does; None = it begins one.
    """

    def __init__(
        self,
        strategy: Strategy,
        layout: SequenceLayout,
        decoder: Decoder,
        *,
        vision: VisionSource | None = None,
        tell: Callable[..., None] | None = None,
        seed: int = 0,
        strict: bool = False,
        shared: int = 0,
        filled: FilledCache | None = None,
    ) -> None:
        self.decoder, self.vision = decoder, vision or VisionSource()
        super().__init__(
            strategy,
            layout,
            len(decoder.layers),
            model=type(decoder.module).__name__,
            tower_layers=self.vision.layers,
            heads=decoder.heads,
            tell=tell,
            seed=seed,
            strict=strict,
        )
        check_layers(self.strategy.name, self.model, [planned.stage for planned in self.planned], decoder.attends)
        due = {layer: self.reads_before(layer) for layer in self._due}
        self.reads = DecoderReads(decoder, due, self.strategy.name)
        self.earlier_caches = EarlierCaches(layout.on_host.valid)
        self.frames: list[GatheredSequence | None] = []
        self.lengths: list[Tensor | None] = []
        self.filled = filled
        self._inputs = LayerInputs(decoder) if filled is None else LaterInputs(decoder, filled, layout.valid)
        self.full: Tensor
        self._frame: GatheredSequence | None = None
        self._absent_states: Tensor | None = None
        self._returned_full = False
        self.deepstack: DeepStack | None = None
        self._entering: tuple[int, dict[str, Any]] | None = None
        rows = len(layout.valid)
        self.shared = SharedPrefix(decoder, shared, layout.on_host.valid) if shared and rows > 1 else None

    # the methods that TokenScheduler calls ---------------------------------------------------------------------------

    def offers(self) -> frozenset[type[Read]]:
        """The reads that the decoder and the vision side provide."""
        return self.decoder.offers | frozenset(self.vision.answers)

    def provide(self, read: Read) -> Any:
        """See `TokenScheduler.provide`."""
        if read.looks_back:
            return self.reads.known(read)
        if isinstance(read, (Embeddings, TextEmbeddings)):
            kept = self.reads.embeddings(type(read))
            return self.hidden() if kept is None else kept  # in a stage before the first layer
        if isinstance(read, HiddenStates):
            return self._normed(self.hidden(), read.normed)
        if isinstance(read, TextStates):
            return self._normed(self._text(), read.normed)
        if isinstance(read, (AttentionFrom, PositionKernel, RotaryTables)):
            return self.reads.ahead(read, self._entering_layer(), self.layout, self._inputs)
        return check_aligned(self.vision.provide(read), read, self.state.exists.shape, self.vision.source or self.model)

    def owns(self, read: Read) -> bool:
        """True for reads of the decoder; answers of the vision side may be shared by several prefills."""
        return type(read) not in self.vision.answers

    def hidden(self) -> Tensor:
        """[batch, N, width], on the layout's device, whichever device the current layer is on."""
        return self.layout.gather_slots(self.full.to(self.layout.slots.device))

    def _text(self) -> Tensor:
        """[batch, T, width], as `hidden`."""
        return self.layout.gather_text(self.full.to(self.layout.slots.device))

    @property
    def width(self) -> int:
        """Hidden size of the decoder."""
        return int(self.full.shape[-1])

    @property
    def dtype(self) -> torch.dtype:
        """Type of the decoder's states."""
        return self.full.dtype

    def write(self, index: Tensor, values: Tensor) -> None:
        """See `TokenScheduler.write`; out of place, to preserve gradients and the caller's tensors."""
        # from image-token numbers to sequence positions; −1 is not written
        positions = torch.where(index < 0, -1, self.layout.slots.gather(1, index.clamp(min=0)))
        full = self.full
        self.reads.states_changed()
        self.full = spread_rows(values.to(full), positions.to(full.device), full.shape[1], base=full)

    def settle(self, planned: PlannedStage) -> None:
        """Renumber positions if the stage's policy says so, and note what caches lose; see `TokenScheduler.settle`."""
        if planned.stage.prune_earlier_caches:
            self.earlier_caches.prune(planned.stage, planned.group.rows, self._present())
        if self.policy(planned.stage) == "renumber":
            rows, present = (
                part.to(self.layout.valid.device, non_blocking=True) for part in (planned.group.rows, self._present())
            )
            self._inputs.renumber(rows, present, self.layout.drafted)

    # the layers ------------------------------------------------------------------------------------------------------

    def note_positions(self, ids: Any) -> None:
        """Before the first layer: the position ids that the decoder was given, or None."""
        self._inputs.ids = ids

    def before_layer(self, layer: int, hidden: Tensor, kwargs: dict[str, Any]) -> Tensor:
        """Prune a layer's input: returns the hidden states to use, and changes `kwargs` in place.

        Args:
            layer: decoder layer.
            hidden: [batch, S, width] for layer 0, else the output of the layer before, on its frame.
            kwargs: the layer's keyword arguments, made for the full sequence.
        """
        if layer == 0:
            if self.planned:  # now, rather than when the first token is pruned
                self.decoder.check_mask(kwargs.get("attention_mask"))
            self.full = hidden
            self.reads.keep_embeddings(TextEmbeddings, self._text)
            if 0 not in self._due:
                self.reads.keep_embeddings(Embeddings, self.hidden)
        elif self._returned_full:
            hidden = self._gather_again(layer, hidden)
        if layer in self._due:
            hidden = self._enter_stage(layer, kwargs)
        if self.shared is not None and (layer == 0 or layer in self._due):
            self.shared.begin(hidden, self._frame)
        self.full = hidden.new_empty(0, *hidden.shape[1:])  # free the second copy of the states
        self.frames.append(self._frame)
        self.lengths.append(self._inputs.length if self.filled is None else self._inputs.positions(layer))
        is_read, scored = layer in self.reads.before, 0
        whole = dict(kwargs) if is_read else kwargs
        if self._frame is not None or self.filled is not None:
            self._inputs.shorten(layer, kwargs, hidden, self._frame)
        if is_read:
            given = LayerInput(layer, hidden, kwargs, whole, self._frame, self.state.active, self._past(layer))
            scored = self.reads.before_layer(given, self.layout, self._inputs)
        earlier = 0 if self.filled is None else self.filled.before[layer]
        self.account(layer, hidden.shape[1], scored, tuple(self.reads.costs), earlier)
        self.reads.costs.clear()
        return hidden

    def _enter_stage(self, layer: int, kwargs: dict[str, Any]) -> Tensor:
        """Apply the decisions of a stage to the states in `full`; returns the input of its first layer."""
        self._entering = layer, kwargs
        self.enter(layer)
        self._entering = None
        if layer == 0:
            self.reads.keep_embeddings(Embeddings, self.hidden)
        self._frame = self._next_frame()
        self.reads.stage_entered(self._frame)
        hidden, self._absent_states = (self.full, None) if self._frame is None else self._frame.split(self.full)
        return hidden

    def lacking_scale(self, layer: int) -> Tensor | None:
        """What the queries of a layer lack on its frame; see `sequence.temperature`."""
        frame = self.frames[layer]
        return None if frame is None else lacking_scale(self.decoder.attention_of(layer), frame)

    def after_layer(self, layer: int, hidden: Tensor, full: bool = False) -> Tensor:
        """The states to pass to the next layer.

        After the last layer, or if `full`, the full-length output [batch, S, width], in which dropped positions have
        their last state. Otherwise the next layer's input; before a stage an empty tensor, since the states are in
        `full` and the model would keep a second copy alive.

        Args:
            layer: the decoder layer that has run.
            hidden: its output.
            full: whether other code observes the result.
        """
        if self.reads.keys_ahead is not None:
            self.account_reused(self.reads.keys_ahead.used)
            self.reads.keys_ahead = None
        last = layer == self.layers - 1
        self._returned_full = full and not last
        if self._returned_full:
            if self.shared is not None:
                self.shared.stop()
            return self._full_length(hidden)
        if self.deepstack is not None:
            hidden = self.deepstack.add(layer, hidden, self._frame)
        if not last and layer + 1 not in self._due:
            return hidden
        self.full = self._full_length(hidden)
        self._absent_states = None
        return self._finish_states() if last else hidden.new_empty(len(hidden), 0, hidden.shape[-1])

    def _full_length(self, hidden: Tensor) -> Tensor:
        """[batch, S, width] of states on the current frame."""
        return (
            hidden
            if self._frame is None or self._absent_states is None
            else self._frame.join(hidden, self._absent_states)
        )

    def _gather_again(self, layer: int, whole: Tensor) -> Tensor:
        """Undo `after_layer(full=True)`: states on the current frame, or at full length before a stage."""
        hidden, self._absent_states = (whole, None) if self._frame is None else self._frame.split(whole)
        if self.deepstack is not None:
            hidden = self.deepstack.add(layer - 1, hidden, self._frame)
        if layer in self._due:
            self.full = hidden = self._full_length(hidden)
        return hidden

    def _finish_states(self) -> Tensor:
        full = self.full
        del self.full
        self.reads.forget()
        self.deepstack = None
        self._inputs.forget()
        image_tokens = self.layout.on_host.image_tokens
        for layer in self.earlier_caches.layers:
            kept = self.earlier_caches.kept(layer, self.frames[layer])
            self.account_cached(layer, (kept & image_tokens).sum(1).tolist())
        self.finish()
        return full

    def record_attention(self, layer: int, seen: AttentionCall) -> None:
        """Callback of the attention tap in `layer`."""
        if self.filled is not None:
            seen = replace(seen, earlier=self.filled.before[layer])
        self.reads.record(self.reads.taps[layer], seen, self.layout, self._frame, self.state.active)

    # ------------------------------------------------------------------------------------------------------------------

    def _entering_layer(self) -> LayerInput:
        """What would enter the stage's first layer if the stages so far were all."""
        assert self._entering is not None
        layer, whole = self._entering
        kwargs = dict(whole)
        frame = self._next_frame()
        hidden = self.full if frame is None else frame.gather(self.full)
        self._inputs.shorten(layer, kwargs, hidden, frame)
        return LayerInput(layer, hidden, kwargs, whole, frame, self.state.active, self._past(layer))

    def _past(self, layer: int) -> tuple[Tensor, Tensor] | None:
        """Keys and values of a layer before a later turn."""
        return None if self.filled is None else self.filled.keys(layer)

    def _normed(self, states: Tensor, normed: bool) -> Tensor:
        return self.decoder.norm(states).to(states.device) if normed else states

    def _next_frame(self) -> GatheredSequence | None:
        if self._inputs.length is None and torch.equal(self.active, self.layout.on_host.slots >= 0):
            return None  # nothing was pruned or renumbered: use the model's own masks and tables
        present = self._present()
        silent = (
            ~self.layout.on_host.valid.any(1) if self.filled is not None else False
        )  # rows that say nothing in a turn
        if not bool((present.any(1) | silent).all()):
            raise EngineError(
                f"strategy {self.strategy.name!r} left a batch row without tokens; rows need at least one text token"
            )
        return GatheredSequence.of(present, self.decoder.keeps_states).to(self.layout.valid.device)

    def _present(self) -> Tensor:
        """bool [batch, S], on the host: text, and the image tokens that are active."""
        layout = self.layout.on_host
        flags = spread_rows(self.active, layout.slots, layout.image_tokens.shape[1])
        return (layout.valid & ~layout.image_tokens) | flags
