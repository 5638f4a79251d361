"""The pruning context: hooks on a decoder that carry a strategy through prefill and cached decoding."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, nn

from tokenprune.base import Strategy
from tokenprune.engine.binding import arguments, padding_mask
from tokenprune.engine.cache import Lease, check_cache, shorten_layer, widen_window
from tokenprune.engine.decoder import Decoder
from tokenprune.engine.deepstack import DeepStack
from tokenprune.engine.frame import Frame
from tokenprune.engine.marks import Marks
from tokenprune.engine.positions import renumber_step
from tokenprune.engine.prefill import Prefill
from tokenprune.engine.tap import tap
from tokenprune.engine.vision import VisionSource
from tokenprune.errors import EngineError, PluginError, UnsupportedError
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
        marks: Callable[[], Marks],
        *,
        vision: VisionSource | None = None,
        observer: Observer | None = None,
        seed: int = 0,
    ) -> None:
        self.decoder, self.strategy = decoder, strategy
        self._marks, self._vision, self._observer, self._seed = marks, vision, observer, seed
        self._lease = Lease()
        self._attention_mask: Tensor | None = None
        self._deepstack: DeepStack | None = None
        self._prefill: Prefill | None = None
        self._cache: Any = None
        self._decoding = False
        self._taps = ExitStack()
        self._new = self._past = 0
        self._asking = False

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
            undo.callback(layer.register_forward_hook(partial(self._on_output, number)).remove)

    def _close(self) -> None:
        self._lease.open = False
        self._taps.close()

    def _on_model(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self._asking:
            raise _reentered()
        self._attention_mask = padding_mask(arguments(module, args, kwargs))
        kwargs = dict(kwargs)
        self._deepstack = DeepStack.take(kwargs)
        return args, kwargs

    def _on_layer(self, number: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        kwargs = dict(kwargs)
        hidden = args[0] if args else kwargs.pop("hidden_states")
        cache = kwargs.get("past_key_values")
        if self._asking:
            raise _reentered()
        self._asking = True  # plugins run from here: strategies, observers, an adapter's watch
        try:
            if number == 0:
                self._begin(hidden, cache)
            if self._prefill is None:
                raise EngineError(f"decoder layer {number} was called outside a forward of the whole decoder")
            if not self._decoding:
                hidden = self._prefill.before_layer(number, hidden, kwargs)
        finally:
            self._asking = False
        if self._decoding:
            self._shorten_step(number, hidden, kwargs)
        else:
            frame = self._frame(number)
            if cache is not None and frame is not None:
                shorten_layer(cache, number, frame.length - frame.width, self._lease)
        return (hidden, *args[1:]), kwargs

    def _on_output(self, number: int, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        if self._decoding or self._prefill is None:
            return None
        hidden = output[0] if isinstance(output, tuple) else output
        self._asking = True
        try:
            first = self._prefill.after_layer(number, hidden)
        finally:
            self._asking = False
        if number == len(self.decoder.layers) - 1:
            self._taps.close()
            self._widen_windows()
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
        layout = self._marks().layout(hidden, self._attention_mask)
        prefill = Prefill(
            self.strategy, layout, self.decoder, vision=self._vision, observer=self._observer, seed=self._seed
        )
        prefill.deepstack, self._deepstack = self._deepstack, None
        if prefill.planned and self.decoder.checkpoints:
            raise UnsupportedError(
                f"strategy {self.strategy.name!r}: gradient checkpointing runs layers again in the backward pass, "
                "which is not supported where anything is pruned; switch it off: model.gradient_checkpointing_disable()"
            )
        if cache is not None and prefill.planned:
            check_cache(cache)
        wanted = [layer for layer in range(len(self.decoder.layers)) if prefill.taps(layer)]
        shows = {self.decoder.attention(layer): partial(prefill.see, layer) for layer in wanted}
        self._taps = ExitStack()
        self._taps.enter_context(tap(shows))
        self._prefill, self._cache = prefill, cache

    def _widen_windows(self) -> None:
        """Once anything was pruned, sliding-window layers that were not must take full-length masks too."""
        assert self._prefill is not None
        frames, layout = self._prefill.frames, self._prefill.trace.layout
        cache, self._cache = self._cache, None
        if cache is None or all(frame is None for frame in frames):
            return
        for number, frame in enumerate(frames):
            held = widen_window(cache, number, self._lease) if frame is None else None
            if held is not None:
                last = torch.zeros_like(layout.valid)
                last[:, last.shape[1] - held :] = True
                frames[number] = Frame.of(last)

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
        length = prefill.lengths[number]
        if length is not None:
            renumber_step(self.decoder, number, hidden, kwargs, length, self._past)


def _reentered() -> PluginError:
    return PluginError(
        "the model was called while it waits for a strategy, an observer or an adapter; declare what a stage reads "
        "(tokenprune.reads), and call the model after the run"
    )


@contextmanager
def prune_decoder(
    decoder: Decoder, strategy: Strategy, marks: Callable[[], Marks], **options: Any
) -> Iterator[PruningRun]:
    """Open a pruning context on a decoder; arguments as for `PruningRun`.

    Raises:
        UnsupportedError: a context is open on it already.
    """
    with _LOCK:
        if decoder.module in _BUSY:
            raise UnsupportedError(
                f"{type(decoder.module).__name__} is under tokenprune.prune() already; contexts on one model do "
                "not nest"
            )
        _BUSY.add(decoder.module)
    try:
        run = PruningRun(decoder, strategy, marks, **options)
        with ExitStack() as undo:
            run.attach(undo)
            yield run
    finally:
        with _LOCK:
            _BUSY.discard(decoder.module)
