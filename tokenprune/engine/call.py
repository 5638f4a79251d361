"""One call of a decoder under a pruning context: its state, and checks that refuse unsupported calls."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from torch import Tensor

from tokenprune.engine.caches.cache_layers import CachedPrefill, Lease
from tokenprune.engine.caches.decoding import CachedStep
from tokenprune.engine.caches.filled_cache import FilledCache
from tokenprune.engine.caches.kv_cache import check_cache, clear, max_cache_len, shorten_layer, unify_layers
from tokenprune.engine.calls import checkpointing
from tokenprune.engine.calls.interception import is_compiled_run, run_compiled
from tokenprune.engine.calls.torch_compile import one_layer
from tokenprune.engine.decoder import Decoder
from tokenprune.engine.prefill import Prefill
from tokenprune.engine.reads.attention_tap import tap
from tokenprune.engine.sequence.deepstack import DeepStack
from tokenprune.engine.sequence.temperature import scaled_queries
from tokenprune.errors import EngineError, InputError, PluginError, UnsupportedError


@dataclass
class Call:
    """One forward of the decoder: a prefill, a step on the cache of an earlier prefill of this context, or neither.

    Attributes:
        inputs: the decoder's arguments by name.
        held: tokens per row in the KV cache before the call.
        deepstack: features that the decoder would add between its layers in a prefill.
        cache: the KV cache that the layers fill.
        uncached: whether the layers fill none, since some run again in the backward pass.
        thread: the calling thread.
        in_plugin_code: whether a strategy, an observer or an adapter is running.
        attentions: whether attention weights are requested.
        filled: the cache that it continues, if it is a turn of a conversation that is pruned.
        prefill: the prefill, if it is one, or the turn.
        cached: the record of the prefill that the cache will carry.
        step: the step, if it continues a prefill's cache.
        ran: number of layers that have run.
        inside: the layer that is running; None between layers.
        taps: attention taps of the prefill.
        alike: the first layers that ran of each kind and number of tokens.
    """

    inputs: dict[str, Any]
    held: int = 0
    deepstack: DeepStack | None = None
    cache: Any = None
    uncached: bool = False
    thread: int = field(default_factory=threading.get_ident)
    in_plugin_code: bool = False
    attentions: bool = False
    filled: FilledCache | None = None
    prefill: Prefill | None = None
    cached: CachedPrefill | None = None
    step: CachedStep | None = None
    ran: int = 0
    inside: int | None = None
    taps: ExitStack = field(default_factory=ExitStack)
    alike: dict[tuple[Any, ...], int] = field(default_factory=dict)

    def begin(self, prefill: Prefill, lease: Lease, length: int, generates: bool) -> None:
        """Make this the call of a prefill: its cache is emptied, and the layers that it reads are tapped.

        Args:
            prefill: of this call.
            lease: of the context, for the cache.
            length: positions of the prompt.
            generates: whether the call is one of `generate`.

        Raises:
            UnsupportedError: a prefill with stages that cannot be pruned correctly.
        """
        prefill.deepstack, self.deepstack = self.deepstack, None
        prefill.note_positions(self.inputs.get("position_ids"))
        if prefill.planned and prefill.decoder.checkpoints:
            if generates:
                raise checkpointing.refuse_cached("generate()")
            self.uncached, self.cache = True, None
        drafted = prefill.layout.on_host.drafted
        columns = 0 if drafted is None else int(drafted.any(0).sum())
        self.cached = CachedPrefill(
            lease,
            length,
            prefill.trace.ledger,
            columns,
            max_cache_len(self.cache),
            prefill.decoder.keeps_states,
        )
        if prefill.planned:
            self.check_prunable(prefill)
        if self.cache is not None and hasattr(self.cache, "layers"):
            clear(self.cache)
        self._read(prefill)

    def continue_conversation(self, prefill: Prefill) -> None:
        """Make this the call of a later turn, whose new tokens are pruned: the layers that it reads are tapped.

        Raises:
            InputError: positions of another number of tokens.
        """
        ids, new = self.inputs.get("position_ids"), prefill.layout.valid.shape[1]
        if isinstance(ids, Tensor) and ids.shape[-1] != new:
            raise InputError(
                f"position_ids: {ids.shape[-1]} positions found for the {new} tokens of a later turn (transformers "
                "counts them from the mask of a whole conversation); pass those of the new tokens"
            )
        prefill.deepstack, self.deepstack = self.deepstack, None
        prefill.note_positions(self.inputs.get("position_ids"))
        refuse_packed(self.inputs, prefill.layout.valid)
        prefill.decoder.check_window(self.held + prefill.layout.valid.shape[1])
        self._read(prefill)

    def _read(self, prefill: Prefill) -> None:
        decoder, record = prefill.decoder, prefill.record_attention
        taps = {decoder.attention(layer): partial(record, layer) for layer in prefill.reads.taps}
        self.taps.enter_context(tap(taps))
        self.prefill = prefill

    def check_prunable(self, prefill: Prefill) -> None:
        """Raise UnsupportedError if a prefill with stages cannot be pruned correctly."""
        if self.cache is not None:
            check_cache(self.cache, prefill.decoder.attends)
        if self.cached is not None:
            self.cached.check_room(self.cached.length)
        prefill.decoder.check_window(prefill.layout.valid.shape[1])
        refuse_packed(self.inputs, prefill.layout.valid)

    def fit_cache(self, number: int, hidden: Tensor, kwargs: dict[str, Any]) -> None:
        """Before a layer that runs on fewer tokens than the sequence has: shorten its part of the cache in a prefill,
        or its arguments in a decoding step.

        Args:
            number: the layer's number.
            hidden: the layer's input.
            kwargs: its keyword arguments, changed in place.

        Raises:
            UnsupportedError: attention weights are requested.
        """
        if self.uncached and kwargs.get("past_key_values") is not None:
            kwargs["past_key_values"] = None  # of all, where only every other layer checkpoints itself
        if self.filled is not None:
            if self.attentions:
                raise _attentions_unsupported()
            self.filled.expect(number, hidden.shape[1])
        elif self.prefill is not None and self.cached is not None:
            frame = self.prefill.frames[number]
            if frame is not None:
                if self.attentions:
                    raise _attentions_unsupported()
                if self.cache is not None and self.prefill.decoder.attends[number]:
                    shorten_layer(self.cache, number, frame, self.prefill.lengths[number], self.cached)
        elif self.step is not None:
            own = self.step.expect(self.cache, number)
            if own is not None:
                if self.attentions:
                    raise _attentions_unsupported()
                self.step.shorten(own, number, hidden, kwargs)

    def _first_alike(self, number: int, kind: Any, hidden: Tensor) -> int:
        """The first layer of this call whose compiled code may fit a layer: of its kind, on as many tokens and keys."""
        held = getattr(self.cache, "layers", ())
        absent = getattr(held[number], "absent", 0) if number < len(held) else 0
        return self.alike.setdefault((kind, hidden.shape[1], hidden.device, absent), number)

    def run_layer(
        self, decoder: Decoder, number: int, original: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """The output of a layer on its new arguments: with keys from the stage before it, compiled, or sharing columns.

        Args:
            decoder: the decoder.
            number: the layer's number.
            original: its forward.
            args: its arguments, the states first.
            kwargs: its keyword arguments.
        """
        prefill = self.prefill
        if prefill is not None and number in decoder.tempered:
            lacking = prefill.lacking_scale(number)
            if lacking is not None:
                with scaled_queries(decoder.attention(number), lacking):
                    return original(*args, **kwargs)
        if prefill is not None and prefill.reads.keys_ahead is not None:
            with prefill.reads.keys_ahead.handed_on(args[0]):
                return original(*args, **kwargs)
        if prefill is not None and number in prefill.reads.taps:
            # a tapped attention breaks the graph: torch.compile would compile each piece of the layer separately
            return original(*args, **kwargs)
        if is_compiled_run():
            alike = self._first_alike(number, decoder.kind(number), args[0])
            return run_compiled((alike, number), original, *args, **one_layer(number, kwargs))
        if prefill is not None and prefill.shared is not None and len(args) == 1:
            return prefill.shared.run(original, number, args[0], kwargs)
        return original(*args, **kwargs)

    def fail(self) -> None:
        """After an error: undo a turn, and note whether a step may have filled some layers of its cache."""
        if self.filled is not None:
            self.filled.undo()
        if self.step is not None and (self.ran or self.inside is not None):
            self.step.fail(self.cache)

    def finish(self) -> None:
        """After the last layer of a prefill: convert the cache's layers to one kind, and mark it with the prefill."""
        assert self.prefill is not None
        if self.filled is not None:
            prefill, valid = self.prefill, self.prefill.layout.valid
            self.filled.finish(prefill.trace.ledger, prefill.frames, prefill.lengths, valid, prefill.earlier_caches)
            return
        assert self.cached is not None
        if self.cache is None:
            return
        if any(frame is not None for frame in self.prefill.frames):
            unify_layers(self.cache, self.prefill.layout.valid, self.cached, self.prefill.earlier_caches)
        self.cached.sign(self.cache)


