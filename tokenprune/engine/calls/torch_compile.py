"""Models compiled with `torch.compile`; tracing and export, which record a model instead of running it, are refused."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import is_fake
from transformers import Cache

from tokenprune.engine.calls.interception import REASON, is_compiled_call, shadowed
from tokenprune.engine.calls.wrappers import modules_of
from tokenprune.errors import UnsupportedError


def uncompiled_forward(model: nn.Module) -> AbstractContextManager[Any]:
    """Run the outermost module uncompiled, so that only decoder layers are compiled.

    Adapters' hooks inside it are then called, `torch.compile` builds no graphs that break at the first layer, and
    fullgraph=True applies to the layers.
    """
    return shadowed(model, "forward", _call_original)


def _call_original(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    return original(*args, **kwargs)


@contextmanager
def translate_compile_errors() -> Iterator[None]:
    """Replace PyTorch's errors for code that cannot be compiled under a pruning context.

    Raises:
        UnsupportedError: for `torch.compile(fullgraph=True)`, the stance "fail_on_recompile" and similar options.
    """
    try:
        yield
    except Exception as error:  # PyTorch raises private classes and RuntimeError
        known = type(error).__module__.startswith(("torch.", "builtins"))
        refusal = _refusal(str(error)) if known else ""
        if not refusal:
            raise
        raise UnsupportedError(refusal) from error


# our reason; our functions, for releases of PyTorch that report no reason; the message for a layer that is fully tapped
_OURS = (REASON, "function Shadow.__call__", "function _tapped_attention ", "fullgraph=True found no compiled frames")


def _refusal(message: str) -> str:
    if "fail_on_recompile" in message:
        return (
            "the stance 'fail_on_recompile' is not supported under tokenprune.prune() before the layers have been "
            "compiled one by one; first call the model in a context under the default stance"
        )
    if any(words in message for words in _OURS):
        return (
            "torch.compile(fullgraph=True) and strict torch.export are not supported under tokenprune.prune(), which "
            "intercepts calls inside the graph; remove fullgraph=True"
        )
    return ""


class OneLayer(Cache):
    """A KV cache as one decoder layer sees it, whose updates do not depend on the layer's number.

    Code that was compiled with the number could not be used by other layers. All else is the cache's own.
    """

    def __init__(self, cache: Cache, number: int) -> None:
        self._cache = cache
        self._own: Any = cache.layers[number]

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        """Append to the layer's part."""
        return self._own.update(key_states, value_states, *args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._cache, name)


def one_layer(number: int, kwargs: dict[str, Any]) -> dict[str, Any]:
    """A layer's keyword arguments with the cache as this layer sees it."""
    cache = kwargs.get("past_key_values")
    if not isinstance(cache, Cache) or type(cache).update is not Cache.update or getattr(cache, "offloading", False):
        return kwargs
    while len(cache.layers) <= number and cache.layer_class_to_replicate is not None:
        cache.layers.append(cache.layer_class_to_replicate())
    return {**kwargs, "past_key_values": OneLayer(cache, number)}


def check_not_traced(hidden: Tensor) -> None:
    """Refuse tracing, export and tensors without values: strategies choose tokens by values.

    Args:
        hidden: [batch, sequence, width], the decoder's input.

    Raises:
        UnsupportedError: names what was found.
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
                f"{name} is not supported under tokenprune.prune(): image tokens are chosen by value in each prefill, "
                "which cannot be recorded; call the model itself, or do this outside the context"
            )


@contextmanager
def refuse_skipped_hooks(model: nn.Module, hooks: dict[nn.Module, set[int]], source: str) -> Iterator[None]:
    """Refuse calls in which compiled code may skip forward hooks that an adapter added to a model.

    Args:
        model: the model.
        hooks: the result of `hooks_on` before the adapter's `capture` was opened.
        source: the adapter, for messages.
    """
    new = [module for module, found in hooks_on(model).items() if found - hooks.get(module, set())]
    with ExitStack() as undo:
        for module in new:
            undo.enter_context(shadowed(module, "forward", partial(_refuse_compiled, type(module).__name__, source)))
        yield


def hooks_on(model: nn.Module) -> dict[nn.Module, set[int]]:
    """The forward hooks on each module of a model that has any, by their ids."""
    found = {module: {*module._forward_pre_hooks, *module._forward_hooks} for module in modules_of(model)}
    return {module: ids for module, ids in found.items() if ids}


def _refuse_compiled(name: str, source: str, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    if is_compiled_call():
        raise UnsupportedError(
            f"{source} observes {name} with forward hooks, which code compiled by torch.compile may skip; use "
            "tokenprune.engine.shadowed in the adapter, or prune the model without torch.compile"
        )
    return original(*args, **kwargs)
