"""`PruningRun`, the object that a pruning context gives: it applies the strategy in prefills and cached decoding."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

from torch import Tensor

from tokenprune.core.layout import SequenceLayout
from tokenprune.core.scheduling.state import TokenState
from tokenprune.core.stage import declared_stages
from tokenprune.core.strategy import Strategy
from tokenprune.core.trace import Trace
from tokenprune.engine.caches.cache_layers import Lease
from tokenprune.engine.caches.kv_cache import end_update, held_tokens, is_pruned
from tokenprune.engine.call import (
    Call,
    check_all_ran,
    check_order,
    closed_in_forward,
    reentry,
    requests_attentions,
)
from tokenprune.engine.calls import checkpointing
from tokenprune.engine.calls.generate import Generations
from tokenprune.engine.calls.interception import Shadow, shadowed
from tokenprune.engine.calls.torch_compile import check_not_traced
from tokenprune.engine.decoder import Decoder
from tokenprune.engine.interface.bound_model import VisionCapture, arguments, padding_mask
from tokenprune.engine.interface.vision_source import VisionSource
from tokenprune.engine.later_turn import LaterTurns
from tokenprune.engine.prefill import Prefill
from tokenprune.engine.sequence.deepstack import DeepStack
from tokenprune.errors import EngineError, TokenPruneError
from tokenprune.plugins.observers import notify


class PruningRun:
    """The run of a pruning context: what `with tokenprune.prune(...) as run` gives.

    Each forward without cached tokens is a new prefill. A KV cache belongs to the prefill that filled it, so several
    conversations can be continued alternately. Forwards of different threads run one at a time.
    """

    def __init__(
        self,
        decoder: Decoder,
        strategy: Strategy,
        capture: VisionCapture,
        *,
        queries: Mapping[str, Tensor] | None = None,
        generations: Generations | None = None,
        vision: VisionSource | None = None,
        seed: int = 0,
        strict: bool = False,
    ) -> None:
        self.decoder, self.strategy, self.strict = decoder, strategy, strict
        self._capture, self._queries, self._generations = capture, queries or {}, generations
        self._vision, self._seed = vision or VisionSource(), seed
        self._lease = Lease()
        self._later = LaterTurns(decoder, capture, self._lease, queries)
        self._turn = threading.RLock()
        self._call: Call | None = None
        self._shadow: Shadow | None = None
        self._latest: Prefill | None = None

    def __repr__(self) -> str:
        """The strategy, the model, and the trace of the latest prefill."""
        where = f"{self.model} of {len(self.decoder.layers)} layers"
        latest = "none yet; call the model" if self._latest is None else repr(self._latest.trace)
        return f"PruningRun: {self.strategy!r} on {where}\n  .trace: {latest}"

    @property
    def trace(self) -> Trace:
        """The trace of the latest prefill, or pruned turn of a conversation. Later prefills without image tokens in a
        call of `generate` are skipped, such as the second stream of `guidance_scale`.

        Raises:
            EngineError: no prefill has run yet.
        """
        return self._known().trace

    @property
    def prefill(self) -> Prefill | None:
        """The current prefill or, between calls, the latest one, as for `trace`; None before the first."""
        call = self._call
        return self._latest if call is None or call.prefill is None else call.prefill

    @property
    def layout(self) -> SequenceLayout:
        """Positions of image tokens, text and padding in that prefill; EngineError if none has run."""
        return self._known().layout

    @property
    def state(self) -> TokenState:
        """The active, parked and dropped image tokens of that prefill; EngineError if none has run."""
        return self._known().state

    @property
    def model(self) -> str:
        """The name of the decoder's class."""
        return type(self.decoder.module).__name__

    def tell(self, hook: str, **what: Any) -> None:
        """Call a lifecycle hook of all plugins; see `plugins.observers.notify`."""
        notify(hook, strict=self.strict, run=self, **what)

    def _known(self) -> Prefill:
        found = self.prefill
        if found is None:
            raise EngineError("no prefill has run in this context yet, so there is no trace; call the model first")
        return found

    # around the calls ------------------------------------------------------------------------------------------------

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Intercept the calls of the decoder and its layers while open."""
        with ExitStack() as undo:
            undo.callback(setattr, self._lease, "open", False)  # undone last; from then on caches are refused
            self._shadow = undo.enter_context(shadowed(self.decoder.module, "forward", self._forward))
            for number, layer in enumerate(self.decoder.layers):
                undo.enter_context(shadowed(layer, "forward", partial(self._layer_forward, number), every_thread=True))
                if checkpointing.checkpoints_itself(layer):
                    wrapper = partial(self._layer_checkpoint, number)
                    undo.enter_context(shadowed(layer, checkpointing.FUNCTION, wrapper, every_thread=True))
            try:
                yield
            except BaseException as error:
                with self._turn:
                    undo.__exit__(type(error), error, error.__traceback__)
                raise
            with self._turn:  # wait for the forward of another thread
                undo.close()
                if self._call is not None:  # a hook of the model closes the context during a forward of this thread
                    raise closed_in_forward()

    def _forward(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Around the decoder's forward."""
        if self._capture.missed() or (self._generations is not None and self._generations.missed()):
            return original(*args, **kwargs)
        with self._turn:
            call, args, kwargs = self._enter_forward(args, kwargs)
            try:
                self._later.prepare(call, self.never_prunes, kwargs=kwargs)
                output = original(*args, **kwargs)
                check_all_ran(call, self.decoder, self.never_prunes)
                return output
            except BaseException:
                call.fail()
                raise
            finally:
                self._leave_forward()

    def _enter_forward(
        self, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Call, tuple[Any, ...], dict[str, Any]]:
        if self._call is not None:
            raise reentry()
        kwargs = dict(kwargs)
        inputs = arguments(self.decoder.module, args, kwargs)
        held = held_tokens(inputs.get("past_key_values"))
        if held and is_pruned(inputs["past_key_values"]):  # else a replaced layer would fail on the cache, less clearly
            self.decoder.check_layers()
        deepstack = None if held else DeepStack.take(kwargs, len(self.decoder.layers))
        self._call = Call(inputs, held, deepstack, attentions=requests_attentions(inputs, self.decoder.module))
        return self._call, args, kwargs

    def _leave_forward(self) -> None:
        call, self._call = self._call, None
        assert call is not None
        call.taps.close()
        end_update(call.cache)

    def _layer_forward(self, number: int, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Around a layer's forward."""
        call = self._call
        # the layer was called directly, or by another thread's forward that began before the context
        if call is None or call.thread != threading.get_ident():
            # its forward is not intercepted any more
            if self._shadow is not None and self._shadow.is_bypassed() and not self.never_prunes():
                raise self._shadow.bypass_error()
            return original(*args, **kwargs)
        if call.inside == number:
            return original(*args, **kwargs)
        args, kwargs = self._before_layer(call, number, args, kwargs)
        output = call.run_layer(self.decoder, number, original, args, kwargs)
        return self._after_layer(call, number, output)

    def _layer_checkpoint(
        self, number: int, original: Callable[..., Any], function: Any, *args: Any, **kwargs: Any
    ) -> Any:
        """Around the checkpoint that a layer hands itself to: in its forward, or, in older releases, around that."""
        call, given = self._call, checkpointing.parts(function)
        if call is None or call.thread != threading.get_ident() or call.inside == number or given is None:
            return original(function, *args, **kwargs)
        layer, keywords = given
        args, keywords = self._before_layer(call, number, args, keywords)
        if call.prefill is not None and call.prefill.planned and self.decoder.is_observed(number):
            raise checkpointing.refuse_observed(self.strategy.name)
        output = original(partial(layer, **keywords), *args, **kwargs)
        return self._after_layer(call, number, output)

    def _before_layer(
        self, call: Call, number: int, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments of a layer, in place of the decoder's."""
        kwargs = dict(kwargs)
        hidden = given = args[0] if args else kwargs.pop("hidden_states")
        if call.in_plugin_code:
            raise reentry()
        if number != call.ran or (number == 0 and not call.held):
            check_order(call, self.decoder, number)
        call.in_plugin_code = True  # plugins run from here: strategies, observers, an adapter's capture
        try:
            if number == 0:
                self._begin_prefill(call, hidden, kwargs.get("past_key_values"))
            if call.prefill is not None:
                hidden = call.prefill.before_layer(number, hidden, kwargs)
        finally:
            call.in_plugin_code = False
        if call.prefill is not None and call.prefill.planned:
            checkpointing.refuse_around(self.strategy.name, given)
            tempered = number in self.decoder.tempered and call.prefill.lacking_scale(number) is not None
            if tempered and self.decoder.checkpoints:
                raise checkpointing.refuse_scaled(self.strategy.name)
        call.fit_cache(number, hidden, kwargs)
        call.inside = number
        return (hidden, *args[1:]), kwargs

    def _after_layer(self, call: Call, number: int, output: Any) -> Any:
        """The output of a layer that the decoder receives, in place of the layer's."""
        call.ran, call.inside = call.ran + 1, None
        last = number == len(self.decoder.layers) - 1
        if last and call.step is not None:
            call.step.finish()
        if call.prefill is None:
            return output
        hidden = output[0] if isinstance(output, tuple) else output
        call.in_plugin_code = True
        try:
            first = call.prefill.after_layer(number, hidden, full=not last and self.decoder.is_observed(number))
        finally:
            call.in_plugin_code = False
        if last:
            call.finish()
        return (first, *output[1:]) if isinstance(output, tuple) else first

    # prefill ---------------------------------------------------------------------------------------------------------

    def _begin_prefill(self, call: Call, hidden: Tensor, cache: Any) -> None:
        check_not_traced(hidden)
        call.cache = cache
        now = None if self._generations is None else self._generations.now()
        if call.held:
            self._continue_cached(call, hidden)
            if now is not None:
                now.begun = True
            return
        prefill = self._new_prefill(call, hidden, self._queries)
        call.begin(prefill, self._lease, hidden.shape[1], generates=now is not None)
        if now is None or not now.begun or bool(prefill.layout.on_host.image_tokens.any()):
            self._latest = prefill
        if now is not None:
            now.begun = True

    def _new_prefill(self, call: Call, hidden: Tensor, queries: Mapping[str, Tensor]) -> Prefill:
        masks = self._capture.prompt_masks(queries)
        return Prefill(
            self.strategy,
            masks.layout(hidden, padding_mask(call.inputs)),
            self.decoder,
            vision=self._vision,
            tell=self.tell,
            seed=self._seed,
            strict=self.strict,
            shared=0 if call.filled is not None else masks.shared,
            filled=call.filled,
        )

    # decoding --------------------------------------------------------------------------------------------------------

    def _continue_cached(self, call: Call, hidden: Tensor) -> None:
        self._later.prepare(call, self.never_prunes, hidden=hidden)
        if call.filled is None:
            self._later.step(call, hidden, self.never_prunes)
            return
        self._latest = prefill = self._new_prefill(call, hidden, {})
        call.continue_conversation(prefill)

    def never_prunes(self) -> bool:
        """True if the strategy has no stages on this model, as "none" has."""
        shape = self.decoder.typical_shape(frozenset(self._vision.answers), self._vision.layers)
        try:
            return not declared_stages(self.strategy, shape)
        except TokenPruneError:
            return False
