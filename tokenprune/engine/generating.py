"""Looking on at `generate`, one call of which may make several prefills."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from typing import Any

from torch import nn

from tokenprune.engine.shadow import shadowed
from tokenprune.errors import UnsupportedError

_GENERATION: ContextVar[object | None] = ContextVar("_GENERATION", default=None)


def generation() -> object | None:
    """Stands for the call of `generate` under way in this thread; None = there is none."""
    return _GENERATION.get()


@contextmanager
def whole_prompts(model: nn.Module) -> Iterator[None]:
    """Look on at `generate` of this model meanwhile, and refuse that it gives a prompt in parts."""
    with shadowed(model, "generate", partial(_generate, model)):
        yield


def _generate(model: Any, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    given = kwargs.get("generation_config") or (args[1] if len(args) > 1 else None)
    config = given or getattr(model, "generation_config", None)
    size = kwargs.get("prefill_chunk_size", getattr(config, "prefill_chunk_size", None))
    if size is not None:
        raise UnsupportedError(
            f"prefill_chunk_size={size} found under tokenprune.prune(): generate() would give the prompt in parts, and "
            "image tokens are chosen once, when all of it is known; leave prefill_chunk_size out"
        )
    token = _GENERATION.set(object())
    try:
        return original(*args, **kwargs)
    finally:
        _GENERATION.reset(token)
