"""One call of a decoder under a pruning context: its state, and the calls that are refused."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor
from torch.nn.modules.module import _has_any_global_hook

from tokenprune.engine.decoder import Decoder
from tokenprune.engine.decoding import CachedStep
from tokenprune.engine.deepstack import DeepStack
from tokenprune.engine.kv_cache import CachedPrefill, check_cache, shorten_layer, take_over
from tokenprune.engine.prefill import Prefill
from tokenprune.errors import EngineError, PluginError, UnsupportedError


@dataclass
class Call:
    """One forward of the decoder: a prefill, or a step on a cache that a prefill of this context filled, or neither.

    Attributes:
        inputs: the decoder's arguments by name.
        held: tokens per row in the cache that it was called with.
        deepstack: what the decoder would add between its layers in a prefill.
        cache: that its layers fill.
        uncached: its layers are to fill none, since some run again in the backward pass.
        thread: that called.
        in_plugin_code: a strategy, an observer or an adapter is at work.
        attentions: attention weights are asked for.
        prefill: where it is one.
        cached: of a prefill, what the cache is to carry of it.
        step: where it continues a prefill's cache.
        ran: layers that have run.
        inside: the layer that is running; None between layers.
        taps: on layers that a prefill reads.
    """

    inputs: dict[str, Any]
    held: int = 0
    deepstack: DeepStack | None = None
    cache: Any = None
    uncached: bool = False
    thread: int = field(default_factory=threading.get_ident)
    in_plugin_code: bool = False
    attentions: bool = False
    prefill: Prefill | None = None
    cached: CachedPrefill | None = None
    step: CachedStep | None = None
    ran: int = 0
    inside: int | None = None
    taps: ExitStack = field(default_factory=ExitStack)

    def check_prunable(self, prefill: Prefill) -> None:
        """Refuse a prefill with stages that cannot be pruned right. Raises UnsupportedError."""
        if self.cache is not None:
            check_cache(self.cache)
        refuse_packed(self.inputs, prefill.layout.valid)

    def fit_cache(self, number: int, hidden: Tensor, kwargs: dict[str, Any]) -> None:
        """Before a layer that runs on fewer tokens than the sequence has: have its part of the cache hold no more, or
        fit its arguments to what that holds.

        Args:
            number: of the layer.
            hidden: what enters it.
            kwargs: its keyword arguments, changed in place.

        Raises:
            UnsupportedError: attention weights are asked for.
        """
        if self.uncached and kwargs.get("past_key_values") is not None:
            kwargs["past_key_values"] = None  # of all, where only every other layer checkpoints itself
        if self.prefill is not None and self.cached is not None:
            frame = self.prefill.frames[number]
            if frame is not None:
                if self.attentions:
                    raise _attentions_asked()
                if self.cache is not None:
                    shorten_layer(self.cache, number, frame, self.prefill.lengths[number], self.cached)
        elif self.step is not None:
            own = self.step.expect(self.cache, number)
            if own is not None:
                if self.attentions:
                    raise _attentions_asked()
                self.step.shorten(own, number, hidden, kwargs)

    def filled(self) -> None:
        """The last layer of a prefill has run: make the cache's layers of one kind, and note whose it is."""
        assert self.prefill is not None
        assert self.cached is not None
        if self.cache is None:
            return
        if any(frame is not None for frame in self.prefill.frames):
            take_over(self.cache, self.prefill.layout.valid, self.cached)
        self.cached.sign(self.cache)


def watched(decoder: Decoder, number: int) -> bool:
    """True if other code sees the states between a layer and the next one, as `output_hidden_states=True` does.

    By hooks of any kind, of either layer or of all modules, or, in older releases of transformers, by a forward of its
    own. Asked again at each layer, since hooks may come and go while the model runs.
    """
    if _has_any_global_hook():  # type: ignore[no-untyped-call]
        return True
    ends = slice(number, number + 2)
    for layer in decoder.layers[ends]:
        if not hasattr(layer.forward, "__tokenprune__"):
            return True
    for part in (*decoder.layers[ends], *decoder.called[ends]):
        if part._forward_hooks or part._forward_pre_hooks or part._backward_hooks or part._backward_pre_hooks:
            return True
    return False


def check_due(call: Call, decoder: Decoder, number: int) -> None:
    """Raise EngineError if this layer does not run in its turn; the error names what was changed."""
    decoder.check_layers()
    if number != call.ran:
        raise decoder.changed(f"layer {number} runs where the turn of layer {call.ran} is, whose forward was not seen")


def check_all_ran(call: Call | None, decoder: Decoder, never_prunes: Callable[[], bool]) -> None:
    """Raise EngineError if not every layer ran, though something is pruned; the error names what was changed."""
    if call is None or call.ran == len(decoder.layers):
        return
    if not never_prunes():
        decoder.check_layers()
        raise decoder.changed(f"its forward ended after {call.ran} of {len(decoder.layers)} layers")


def closed_inside() -> EngineError:
    return EngineError(
        "the context of tokenprune.prune() was closed in the middle of a forward of the model, which cannot be "
        "finished unpruned; close it once the model has returned"
    )


def refuse_packed(inputs: dict[str, Any], valid: Tensor) -> None:
    """Refuse several prompts in one row, which attend to themselves alone."""
    ids = inputs.get("position_ids")
    packed = any(inputs.get(name) is not None for name in ("cu_seq_lens_q", "cu_seq_lens_k", "seq_idx"))
    if isinstance(ids, Tensor) and ids.dim() > 1 and ids.shape[-1] == valid.shape[1]:
        axes = ids.reshape(-1, *ids.shape[-2:]).to(valid.device)  # of M-RoPE: time, height, width, or text before them
        both = valid[:, 1:] & valid[:, :-1]
        restarts = (axes[0, :, 1:] < axes[0, :, :-1]) & both
        if len(axes) == 3:  # text behind a video may stand before its last frames, but not before the row's first token
            first = axes.masked_fill(~valid, axes.max() + 1).amin(-1, keepdim=True)
            restarts = restarts & (axes[:, :, 1:] <= first).all(0)
        packed = packed or bool(restarts.any())
    if packed:
        raise UnsupportedError(
            "several prompts packed into one row found (position ids that restart, or cu_seq_lens), which cannot be "
            "pruned as one; give them as the rows of a batch, with an attention_mask"
        )


def asks_attentions(inputs: dict[str, Any], decoder: Any) -> bool:
    """True if the caller asks for attention weights."""
    return bool(inputs.get("output_attentions", getattr(decoder.config, "output_attentions", False)))


def _attentions_asked() -> UnsupportedError:
    return UnsupportedError(
        "output_attentions=True is not supported under tokenprune.prune(): pruned layers attend to fewer "
        "tokens than the sequence has; call the model without it, or let a strategy read "
        "tokenprune.core.reads.AttentionFrom"
    )


def reentered() -> PluginError:
    return PluginError(
        "the model was called while it waits for a strategy, an observer or an adapter; declare what a stage reads "
        "(tokenprune.core.reads), and call the model after the run"
    )
