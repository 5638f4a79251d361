"""The pruning context: hooks on a decoder that carry a strategy through prefill and cached decoding."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, nn

from tokenprune.base import Strategy
from tokenprune.engine.cache import Lease, adopt
from tokenprune.engine.decoder import Decoder, find_decoder
from tokenprune.engine.frame import Frame
from tokenprune.engine.prefill import Prefill
from tokenprune.engine.tap import tap
from tokenprune.engine.vision import VisionSource
from tokenprune.errors import EngineError, InputError, UnsupportedError
from tokenprune.layout import SequenceLayout
from tokenprune.scheduler import Observer
from tokenprune.trace import Trace

_BUSY: WeakSet[nn.Module] = WeakSet()
_LOCK = threading.Lock()


class PruningRun:
    """What `with tokenprune.prune(...) as run` gives.

    Every forward without cached tokens is a prefill of its own; `trace` tells of the latest one.
    """

    def __init__(
        self,
        decoder: Decoder,
        strategy: Strategy,
        image_tokens: Tensor,
        *,
        queries: Mapping[str, Tensor] | None = None,
        grid: Tensor | None = None,
        image_number: Tensor | None = None,
        vision: VisionSource | None = None,
        observer: Observer | None = None,
        seed: int = 0,
    ) -> None:
        self.decoder, self.strategy = decoder, strategy
        self._marks = {"image_tokens": image_tokens, "grid": grid, "image_number": image_number}
        self._queries = dict(queries or {})
        self._vision, self._observer, self._seed = vision, observer, seed
        self._lease = Lease()
        self._attention_mask: Tensor | None = None
        self._prefill: Prefill | None = None
        self._decoding = False
        self._taps = ExitStack()
        self._new = self._past = 0

    @property
    def trace(self) -> Trace:
        """The trace of the latest prefill. Raises EngineError where none has run yet."""
        if self._prefill is None:
            raise EngineError("no prefill has run in this context yet, so there is no trace; call the model first")
        return self._prefill.trace

    # hooks -----------------------------------------------------------------------------------------------------------

    def attach(self, undo: ExitStack) -> None:
        """Put the hooks on; `undo` takes them off."""
        undo.callback(self._close)
        module = self.decoder.module
        undo.callback(module.register_forward_pre_hook(self._on_model, with_kwargs=True).remove)
        for number, layer in enumerate(self.decoder.layers):
            undo.callback(layer.register_forward_pre_hook(partial(self._on_layer, number), with_kwargs=True).remove)
        undo.callback(self.decoder.layers[-1].register_forward_hook(self._on_end).remove)

    def _close(self) -> None:
        self._lease.open = False
        self._taps.close()

    def _on_model(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if module.training and getattr(module, "gradient_checkpointing", False):
            raise UnsupportedError(
                "gradient checkpointing runs layers twice and is not supported under tokenprune.prune(); switch it off"
            )
        mask = kwargs.get("attention_mask", args[1] if len(args) > 1 else None)
        self._attention_mask = mask if isinstance(mask, Tensor) and mask.dim() == 2 else None

    def _on_layer(self, number: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        kwargs = dict(kwargs)
        hidden = args[0] if args else kwargs.pop("hidden_states")
        cache = kwargs.get("past_key_values")
        if number == 0:
            self._begin(hidden, cache)
        if self._prefill is None:
            raise EngineError(f"decoder layer {number} was called outside a forward of the whole decoder")
        if self._decoding:
            self._shorten_step(number, hidden, kwargs)
        else:
            hidden = self._prefill.before_layer(number, hidden, kwargs)
            self._note_absent(number, cache)
        return (hidden, *args[1:]), kwargs

    def _on_end(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        if self._decoding or self._prefill is None:
            return None
        self._taps.close()
        first = self._prefill.after_last(output[0] if isinstance(output, tuple) else output)
        return (first, *output[1:]) if isinstance(output, tuple) else first

    # prefill ---------------------------------------------------------------------------------------------------------

    def _begin(self, hidden: Tensor, cache: Any) -> None:
        held = 0 if cache is None else int(cache.get_seq_length())
        self._decoding = held > 0 and self._prefill is not None
        if self._decoding:
            assert self._prefill is not None
            self._new = hidden.shape[1]
            self._past = held - self._prefill.trace.layout.valid.shape[1]
            return
        self._taps.close()
        layout = self._layout(hidden)
        prefill = Prefill(
            self.strategy, layout, self.decoder, vision=self._vision, observer=self._observer, seed=self._seed
        )
        if cache is not None and prefill.planned:
            adopt(cache, len(self.decoder.layers), self._lease)
        wanted = [layer for layer in range(len(self.decoder.layers)) if prefill.taps(layer)]
        shows = {self.decoder.attention(layer): partial(prefill.see, layer) for layer in wanted}
        self._taps = ExitStack()
        self._taps.enter_context(tap(shows))
        self._prefill = prefill

    def _layout(self, hidden: Tensor) -> SequenceLayout:
        batch, length = hidden.shape[:2]

        def fit(mask: Tensor | None, fill: int) -> Tensor | None:
            return None if mask is None else _fit(mask.to(hidden.device), batch, length, fill)

        image_tokens = fit(self._marks["image_tokens"], 0)
        assert image_tokens is not None
        mask = self._attention_mask
        return SequenceLayout.from_mask(
            image_tokens,
            None if mask is None else mask[:, -length:],
            grid=fit(self._marks["grid"], -1),
            image_number=fit(self._marks["image_number"], -1),
            queries={name: _fit(rows.to(hidden.device), batch, length, 0) for name, rows in self._queries.items()},
        )

    def _note_absent(self, number: int, cache: Any) -> None:
        frame = self._frame(number)
        if cache is not None and frame is not None:
            cache.layers[number].absent = frame.length - frame.width

    # decoding --------------------------------------------------------------------------------------------------------

    def _frame(self, number: int) -> Frame | None:
        assert self._prefill is not None
        return self._prefill.frames[number]

    def _shorten_step(self, number: int, hidden: Tensor, kwargs: dict[str, Any]) -> None:
        frame, prefill = self._frame(number), self._prefill
        if frame is None or prefill is None:
            return
        flash = "flash" in self.decoder.attention_name
        kwargs["attention_mask"] = frame.decode_mask(kwargs.get("attention_mask"), self._new, self._past, two_d=flash)
        if prefill.strategy.positions == "renumber":
            steps = torch.arange(self._past, self._past + self._new, device=hidden.device)
            ids = frame.counts.to(hidden.device)[:, None] + steps
            kwargs["position_embeddings"] = prefill.renumbered(kwargs.get("position_embeddings"), hidden, ids)
            kwargs["position_ids"] = ids


@contextmanager
def prune_decoder(model: nn.Module, strategy: Strategy, image_tokens: Tensor, **options: Any) -> Iterator[PruningRun]:
    """Open a pruning context on the one decoder inside `model`; options as for `PruningRun`.

    Raises:
        UnsupportedError: the model has no decoder to hook into, or a context is open on it already.
    """
    decoder = find_decoder(model)
    with _LOCK:
        if decoder.module in _BUSY:
            raise UnsupportedError(
                f"{type(decoder.module).__name__} is under tokenprune.prune() already; contexts on one model do "
                "not nest"
            )
        _BUSY.add(decoder.module)
    try:
        run = PruningRun(decoder, strategy, image_tokens, **options)
        with ExitStack() as undo:
            run.attach(undo)
            yield run
    finally:
        with _LOCK:
            _BUSY.discard(decoder.module)


def _fit(mask: Tensor, batch: int, length: int, fill: int) -> Tensor:
    """A mask over the prompt, repeated for returned sequences and extended over tokens generated without a cache."""
    if batch % len(mask) or mask.shape[1] > length:
        raise InputError(
            f"a mask of shape {list(mask.shape)} was given for a forward of [{batch}, {length}]; masks cover the "
            "expanded prompt"
        )
    mask = mask.repeat_interleave(batch // len(mask), 0)
    rest = mask.new_full((batch, length - mask.shape[1], *mask.shape[2:]), fill)
    return torch.cat((mask, rest), 1)
