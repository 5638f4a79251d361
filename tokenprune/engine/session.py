"""The pruning context: carries a strategy through a decoder's prefills and cached decoding."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

from torch import Tensor

from tokenprune.core.layout import SequenceLayout
from tokenprune.core.ledger import LaterTurn
from tokenprune.core.scheduling.requirements import TYPICAL_TOKENS
from tokenprune.core.scheduling.state import TokenState
from tokenprune.core.stage import Shape, declared_stages
from tokenprune.core.strategy import Strategy
from tokenprune.core.trace import Trace
from tokenprune.engine.attention_tap import tap
from tokenprune.engine.call import (
    Call,
    check_all_ran,
    check_due,
    closed_inside,
    reentered,
    refuse_attentions,
    refuse_checkpoints,
    refuse_packed,
    watched,
)
from tokenprune.engine.calls.generate import Generation
from tokenprune.engine.calls.interception import Shadow, compiled, shadowed
from tokenprune.engine.calls.torch_compile import check_runs
from tokenprune.engine.decoder import Decoder
from tokenprune.engine.deepstack import DeepStack
from tokenprune.engine.interface.bound_model import arguments, padding_mask
from tokenprune.engine.interface.prompt_masks import PromptMasks
from tokenprune.engine.interface.vision_source import VisionSource
from tokenprune.engine.kv_cache import (
    CachedPrefill,
    Lease,
    PrunedCacheLayer,
    check_cache,
    check_known,
    clear,
    expect_nothing,
    held_tokens,
    is_pruned,
    shorten_layer,
    take_over,
)
from tokenprune.engine.positions import renumber_step, since_prefill
from tokenprune.engine.prefill import Prefill
from tokenprune.errors import EngineError, PruningWarning, TokenPruneError
from tokenprune.plugins.observers import notify


class PruningRun:
    """What `with tokenprune.prune(...) as run` gives.

    Every forward without cached tokens is a prefill of its own, and a cache belongs to the prefill that filled it; so
    conversations may be continued in turn. Forwards of other threads take turns.
    """

    def __init__(
        self,
        decoder: Decoder,
        strategy: Strategy,
        masks: Callable[[], PromptMasks],
        *,
        later: Callable[[], Tensor | None] | None = None,
        missed: Callable[[], bool] | None = None,
        padding: Callable[[], Tensor | None] | None = None,
        generation: Callable[[], Generation | None] | None = None,
        vision: VisionSource | None = None,
        seed: int = 0,
        strict: bool = False,
    ) -> None:
        self.decoder, self.strategy, self.strict = decoder, strategy, strict
        self._masks, self._later, self._vision, self._seed = masks, later, vision, seed
        self._missed = missed or (lambda: False)
        self._padding = padding or (lambda: None)
        self._generation = generation or (lambda: None)
        self._lease = Lease()
        self._turn = threading.RLock()
        self._call: Call | None = None
        self._look: Shadow | None = None
        self._latest: Prefill | None = None

    def __repr__(self) -> str:
        """What prunes what, and what the latest prefill came to."""
        where = f"{type(self.decoder.module).__name__} of {len(self.decoder.layers)} layers"
        latest = "none yet; call the model" if self._latest is None else repr(self._latest.trace)
        return f"PruningRun: {self.strategy!r} on {where}\n  .trace: {latest}"

    @property
    def trace(self) -> Trace:
        """The trace of the latest prefill. Where one call of `generate` makes several, those of text alone do not
        count: so it tells of the prompt, not of the second stream that guidance needs.

        Raises:
            EngineError: none has run yet.
        """
        return self._known().trace

    @property
    def prefill(self) -> Prefill | None:
        """The prefill under way, as observers see it, or else the latest one that counts; None before the first."""
        call = self._call
        return self._latest if call is None or call.prefill is None else call.prefill

    @property
    def layout(self) -> SequenceLayout:
        """Where image tokens, text and padding of that prefill stand; EngineError where none has run."""
        return self._known().layout

    @property
    def state(self) -> TokenState:
        """Which image tokens of that prefill are active, parked or dropped; EngineError where none has run."""
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
        """Look on at the decoder and its layers meanwhile."""
        with ExitStack() as undo:
            undo.callback(setattr, self._lease, "open", False)
            self._look = undo.enter_context(shadowed(self.decoder.module, "forward", self._forward))
            for number, layer in enumerate(self.decoder.layers):
                look = partial(_layer_forward, self, number)
                undo.enter_context(shadowed(layer, "forward", look, every_thread=True))
            try:
                yield
            except BaseException as error:
                with self._turn:
                    undo.__exit__(type(error), error, error.__traceback__)
                raise
            with self._turn:  # a forward of another thread comes to its end as it began
                undo.close()
                if self._call is not None:  # of this thread: a hook closes the context
                    raise closed_inside()

    def _forward(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Around the decoder's forward."""
        if self._missed():
            return original(*args, **kwargs)
        with self._turn:
            args, kwargs = self._enter(args, kwargs)
            try:
                output = original(*args, **kwargs)
                check_all_ran(self._call, self.decoder, self.never_prunes)
                return output
            finally:
                self._leave()

    def _enter(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if self._call is not None:
            raise reentered()
        kwargs = dict(kwargs)
        inputs = arguments(self.decoder.module, args, kwargs)
        held = held_tokens(inputs.get("past_key_values"))
        if held and is_pruned(inputs["past_key_values"]):  # one that ran unseen would be refused the cache instead
            self.decoder.check_layers()
        self._call = Call(inputs, held, None if held else DeepStack.take(kwargs))
        return args, kwargs

    def _leave(self) -> None:
        call, self._call = self._call, None
        assert call is not None
        call.taps.close()
        expect_nothing(call.cache)

    def check_seen(self) -> None:
        """Refuse a layer's call outside of any forward that was seen, where forwards are not seen any more."""
        look = self._look
        if look is not None and look.open and look.concerned() and not look.in_place() and not self.never_prunes():
            raise look.bypassed()

    def mine(self) -> Call | None:
        """The forward under way, if it is this thread's: another thread's that began before the context is not."""
        call = self._call
        return call if call is not None and call.thread == threading.get_ident() else None

    def before(
        self, call: Call, number: int, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """What a layer runs on, instead of its arguments."""
        kwargs = dict(kwargs)
        hidden = args[0] if args else kwargs.pop("hidden_states")
        if call.asking:
            raise reentered()
        check_due(call, self.decoder, number)
        call.asking = True  # plugins run from here: strategies, observers, an adapter's watch
        try:
            if number == 0:
                self._begin(call, hidden, kwargs.get("past_key_values"))
            if call.prefill is not None:
                hidden = call.prefill.before_layer(number, hidden, kwargs)
        finally:
            call.asking = False
        if call.prefill is not None and call.cached is not None:
            frame = call.prefill.frames[number]
            if frame is not None:
                refuse_attentions(call.inputs, self.decoder.module)
                if call.cache is not None:
                    shorten_layer(call.cache, number, frame, call.prefill.lengths[number], call.cached)
        elif call.cached is not None:
            self._shorten_step(call, number, hidden, kwargs)
        return (hidden, *args[1:]), kwargs

    def after(self, call: Call, number: int, output: Any) -> Any:
        """What a layer gives, instead of its output."""
        call.ran += 1
        last = number == len(self.decoder.layers) - 1
        if last and call.turn is not None and call.cached is not None:
            call.cached.ledger.later_turns.append(call.turn)
        if call.prefill is None:
            return output
        hidden = output[0] if isinstance(output, tuple) else output
        call.asking = True
        try:
            first = call.prefill.after_layer(number, hidden, full=watched(self.decoder, number))
        finally:
            call.asking = False
        if last:
            self._filled(call)
        return (first, *output[1:]) if isinstance(output, tuple) else first

    # prefill ---------------------------------------------------------------------------------------------------------

    def _begin(self, call: Call, hidden: Tensor, cache: Any) -> None:
        check_runs(hidden)
        call.cache = cache
        now = self._generation()
        if call.held:
            self._continue(call, hidden)
            if now is not None:
                now.begun = True
            return
        layout = self._masks().layout(hidden, padding_mask(call.inputs))
        prefill = Prefill(
            self.strategy,
            layout,
            self.decoder,
            vision=self._vision,
            tell=self.tell,
            seed=self._seed,
            strict=self.strict,
        )
        prefill.deepstack, call.deepstack = call.deepstack, None
        if prefill.planned:
            self._check(call, prefill, cache)
        if cache is not None and hasattr(cache, "layers"):
            clear(cache)
        wanted = [layer for layer in range(len(self.decoder.layers)) if prefill.taps(layer)]
        call.taps.enter_context(tap({self.decoder.attention(layer): partial(prefill.see, layer) for layer in wanted}))
        call.prefill = prefill
        call.cached = CachedPrefill(self._lease, hidden.shape[1], prefill.trace.ledger)
        if now is None or not now.begun or bool(layout.image_tokens.any()):
            self._latest = prefill
        if now is not None:
            now.begun = True

    def _check(self, call: Call, prefill: Prefill, cache: Any) -> None:
        """Refuse a prefill with stages that cannot be pruned right."""
        refuse_checkpoints(self.decoder, self.strategy.name)
        if cache is not None:
            check_cache(cache)
        refuse_packed(call.inputs, prefill.layout.valid)

    def _filled(self, call: Call) -> None:
        """Once the last layer has run: the cache is known, and its layers that were not pruned fit those that were."""
        cache, prefill = call.cache, call.prefill
        assert prefill is not None
        assert call.cached is not None
        if cache is None:
            return
        if any(frame is not None for frame in prefill.frames):
            take_over(cache, prefill.layout.valid, call.cached)
        call.cached.sign(cache)

    # decoding --------------------------------------------------------------------------------------------------------

    def _continue(self, call: Call, hidden: Tensor) -> None:
        known = CachedPrefill.of(call.cache)
        if known is None and self.never_prunes():
            return  # nothing was pruned before, and nothing would be
        call.cached = known = check_known(known, self._lease)
        call.new, call.past = hidden.shape[1], call.held - known.length
        outer = self._padding()
        call.mask = padding_mask(call.inputs) if outer is None else outer
        if call.new > 1:
            call.turn = self._with_images(call, len(hidden))

    def never_prunes(self) -> bool:
        """Whether the strategy leaves models like this one as they are, as "none" does."""
        decoder, vision = self.decoder, self._vision or VisionSource()
        readable = decoder.offers | frozenset(vision.answers)
        shape = Shape(len(decoder.layers), TYPICAL_TOKENS, 0, vision.layers, readable, decoder.heads)
        try:
            return not declared_stages(self.strategy, shape)
        except TokenPruneError:
            return False

    def _with_images(self, call: Call, batch: int) -> LaterTurn | None:
        # The seam for pruning later turns: here a turn's image tokens are known, and the frames of what came before.
        images = None if self._later is None else self._later()
        if images is None or not bool(images.any()):
            return None
        counts, mask = images.sum(1).tolist(), call.mask
        real = [call.new] * batch if mask is None else mask[:, -call.new :].sum(1).tolist()
        warnings.warn(
            f"a later turn added {max(counts)} image tokens to a filled KV cache; they are kept whole in all layers, "
            "since only a prefill is pruned; trace.ledger.later_turns counts them",
            PruningWarning,
            stacklevel=2,
        )
        return LaterTurn(tuple(counts), tuple(n - image for n, image in zip(real, counts, strict=True)))

    def _shorten_step(self, call: Call, number: int, hidden: Tensor, kwargs: dict[str, Any]) -> None:
        own = call.cache.layers[number] if number < len(call.cache.layers) else None
        if not isinstance(own, PrunedCacheLayer):
            return
        own.expected = True
        if own.frame is None:
            return
        refuse_attentions(call.inputs, self.decoder.module)
        flash = "flash" in self.decoder.attention_name
        kwargs["attention_mask"] = own.frame.decode_mask(kwargs.get("attention_mask"), call.new, call.past, two_d=flash)
        if own.renumbered is not None:
            if call.since is None:
                call.since = since_prefill(call.mask, own.frame.length, call.past, call.new)
            renumber_step(self.decoder, number, hidden, kwargs, own.renumbered, call.since)


def _layer_forward(run: PruningRun, number: int, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Around a layer's forward."""
    call = run.mine()
    if call is None:  # a layer called by itself, or by another thread's forward that began before the context
        run.check_seen()
        return original(*args, **kwargs)
    args, kwargs = run.before(call, number, args, kwargs)
    read = call.prefill is not None and call.prefill.taps(number)
    # what reads attention cannot be compiled, and would leave pieces of the layer, each with graphs of its own
    output = original(*args, **kwargs) if read else compiled(number, original, *args, **kwargs)
    return run.after(call, number, output)
