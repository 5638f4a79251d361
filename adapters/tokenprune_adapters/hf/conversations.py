"""What some models keep of their latest conversation on themselves, kept with each conversation instead.

Qwen-VL's families note on the model by how much the positions of a prompt with images fall short of its length
(`rope_deltas`), for the steps that follow. A second conversation, in turn or in another thread, would put its own
there.
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
    """Those that one model has in one context, each known by its cache, and until it has one by its thread.

    Args:
        model: with its language-modelling head, whose `generate` reads the state too, or without.
    """

    def __init__(self, model: Any) -> None:
        self._model, self._base = model, model.base_model
        self._now = threading.local()
        with _LOCK:
            self._lock = _LOCKS.setdefault(self._base, threading.RLock())

    @contextmanager
    def kept_apart(self, restored: bool = True) -> Iterator[None]:
        """Look on meanwhile.

        Args:
            restored: whether the model's state afterwards is what it was before; else it is that of this thread's
                latest conversation, as without pruning.
        """
        if not hasattr(self._base, STATE):
            yield
            return
        before = getattr(self._base, STATE)
        with ExitStack() as undo:
            undo.callback(self._leave, before, restored)
            undo.enter_context(shadowed(self._base, "forward", self._around))
            for method in _METHODS:
                undo.enter_context(shadowed(self._model, method, self._around))
            yield

    def _leave(self, before: Any, restored: bool) -> None:
        setattr(self._base, STATE, before if restored else getattr(self._now, "state", before))

    def _around(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
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
    """The cache among a call's arguments, by name or by place, or among those that it is to prepare."""
    given = {**(inspect.signature(method).bind_partial(*args).arguments if args else {}), **kwargs}
    found = (some[NAME] for some in (given, *given.values()) if isinstance(some, dict) and NAME in some)
    return next(found, None)
