"""One call of a decoder under a pruning context: what it is, and what it may not ask for."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor
from torch.nn.modules.module import _has_any_global_hook

from tokenprune.core.ledger import LaterTurn
from tokenprune.engine.calls.under_way import checkpointed
from tokenprune.engine.decoder import Decoder
from tokenprune.engine.deepstack import DeepStack
from tokenprune.engine.kv_cache import CachedPrefill
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
        thread: that called.
        asking: a strategy, an observer or an adapter is at work.
        prefill: where it is one.
        cached: the prefill whose cache a step continues.
        new: tokens per row of a step.
        past: tokens per row decoded before it.
        mask: of a step, two-dimensional, 0 on padding; None = there is none.
        since: of a step, int64 [batch or 1, new], see `positions.since_prefill`; None until a layer wants it.
        turn: what is counted of a step with images, once the last layer has it; None = nothing.
        ran: layers that have run.
        taps: on layers that a prefill reads.
    """

    inputs: dict[str, Any]
    held: int = 0
    deepstack: DeepStack | None = None
    cache: Any = None
    thread: int = field(default_factory=threading.get_ident)
    asking: bool = False
    prefill: Prefill | None = None
    cached: CachedPrefill | None = None
    new: int = 0
    past: int = 0
    mask: Tensor | None = None
    since: Tensor | None = None
    turn: LaterTurn | None = None
    ran: int = 0
    taps: ExitStack = field(default_factory=ExitStack)


def watched(decoder: Decoder, number: int) -> bool:
    """Whether anybody else sees what goes from a layer to the next one, as `output_hidden_states=True` does: by hooks
    of any kind, of either layer or of all modules, or, in older releases of transformers, by a forward of its own."""
    ends = slice(number, number + 2)
    return bool(
        _has_any_global_hook()  # type: ignore[no-untyped-call]
        or any(
            part._forward_hooks or part._forward_pre_hooks or part._backward_hooks or part._backward_pre_hooks
            for part in (*decoder.layers[ends], *decoder.called[ends])
        )
        or not all(hasattr(layer.forward, "__tokenprune__") for layer in decoder.layers[ends])
    )


def check_due(call: Call, decoder: Decoder, number: int) -> None:
    """Does this layer run when it should? Raises EngineError, which names what was changed under the context."""
    if number != call.ran or (number == 0 and not call.held):
        decoder.check_layers()
    if number != call.ran:
        raise decoder.changed(f"layer {number} runs where the turn of layer {call.ran} is, whose forward was not seen")


def check_all_ran(call: Call | None, decoder: Decoder, never_prunes: Callable[[], bool]) -> None:
    """Did every layer run, as it has to where anything is pruned? Raises EngineError, which names what was changed."""
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


def refuse_checkpoints(decoder: Decoder, strategy: str) -> None:
    """Refuse that layers run again in the backward pass."""
    if decoder.checkpoints:
        raise UnsupportedError(
            f"strategy {strategy!r}: gradient checkpointing runs layers again in the backward pass, "
            "which is not supported where anything is pruned; switch it off: model.gradient_checkpointing_disable()"
        )
    if checkpointed():
        raise UnsupportedError(
            f"strategy {strategy!r}: torch.utils.checkpoint found around the model, which is run again in the backward "
            "pass, when nothing may prune it; call the model without it"
        )


def refuse_attentions(inputs: dict[str, Any], decoder: Any) -> None:
    """Refuse that attention weights are asked for, of a layer that attends to fewer tokens than the sequence has."""
    if inputs.get("output_attentions", getattr(decoder.config, "output_attentions", False)):
        raise UnsupportedError(
            "output_attentions=True is not supported under tokenprune.prune(): pruned layers attend to fewer "
            "tokens than the sequence has; call the model without it, or let a strategy read "
            "tokenprune.core.reads.AttentionFrom"
        )


def reentered() -> PluginError:
    return PluginError(
        "the model was called while it waits for a strategy, an observer or an adapter; declare what a stage reads "
        "(tokenprune.core.reads), and call the model after the run"
    )
