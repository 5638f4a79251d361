"""State of the latest conversation that some models store on themselves, stored with each conversation instead.

The Qwen-VL families store on the model the difference between positions and length of a prompt with images
(`rope_deltas`), for the decoding steps. A second conversation, alternating or in another thread, would overwrite it.
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from weakref import WeakKeyDictionary

from tokenprune.engine.calls.interception import shadowed

STATE = "rope_deltas"
NAME = "past_key_values"
_MARK = "_tokenprune_rope_deltas"
_METHODS = ("prepare_inputs_for_generation", "_prepare_position_ids_for_generation")
_LOCKS: WeakKeyDictionary[Any, Any] = WeakKeyDictionary()
_LOCK = threading.Lock()


class Conversations:
    """The conversations with one model in one context, each identified by its cache or, before it has one, its thread.

    Args:
        model: the model, with or without its language-modelling head, whose `generate` uses the state too.
    """

    def __init__(self, model: Any) -> None:
        self._model, self._base = model, model.base_model
        self._now = threading.local()
        with _LOCK:
            self._lock = _LOCKS.setdefault(self._base, threading.RLock())

    @contextmanager
    def separated(self, restored: bool = True) -> Iterator[None]:
        """Keep the conversations' states separate while open.

        Args:
            restored: whether the model's earlier state is restored at the end; else it is that of this thread's latest
                conversation, as without pruning.
        """
        if not hasattr(self._base, STATE):
            yield
            return
        before = getattr(self._base, STATE)
        with ExitStack() as undo:
            undo.callback(self._restore, before, restored)
            undo.enter_context(shadowed(self._base, "forward", self._with_state))
            for method in _METHODS:
                undo.enter_context(shadowed(self._model, method, self._with_state))
            yield

    def _restore(self, before: Any, restored: bool) -> None:
        setattr(self._base, STATE, before if restored else getattr(self._now, "state", before))

    def _with_state(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        cache = _cache_in(original, args, kwargs)
        with self._lock:
            if hasattr(cache, _MARK):
                setattr(self._base, STATE, getattr(cache, _MARK))
            elif hasattr(self._now, "state"):
                setattr(self._base, STATE, self._now.state)
            output = original(*args, **kwargs)
            self._now.state = state = getattr(self._base, STATE)
        cache = getattr(output, "past_key_values", None) if cache is None else cache
        if cache is not None:
            setattr(cache, _MARK, state)
        return output


def _cache_in(method: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The cache among a call's arguments, or in a dict among them."""
    given = {**(inspect.signature(method).bind_partial(*args).arguments if args else {}), **kwargs}
    found = (some[NAME] for some in (given, *given.values()) if isinstance(some, dict) and NAME in some)
    return next(found, None)
