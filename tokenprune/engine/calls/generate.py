"""Looking on at `generate`, one call of which may make several prefills."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from typing import Any

from torch import nn

from tokenprune.engine.calls.interception import shadowed
from tokenprune.errors import UnsupportedError

_GENERATION: ContextVar[object | None] = ContextVar("_GENERATION", default=None)


def generation() -> object | None:
    """Stands for the call of `generate` under way in this thread; None = there is none."""
    return _GENERATION.get()


_GUESSING = ("assistant_model", "prompt_lookup_num_tokens", "assistant_early_exit")


@contextmanager
def whole_prompts(model: nn.Module, prunes: Callable[[], bool]) -> Iterator[None]:
    """Look on at `generate` of this model meanwhile; refuse that its first call holds less than the prompt, or more.

    Args:
        model: that generates.
        prunes: whether the strategy ever does.
    """
    with shadowed(model, "generate", partial(_generate, model, prunes)):
        yield


def _generate(model: Any, prunes: Callable[[], bool], original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    given = kwargs.get("generation_config") or (args[1] if len(args) > 1 else None)
    config = given or getattr(model, "generation_config", None)
    size = kwargs.get("prefill_chunk_size", getattr(config, "prefill_chunk_size", None))
    if size is not None:
        raise UnsupportedError(
            f"prefill_chunk_size={size} found under tokenprune.prune(): generate() would give the prompt in parts, and "
            "image tokens are chosen once, when all of it is known; leave prefill_chunk_size out"
        )
    guessing = [name for name in _GUESSING if kwargs.get(name, getattr(config, name, None)) is not None]
    if guessing and prunes():
        raise UnsupportedError(
            f"{guessing[0]} found under tokenprune.prune(): in assisted decoding the first call holds guessed tokens "
            "behind the prompt, by which image tokens would be chosen; generate without it"
        )
    token = _GENERATION.set(object())
    try:
        return original(*args, **kwargs)
    finally:
        _GENERATION.reset(token)
