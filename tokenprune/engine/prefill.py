"""One pruned prefill: the scheduler's decisions carried out on the hidden states of a real decoder."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from tokenprune.base import Strategy
from tokenprune.engine.decoder import Decoder
from tokenprune.engine.deepstack import DeepStack
from tokenprune.engine.frame import Frame
from tokenprune.engine.tap import Seen
from tokenprune.engine.vision import VisionSource
from tokenprune.errors import EngineError, UnsupportedError
from tokenprune.fit import DECODER_READS
from tokenprune.layout import SequenceLayout
from tokenprune.reads import AttentionFrom, Embeddings, HiddenStates, Read
from tokenprune.scheduler import Observer, TokenScheduler
from tokenprune.state import spread_rows


class Prefill(TokenScheduler):
    """Holds the full-length states of a prefill and the frame that the present layer runs on.

    Attributes:
        frames: per layer, the frame that it ran on; None = the full sequence.
        full: [batch, S, width], the last known state of every position.
    """

    def __init__(
        self,
        strategy: Strategy,
        layout: SequenceLayout,
        decoder: Decoder,
        *,
        vision: VisionSource | None = None,
        observer: Observer | None = None,
        seed: int = 0,
    ) -> None:
        self.decoder, self.vision = decoder, vision or VisionSource()
        super().__init__(
            strategy,
            layout,
            len(decoder.layers),
            model=type(decoder.module).__name__,
            tower_layers=self.vision.layers,
            observer=observer,
            seed=seed,
        )
        self.frames: list[Frame | None] = []
        self.full: Tensor
        self._frame: Frame | None = None
        self.deepstack: DeepStack | None = None
        self._embeddings: Tensor | None = None
        self._attention: dict[Read, Tensor] = {}

    # what TokenScheduler asks of us ----------------------------------------------------------------------------------

    def offers(self) -> frozenset[type[Read]]:
        """The decoder's own reads, and what the vision side offers."""
        return DECODER_READS | frozenset(self.vision.answers)

    def provide(self, read: Read) -> Any:
        """See `TokenScheduler.provide`."""
        if isinstance(read, AttentionFrom):
            return self._attention[read]
        if isinstance(read, HiddenStates):
            return self.hidden()
        if isinstance(read, Embeddings):
            assert self._embeddings is not None
            return self._embeddings
        return self.vision.provide(read)

    def hidden(self) -> Tensor:
        """[batch, N, width], on the layout's device, whichever device the layers have come to."""
        return self.layout.gather_slots(self.full.to(self.layout.slots.device))

    @property
    def width(self) -> int:
        """Hidden size of the decoder."""
        return int(self.full.shape[-1])

    def write(self, index: Tensor, values: Tensor) -> None:
        """See `TokenScheduler.write`; out of place, so that gradients and the caller's tensors are left alone."""
        positions = torch.where(index < 0, -1, self.layout.slots.gather(1, index.clamp(min=0)))
        full = self.full
        self.full = spread_rows(values.to(full), positions.to(full.device), full.shape[1], base=full)

    # the layers ------------------------------------------------------------------------------------------------------

    def before_layer(self, layer: int, hidden: Tensor, kwargs: dict[str, Any]) -> Tensor:
        """Turn a layer's input into what it runs on; `kwargs` is changed in place. Returns the hidden states to use.

        Args:
            layer: decoder layer.
            hidden: [batch, S, width] for layer 0, else what the layer before gave, on its frame.
            kwargs: the layer's keyword arguments, made for the full sequence.
        """
        if layer == 0:
            self.full = hidden
            if any(isinstance(read, Embeddings) for planned in self.planned for read in planned.stage.reads):
                self._embeddings = self.hidden()
        else:
            hidden = self._deepened(layer - 1, hidden)
        if self.due(layer):
            self._write_back(hidden)
            self.enter(layer)
            self._attention.clear()
            self._frame = self._next_frame()
            hidden = self.full if self._frame is None else self._frame.gather(self.full)
        self.frames.append(self._frame)
        if self._frame is None:
            self.full = hidden.new_empty(0, *hidden.shape[1:])  # the layers have the states: hold no second copy
        else:
            self._shorten(layer, kwargs, hidden, self._frame)
        self.account(layer, hidden.shape[1], sum(self.scored(read).shape[1] for read in self.taps(layer)))
        return hidden

    def after_last(self, hidden: Tensor) -> Tensor:
        """The full-length output [batch, S, width]; dropped positions hold their last state."""
        self._write_back(self._deepened(self.layers - 1, hidden))
        full = self.full
        del self.full
        self._embeddings = self.deepstack = None
        for frame in self.frames:
            if frame is not None:
                frame.forget()
        self.finish()
        return full

    def taps(self, layer: int) -> list[AttentionFrom]:
        """Attention reads that `layer` has to answer: those of the stage that begins after it."""
        return [read for read in self.reads_before(layer + 1) if isinstance(read, AttentionFrom)]

    def scored(self, read: AttentionFrom) -> Tensor:
        """int64 [batch, Q]: full-sequence positions of the query rows, −1 where a row has fewer."""
        return self.layout.query_rows(read.query)

    def see(self, layer: int, seen: Seen) -> None:
        """Callback of the attention tap in `layer`: answer its attention reads."""
        for read in self.taps(layer):
            positions = self.scored(read)
            rows = positions if self._frame is None else self._frame.places(positions)
            if bool(((positions >= 0) & (rows < 0)).any()):
                raise EngineError(f"query row {read.query!r} is an image token that was pruned; mark a text position")
            weights = seen.attention(rows).mean(1)
            self._attention[read] = self._over_image_tokens(_reduce(weights, positions >= 0, read.reduce))

    # ------------------------------------------------------------------------------------------------------------------

    def _over_image_tokens(self, weights: Tensor) -> Tensor:
        slots = self.layout.slots
        places = slots if self._frame is None else self._frame.places(slots)
        taken = weights.gather(1, places.clamp(min=0).to(weights.device)).to(slots.device)
        return taken.masked_fill(~self.state.active | (places < 0), float("-inf"))

    def _write_back(self, hidden: Tensor) -> None:
        self.full = hidden if self._frame is None else self._frame.scatter(hidden, self.full)

    def _next_frame(self) -> Frame | None:
        state, layout = self.state, self.layout
        if torch.equal(state.active, state.exists) and self.strategy.positions == "keep":
            return None
        flags = spread_rows(state.active, layout.slots, layout.image_tokens.shape[1])
        present = (layout.valid & ~layout.image_tokens) | flags
        if not bool(present.any(1).all()):
            raise EngineError(
                f"strategy {self.strategy.name!r} left a batch row without any token; rows need at least one text token"
            )
        return Frame.of(present)

    def _deepened(self, layer: int, hidden: Tensor) -> Tensor:
        return hidden if self.deepstack is None else self.deepstack.add(layer, hidden, self._frame)

    def _shorten(self, layer: int, kwargs: dict[str, Any], hidden: Tensor, frame: Frame) -> None:
        kwargs["attention_mask"] = frame.prefill_mask(kwargs.get("attention_mask"))
        ids = kwargs.get("position_ids")
        if self.strategy.positions == "renumber":
            ids = torch.arange(frame.width, device=hidden.device).expand(hidden.shape[0], -1)
            kwargs["position_embeddings"] = tuple(
                frame.once(table, partial(self._renumbered, number, layer, hidden, ids))
                for number, table in enumerate(_tables(kwargs))
            )
        else:
            kwargs["position_embeddings"] = tuple(frame.prefill_table(t) for t in _tables(kwargs))
            if ids is not None:
                ids = frame.prefill_ids(ids)
        kwargs["position_ids"] = ids

    def _renumbered(self, number: int, layer: int, hidden: Tensor, ids: Tensor, table: Tensor) -> Tensor:
        return self.decoder.tables(layer, hidden, ids)[number]


def _tables(kwargs: Mapping[str, Any]) -> tuple[Tensor, ...]:
    tables = kwargs.get("position_embeddings")
    if not isinstance(tables, tuple) or not all(isinstance(table, Tensor) for table in tables):
        raise UnsupportedError(
            "the decoder layers do not take position_embeddings=(cos, sin), which the engine has to shorten"
        )
    return tables


def _reduce(weights: Tensor, real: Tensor, how: str) -> Tensor:
    """[batch, Q, K] over the query rows that are real: [batch, K]."""
    real = real.to(weights.device)[..., None]
    if how == "max":
        return weights.masked_fill(~real, float("-inf")).amax(1)
    if how == "mean":
        return (weights * real).sum(1) / real.sum(1)
    raise EngineError(f"AttentionFrom(reduce={how!r}) is not known; use 'mean' or 'max'")
