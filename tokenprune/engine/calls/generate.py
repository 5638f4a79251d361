"""Intercepting `generate`: one call may make several prefills, and belongs to a context wholly or not at all."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor, nn

from tokenprune.engine.calls.interception import shadowed
from tokenprune.engine.calls.under_way import CallsBefore
from tokenprune.engine.calls.wrappers import modules_of
from tokenprune.errors import UnsupportedError


@dataclass(eq=False)
class Generation:
    """A call of `generate` under way.

    Attributes:
        model: that generates.
        outer: the call, of another model, that it is made in.
        begun: whether the decoder has been called in it; what it is called with first is the prompt.
        prompt: how that looked, to recognise it by; None = it was not noted.
    """

    model: Any
    outer: Generation | None = None
    begun: bool = False
    prompt: Tensor | None = None


_GENERATION: ContextVar[Generation | None] = ContextVar("_GENERATION", default=None)


def generation(model: Any) -> Generation | None:
    """This thread's call of `model.generate` that a context saw begin; None = there is none."""
    now = _GENERATION.get()
    while now is not None and now.model is not model:
        now = now.outer
    return now


class Generations:
    """The calls of `generate` of one context.

    A call that began before the context was open is none of them, and runs on unpruned. One that is not at its end when
    the context is closed is refused to go on.

    Args:
        model: that generates.
        decoder: that it calls.
    """

    def __init__(self, model: nn.Module, decoder: nn.Module) -> None:
        self._model, self._decoder = model, decoder
        self._open = False
        self._before = CallsBefore(model, "generate")

    @contextmanager
    def followed(self, prunes: Callable[[], bool]) -> Iterator[None]:
        """Intercept `generate` while open; refuse that its first call holds less than the prompt, or more.

        Args:
            prunes: whether the strategy ever does.
        """
        with ExitStack() as undo:
            undo.enter_context(shadowed(self._model, "generate", partial(self._generate, prunes)))
            for module in modules_of(self._model):  # of a part, where the model has that one generate
                undo.enter_context(shadowed(module, "_prepare_generation_config", partial(_prepare, prunes)))
            yield

    @contextmanager
    def open(self) -> Iterator[None]:
        """Calls that begin while this is open belong to the context: all of their prefills are intercepted."""
        self._open = True  # first: a call that begins from here on is seen
        self._before.note()
        try:
            yield
        finally:
            self._open = False

    def now(self) -> Generation | None:
        """This thread's call of the model's `generate`; None = there is none."""
        return generation(self._model)

    def missed(self) -> bool:
        """Asked when the decoder is called: whether that is in a `generate` that began before the context was open."""
        return self.now() is None and self._before.under_way()

    def _generate(self, prunes: Callable[[], bool], original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if not self._open:
            return original(*args, **kwargs)
        given = inspect.signature(original).bind_partial(*args).arguments
        if {**given, **kwargs}.get("assistant_model") is not None:
            _refuse_guesses("assistant_model", prunes)
        token = _GENERATION.set(Generation(self._model, _GENERATION.get()))
        try:
            with shadowed(self._decoder, "forward", self._go_on):
                return original(*args, **kwargs)
        finally:
            _GENERATION.reset(token)

    def _go_on(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if not self._open:
            raise UnsupportedError(
                "the context of tokenprune.prune() in which this generate() began is closed; have it come to its end "
                "inside the context, where it runs in another thread by joining that"
            )
        return original(*args, **kwargs)


def _prepare(prunes: Callable[[], bool], original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """The settings that `generate` will really use: of its arguments, a configuration, and the model's own."""
    prepared = original(*args, **kwargs)
    config = prepared[0] if isinstance(prepared, tuple) else prepared
    size = getattr(config, "prefill_chunk_size", None)
    if size is not None:
        raise UnsupportedError(
            f"prefill_chunk_size={size} found under tokenprune.prune(): generate() would give the prompt in parts, and "
            "image tokens are chosen once, when all of it is known; leave prefill_chunk_size out"
        )
    for name in ("prompt_lookup_num_tokens", "assistant_early_exit"):
        if getattr(config, name, None) is not None:
            _refuse_guesses(name, prunes)
    return prepared


def _refuse_guesses(name: str, prunes: Callable[[], bool]) -> None:
    if prunes():
        raise UnsupportedError(
            f"{name} found under tokenprune.prune(): in assisted decoding the first call holds guessed tokens "
            "behind the prompt, by which image tokens would be chosen; generate without it"
        )
