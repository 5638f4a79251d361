"""One pruned prefill: the scheduler's decisions carried out on the hidden states of a real decoder."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from tokenprune.core.layout import SequenceLayout
from tokenprune.core.ledger import LookAhead
from tokenprune.core.reads import (
    AttentionFrom,
    Embeddings,
    HiddenStates,
    LayerKeys,
    PositionKernel,
    Read,
    TextEmbeddings,
    TextKeys,
    TextStates,
)
from tokenprune.core.scheduling.plan import PlannedStage
from tokenprune.core.scheduling.scheduler import TokenScheduler
from tokenprune.core.scheduling.state import spread_rows
from tokenprune.core.strategy import Strategy
from tokenprune.engine.attention_tap import AttentionCall
from tokenprune.engine.decoder import Decoder
from tokenprune.engine.decoder_reads import from_layer, position_kernel, query_places
from tokenprune.engine.deepstack import DeepStack
from tokenprune.engine.gathered import GatheredSequence
from tokenprune.engine.interface.vision_source import VisionSource, check_aligned
from tokenprune.engine.layer_inputs import LayerInputs
from tokenprune.engine.look_ahead import KeysAhead, look_ahead
from tokenprune.engine.positions import shifted_tables, tables_of
from tokenprune.engine.shared_prefix import SharedPrefix
from tokenprune.errors import EngineError, InputError


class Prefill(TokenScheduler):
    """Holds the full-length states of a prefill, and the shortened sequence (frame) that the current layer runs on.

    Attributes:
        frames: per layer, the frame that it ran on; None = the full sequence.
        lengths: per layer, int64 [batch], the number of positions when they were renumbered, −1 in rows that were
            not renumbered; None = no row was.
        full: [batch, S, width], the last state of every position; available only while a stage is entered.
        taps: per layer, the reads that its attention answers, for the stage that begins after it.
        keys_ahead: keys to hand on to the layer that is about to run; None = it computes them itself.
        shared: runs the layers, if the rows are said to begin with the same tokens.
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
        self.taps: dict[int, list[Read]] = {
            layer - 1: reads
            for layer in self._due
            if (reads := [read for read in self.reads_before(layer) if read.looks_back])
        }
        self.frames: list[GatheredSequence | None] = []
        self.lengths: list[Tensor | None] = []
        self._inputs = LayerInputs(decoder)
        self.full: Tensor
        self._frame: GatheredSequence | None = None
        self._absent_states: Tensor | None = None
        self._returned_full = False
        self.deepstack: DeepStack | None = None
        self._embeddings: dict[type[Read], Tensor] = {}
        self._answers: dict[Read, Tensor] = {}
        self._entering: tuple[int, dict[str, Any]] | None = None
        self.keys_ahead: KeysAhead | None = None
        self._looked_ahead: list[LookAhead] = []
        rows = len(layout.valid)
        self.shared = SharedPrefix(decoder, shared, layout.on_host.valid) if shared and rows > 1 else None

    # the methods that TokenScheduler calls ---------------------------------------------------------------------------

    def offers(self) -> frozenset[type[Read]]:
        """The reads that the decoder and the vision side provide."""
        return self.decoder.offers | frozenset(self.vision.answers)

    def provide(self, read: Read) -> Any:
        """See `TokenScheduler.provide`."""
        if read.looks_back:
            return self._answers[read]
        if isinstance(read, (Embeddings, TextEmbeddings)) and type(read) in self._embeddings:
            return self._embeddings[type(read)]
        if isinstance(read, Embeddings):  # a stage before the first layer
            return self.hidden()
        if isinstance(read, HiddenStates):
            return self._normed(self.hidden(), read.normed)
        if isinstance(read, TextStates):
            text = self.layout.gather_text(self.full.to(self.layout.slots.device))
            return self._normed(text, read.normed)
        if isinstance(read, (AttentionFrom, PositionKernel)):
            return self._compute_ahead(read)
        return check_aligned(self.vision.provide(read), read, self.state.exists.shape, self.vision.source or self.model)

    def owns(self, read: Read) -> bool:
        """True for reads of the decoder; answers of the vision side may be shared by several prefills."""
        return type(read) not in self.vision.answers

    def hidden(self) -> Tensor:
        """[batch, N, width], on the layout's device, whichever device the current layer is on."""
        return self.layout.gather_slots(self.full.to(self.layout.slots.device))

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
        if self.keys_ahead is not None:
            self.keys_ahead.forget()  # they are of the states before
        self.full = spread_rows(values.to(full), positions.to(full.device), full.shape[1], base=full)

    def settle(self, planned: PlannedStage) -> None:
        """Renumber positions if the stage's policy says so; see `TokenScheduler.settle`."""
        if self.policy(planned.stage) == "renumber":
            rows, present = (
                part.to(self.layout.valid.device, non_blocking=True) for part in (planned.group.rows, self._present())
            )
            self._inputs.renumber(rows, present, self.layout.drafted)

    # the layers ------------------------------------------------------------------------------------------------------

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
            self._keep_embeddings(TextEmbeddings)
            if 0 not in self._due:
                self._keep_embeddings(Embeddings)
        elif self._returned_full:
            hidden = self._gather_again(layer, hidden)
        if layer in self._due:
            hidden = self._enter_stage(layer, kwargs)
        if self.shared is not None and (layer == 0 or layer in self._due):
            self.shared.begin(hidden, self._frame)
        self.full = hidden.new_empty(0, *hidden.shape[1:])  # free the second copy of the states
        self.frames.append(self._frame)
        self.lengths.append(self._inputs.length)
        reads = self.taps.get(layer)
        keys = [read for read in reads if isinstance(read, (LayerKeys, TextKeys))] if reads else None
        first = self._inputs.first_tables(tables_of(kwargs), self.layout.valid) if keys else None
        if self._frame is not None:
            self._inputs.shorten(layer, kwargs, hidden, self._frame)
        if first is not None:  # padding shifts positions, which attention ignores but keys do not: undo the shift
            moved = shifted_tables(tables_of(kwargs), first, self._inputs.length)
            seen = self._look_ahead(layer, hidden, {**kwargs, "position_embeddings": moved}, self._frame)
            self.record_attention(layer, seen, keys)
        self.account(layer, hidden.shape[1], self._scored(reads) if reads else 0, tuple(self._looked_ahead))
        self._looked_ahead.clear()
        return hidden

    def _enter_stage(self, layer: int, kwargs: dict[str, Any]) -> Tensor:
        """Apply the decisions of a stage to the states in `full`; returns the input of its first layer."""
        self._entering = layer, kwargs
        self.enter(layer)
        self._entering = None
        if layer == 0:
            self._keep_embeddings(Embeddings)
        self._answers.clear()
        self._frame = self._next_frame()
        if self.keys_ahead is not None:
            self.keys_ahead.keep(self._frame)
        hidden, self._absent_states = (self.full, None) if self._frame is None else self._frame.split(self.full)
        return hidden

    def _scored(self, reads: Sequence[Read]) -> int:
        """Number of query rows whose attention these reads require."""
        rows = [read.query for read in reads if isinstance(read, AttentionFrom)]
        return sum(self.layout.query_rows(query).shape[1] for query in rows)

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
        if self.keys_ahead is not None:
            self.account_reused(self.keys_ahead.used)
            self.keys_ahead = None
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
        self._embeddings.clear()
        self.deepstack = None
        self._inputs.forget()
        self.finish()
        return full

    def record_attention(self, layer: int, seen: AttentionCall, reads: Sequence[Read] | None = None) -> None:
        """Callback of the attention tap in `layer`: store the answers to its reads, or to `reads`."""
        for read in reads or [read for read in self.taps[layer] if read not in self._answers]:
            try:
                self._answers[read] = from_layer(read, seen, self.layout, self._frame, self.state.active)
            except (InputError, EngineError) as error:
                raise type(error)(f"strategy {self.strategy.name!r}: {error}") from error

    # ------------------------------------------------------------------------------------------------------------------

    def _compute_ahead(self, read: AttentionFrom | PositionKernel) -> Tensor:
        """The answer of the stage's first layer, computed ahead of it on the states that enter it."""
        assert self._entering is not None
        layer, kwargs = self._entering[0], dict(self._entering[1])
        frame = self._next_frame()
        hidden = self.full if frame is None else frame.gather(self.full)
        if frame is not None:
            self._inputs.shorten(layer, kwargs, hidden, frame)
        if isinstance(read, PositionKernel):
            scaling = float(getattr(self.decoder.attention(layer), "scaling"))  # noqa: B009
            return position_kernel(read, tables_of(kwargs), scaling, self.layout, frame)
        rows = query_places(read.query, self.layout, frame)
        seen = self._look_ahead(layer, hidden, kwargs, frame, rows)
        return from_layer(read, seen, self.layout, frame, self.state.active)

    def _look_ahead(
        self,
        layer: int,
        hidden: Tensor,
        kwargs: dict[str, Any],
        frame: GatheredSequence | None,
        rows: Tensor | None = None,
    ) -> AttentionCall:
        ahead = look_ahead(self.decoder, layer, hidden, kwargs, frame, rows)
        self._looked_ahead.append(ahead.cost)
        self.keys_ahead = ahead.keys
        return ahead.seen

    def _normed(self, states: Tensor, normed: bool) -> Tensor:
        norm: Any = self.decoder.module.norm
        return norm(states).to(states.device) if normed else states

    def _next_frame(self) -> GatheredSequence | None:
        if self._inputs.length is None and torch.equal(self.active, self.layout.on_host.slots >= 0):
            return None  # nothing was pruned or renumbered: use the model's own masks and tables
        present = self._present()
        if not bool(present.any(1).all()):
            raise EngineError(
                f"strategy {self.strategy.name!r} left a batch row without tokens; rows need at least one text token"
            )
        return GatheredSequence.of(present).to(self.layout.valid.device)

    def _keep_embeddings(self, kind: type[Read]) -> None:
        if any(isinstance(read, kind) for planned in self.planned for read in planned.stage.reads):
            self._embeddings[kind] = self.hidden() if kind is Embeddings else self.provide(TextStates())

    def _present(self) -> Tensor:
        """bool [batch, S], on the host: text, and the image tokens that are active."""
        layout = self.layout.on_host
        flags = spread_rows(self.active, layout.slots, layout.image_tokens.shape[1])
        return (layout.valid & ~layout.image_tokens) | flags