def check_order(call: Call, decoder: Decoder, number: int) -> None:
    """Raise EngineError if a layer runs out of order; the error names what was changed."""
    decoder.check_layers()
    if number != call.ran:
        raise decoder.changed(
            f"layer {number} was called instead of layer {call.ran}, whose forward was not intercepted"
        )


def check_all_ran(call: Call, decoder: Decoder, never_prunes: Callable[[], bool]) -> None:
    """Raise EngineError if the strategy prunes and not every layer ran; the error names what was changed."""
    if call.ran == len(decoder.layers):
        return
    if not never_prunes():
        decoder.check_layers()
        raise decoder.changed(f"its forward ended after {call.ran} of {len(decoder.layers)} layers")


def closed_in_forward() -> EngineError:
    return EngineError(
        "the context of tokenprune.prune() was closed during a forward of the model, which cannot finish unpruned; "
        "close it after the model has returned"
    )


def refuse_packed(inputs: dict[str, Any], valid: Tensor) -> None:
    """Refuse rows that contain several prompts, each of which attends only to itself."""
    ids = inputs.get("position_ids")
    packed = any(inputs.get(name) is not None for name in ("cu_seq_lens_q", "cu_seq_lens_k", "seq_idx"))
    if isinstance(ids, Tensor) and ids.dim() > 1 and ids.shape[-1] == valid.shape[1]:
        axes = ids.reshape(-1, *ids.shape[-2:]).to(valid.device)  # of M-RoPE: time, height, width, or text before them
        both = valid[:, 1:] & valid[:, :-1]
        restarts = (axes[0, :, 1:] < axes[0, :, :-1]) & both
        if len(axes) == 3:  # text after a video may have a position before its last frames, but not before the prompt
            first = axes.masked_fill(~valid, axes.max() + 1).amin(-1, keepdim=True)
            restarts = restarts & (axes[:, :, 1:] <= first).all(0)
        packed = packed or bool(restarts.any())
    if packed:
        raise UnsupportedError(
            "prompts packed into one row (position ids that restart, or cu_seq_lens) are not supported under "
            "tokenprune.prune(); pass them as rows of a batch, with an attention_mask"
        )


def requests_attentions(inputs: dict[str, Any], decoder: Any) -> bool:
    """True if the caller requests attention weights."""
    return bool(inputs.get("output_attentions", getattr(decoder.config, "output_attentions", False)))


def _attentions_unsupported() -> UnsupportedError:
    return UnsupportedError(
        "output_attentions=True is not supported under tokenprune.prune(): pruned layers attend to fewer "
        "tokens than the sequence has; call the model without it, or let a strategy read "
        "tokenprune.core.reads.AttentionFrom"
    )


def reentry() -> PluginError:
    return PluginError(
        "the model was called from a strategy, an observer or an adapter during a forward; declare what a stage reads "
        "(tokenprune.core.reads), or call the model after the forward"
    )
