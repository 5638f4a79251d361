"""Models that go through `torch.compile`, and other ways to record a model once instead of running it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import is_fake

from tokenprune.engine.calls.interception import REASON, being_compiled, shadowed
from tokenprune.engine.calls.wrappers import modules_of
from tokenprune.errors import UnsupportedError


def not_compiled(model: nn.Module) -> AbstractContextManager[Any]:
    """Have the outermost module run as it is, and only the decoder layers compiled.

    So adapters' hooks inside are called, `torch.compile` makes no graphs that it has to give up at the first layer, and
    fullgraph=True holds for the layers.
    """
    return shadowed(model, "forward", _as_it_is)


def _as_it_is(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    return original(*args, **kwargs)


@contextmanager
def told_by_name() -> Iterator[None]:
    """Turn PyTorch's refusals of what cannot be compiled under a pruning context into our own.

    Raises:
        UnsupportedError: `torch.compile(fullgraph=True)`, the stance "fail_on_recompile" and the like.
    """
    try:
        yield
    except Exception as error:  # PyTorch's are of its private classes, and of RuntimeError
        known = type(error).__module__.startswith(("torch.", "builtins"))
        refusal = _refusal(str(error)) if known else ""
        if not refusal:
            raise
        raise UnsupportedError(refusal) from error


# a reason that we give, functions of ours in releases of PyTorch that give no reasons, and a layer all of which is read
_OURS = (REASON, "function Shadow.__call__", "function _tapped_attention ", "fullgraph=True found no compiled frames")


def _refusal(message: str) -> str:
    if "fail_on_recompile" in message:
        return (
            "the stance 'fail_on_recompile' found under tokenprune.prune(), where layers are compiled for themselves, "
            "which they were not yet; call the model in a context under the default stance first"
        )
    if any(words in message for words in _OURS):
        return (
            "torch.compile(fullgraph=True) or a strict torch.export found under tokenprune.prune(), which has to look "
            "on inside of what should be one graph; leave fullgraph=True out"
        )
    return ""


def check_runs(hidden: Tensor) -> None:
    """Refuse a call that only records what the model does, or works out shapes: strategies choose by values.

    Args:
        hidden: [batch, sequence, width], what enters the decoder.

    Raises:
        UnsupportedError: it names what was found.
    """
    found = {
        "torch.jit.trace": torch._C._is_tracing(),
        "torch.export": torch.compiler.is_compiling(),
        "a tensor without values (on the device meta, or a FakeTensor)": hidden.device.type == "meta"
        or is_fake(hidden),
    }
    for name, is_so in found.items():
        if is_so:
            raise UnsupportedError(
                f"{name} found under tokenprune.prune(): image tokens are chosen by their values in every prefill, "
                "which cannot be recorded or left out; call the model itself, or do this outside the context"
            )


@contextmanager
def hooks_seen(model: nn.Module, hooks: dict[nn.Module, set[int]], source: str) -> Iterator[None]:
    """Refuse calls in which compiled code may not call the forward hooks that an adapter put on a model.

    Args:
        model: the model.
        hooks: what `hooks_on` gave before the adapter came.
        source: the adapter, for messages.
    """
    new = [module for module, found in hooks_on(model).items() if found - hooks.get(module, set())]
    with ExitStack() as undo:
        for module in new:
            undo.enter_context(shadowed(module, "forward", partial(_refuse_unseen, type(module).__name__, source)))
        yield


def hooks_on(model: nn.Module) -> dict[nn.Module, set[int]]:
    """The forward hooks on each module of a model that has any, by their ids."""
    found = {module: {*module._forward_pre_hooks, *module._forward_hooks} for module in modules_of(model)}
    return {module: ids for module, ids in found.items() if ids}


def _refuse_unseen(name: str, source: str, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    if being_compiled():
        raise UnsupportedError(
            f"{source} follows {name} by forward hooks, which code that torch.compile made need not call; have it use "
            "tokenprune.engine.shadowed instead, or prune the model without torch.compile"
        )
    return original(*args, **kwargs)
