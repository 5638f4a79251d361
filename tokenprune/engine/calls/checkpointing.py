"""Gradient checkpointing: decoder layers that the backward pass runs again.

A layer that checkpoints itself (`model.gradient_checkpointing_enable()`) is given what it runs on, the remaining tokens
with their masks and tables, before it hands itself to the checkpoint: the second run is of the same arguments, and
nothing is decided, counted or told again, with the context open or closed. So all depends on the order, ours outside
of the checkpoint. Where it is the other way round, a second run would come here again with the full sequence, to a
prefill that is over: that is refused.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from tokenprune.engine.calls.call_stack import in_checkpoint
from tokenprune.errors import UnsupportedError

FUNCTION = "_gradient_checkpointing_func"
"""What a layer of transformers hands itself to: in its `forward`, or, in older releases, around it, in `__call__`."""


def checkpoints_itself(layer: Any) -> bool:
    """True if a layer is one that checkpoints itself while it is in training mode."""
    return bool(getattr(layer, "gradient_checkpointing", False)) and FUNCTION in vars(layer)


def parts(function: Any) -> tuple[Any, dict[str, Any]] | None:
    """What a layer hands to a checkpoint, without its keyword arguments, and those; None if it is of another form."""
    if not isinstance(function, partial):
        return None
    return partial(function.func, *function.args), dict(function.keywords)


def refuse_around(strategy: str, hidden: Tensor) -> None:
    """Refuse that this layer runs again as part of something larger.

    Args:
        strategy: name, for the message.
        hidden: what the layer was given.

    Raises:
        UnsupportedError: a checkpoint around the layer.
    """
    # in evaluation no stack is walked; the graph is off inside of a reentrant checkpoint, but not what comes into it
    if (torch.is_grad_enabled() or hidden.requires_grad) and in_checkpoint():
        raise UnsupportedError(
            f"strategy {strategy!r}: torch.utils.checkpoint found around the model or a layer of it, which runs again "
            "in the backward pass, when nothing may prune it; call model.gradient_checkpointing_enable() before "
            "tokenprune.prune() instead"
        )


def refuse_observed(strategy: str) -> UnsupportedError:
    """The error for hooks that would run within a layer's checkpoint, on the remaining tokens alone."""
    return UnsupportedError(
        f"strategy {strategy!r}: hooks on decoder layers or output_hidden_states=True found with gradient "
        "checkpointing, which this release of transformers puts around them; remove them, switch checkpointing off, or "
        "install a newer transformers"
    )


def refuse_scaled(strategy: str) -> UnsupportedError:
    """The error for queries that are scaled by their place, which a second run would scale by another one."""
    return UnsupportedError(
        f"strategy {strategy!r}: gradient checkpointing found with a prompt so long that the model scales its "
        "attention by place, which the backward pass would not repeat; switch checkpointing off, or shorten the prompt"
    )


def refuse_cached(what: str) -> UnsupportedError:
    """The error for calls that need the KV cache that checkpointed layers do not fill."""
    return UnsupportedError(
        f"{what} found with gradient checkpointing in training mode, in which layers have no KV cache; call "
        "model.eval() first, or model.gradient_checkpointing_disable()"
    )
