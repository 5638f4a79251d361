"""Interception of `generate`: a call may make several prefills, and is pruned as a whole or not at all."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor, nn

from tokenprune.engine.calls.call_stack import EarlierCalls
from tokenprune.engine.calls.interception import shadowed
from tokenprune.engine.calls.wrappers import modules_of
from tokenprune.errors import UnsupportedError

PREPARE = "_prepare_generation_config"


@dataclass(eq=False)
class Generation:
    """A call of `generate` in progress.

    Attributes:
        model: the model that generates.
        outer: the enclosing call of another model's `generate`.
        begun: whether the decoder has been called; its first input is the prompt.
        prompt: fingerprint of the prompt, to recognise it later; None = not recorded.
    """

    model: Any
    outer: Generation | None = None
    begun: bool = False
    prompt: Tensor | None = None


_GENERATION: ContextVar[Generation | None] = ContextVar("_GENERATION", default=None)


def generation(model: Any) -> Generation | None:
    """This thread's current call of `model.generate` that began inside a context; None = there is none."""
    now = _GENERATION.get()
    while now is not None and now.model is not model:
        now = now.outer
    return now


class Generations:
    """The calls of `generate` that belong to one context.

    A call that began before the context was opened finishes unpruned. A call that has not finished when the context is
    closed is refused to continue.

    Args:
        model: the model that generates.
        decoder: the decoder that it calls.
    """

    def __init__(self, model: nn.Module, decoder: nn.Module) -> None:
        self._model, self._decoder = model, decoder
        self._open = False
        self._before = EarlierCalls(model, "generate")

    @contextmanager
    def intercepted(self, prunes: Callable[[], bool]) -> Iterator[None]:
        """Intercept `generate` while open; refuse settings by which the first forward is not exactly the prompt.

        Args:
            prunes: whether the strategy prunes anything on this model.
        """
        with ExitStack() as undo:
            undo.enter_context(shadowed(self._model, "generate", partial(self._generate, prunes)))
            for module in modules_of(self._model):  # the model may delegate generate() to a submodule
                if hasattr(type(module), PREPARE) or PREPARE in vars(module):  # modules are slow to say what they lack
                    undo.enter_context(shadowed(module, PREPARE, partial(_prepare, prunes)))
            yield

    @contextmanager
    def open(self) -> Iterator[None]:
        """Calls that begin while this is open belong to the context: all of their prefills are intercepted."""
        self._open = True  # first, so that no call can begin unseen before the stacks are recorded
        self._before.record()
        try:
            yield
        finally:
            self._open = False

    def now(self) -> Generation | None:
        """This thread's current call of the model's `generate`; None = there is none."""
        return generation(self._model)

    def missed(self) -> bool:
        """Whether the decoder is being called by a `generate` that began before the context was opened."""
        return self.now() is None and self._before.in_progress()

    def _generate(self, prunes: Callable[[], bool], original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if not self._open:
            return original(*args, **kwargs)
        given = inspect.signature(original).bind_partial(*args).arguments
        if {**given, **kwargs}.get("assistant_model") is not None:
            _refuse_guesses("assistant_model", prunes)
        token = _GENERATION.set(Generation(self._model, _GENERATION.get()))
        try:
            with shadowed(self._decoder, "forward", self._check_open):
                return original(*args, **kwargs)
        finally:
            _GENERATION.reset(token)

    def _check_open(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if not self._open:
            raise UnsupportedError(
                "the context of tokenprune.prune() in which this generate() began is closed; let it finish inside the "
                "context (join its thread first)"
            )
        return original(*args, **kwargs)


def _prepare(prunes: Callable[[], bool], original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Check the settings that `generate` uses, merged from its arguments and the generation configurations."""
    prepared = original(*args, **kwargs)
    config = prepared[0] if isinstance(prepared, tuple) else prepared
    size = getattr(config, "prefill_chunk_size", None)
    if size is not None:
        raise UnsupportedError(
            f"prefill_chunk_size={size} is not supported under tokenprune.prune(): generate() would pass the prompt in "
            "parts, but image tokens are chosen once, on the whole prompt; remove prefill_chunk_size"
        )
    for name in ("prompt_lookup_num_tokens", "assistant_early_exit"):
        if getattr(config, name, None) is not None:
            _refuse_guesses(name, prunes)
    return prepared


def _refuse_guesses(name: str, prunes: Callable[[], bool]) -> None:
    if prunes():
        raise UnsupportedError(
            f"{name} is not supported under tokenprune.prune(): in assisted decoding the first forward contains "
            "candidate tokens after the prompt, which would affect the choice of image tokens; generate without it"
        )
