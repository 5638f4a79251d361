"""Looking on at a method of one object, for as long as a context is open.

Forward hooks of PyTorch would not do: code that `torch.compile` made before does not look for new hooks, hooks run in
the order of their registration, so that what others see depends on who came first, and they have no `finally`. A method
in the instance's own dictionary is seen by compiled code, is innermost to all hooks, and is one function around the
call.

What looks on does so for some threads only: a model that one thread prunes may be called by another one meanwhile.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NoReturn, TypeVar

import torch

from tokenprune.errors import UnsupportedError

_Function = TypeVar("_Function", bound=Callable[..., Any])
_CONCERNS: ContextVar[Callable[[], bool] | None] = ContextVar("_CONCERNS", default=None)
_LOCK = threading.Lock()


def untraced(function: _Function) -> _Function:
    """`torch.compile` leaves this function and all that it calls alone."""
    return torch.compiler.disable(function)  # type: ignore[no-any-return,no-untyped-call]


def traced(function: _Function) -> _Function:
    """`torch.compile` leaves this function alone, but compiles what it calls."""
    return torch.compiler.disable(function, recursive=False)  # type: ignore[no-any-return,no-untyped-call]


@contextmanager
def concerning(concerns: Callable[[], bool]) -> Iterator[None]:
    """What begins to look on meanwhile looks at calls in threads where `concerns()` is true, instead of this one's."""
    token = _CONCERNS.set(untraced(concerns))
    try:
        yield
    finally:
        _CONCERNS.reset(token)


def own_calls(hook: _Function) -> _Function:
    """A hook of PyTorch that sees the calls of this thread only; to the others it says None: leave them as they are."""
    thread = threading.get_ident()

    @functools.wraps(hook)
    def only(*args: Any, **kwargs: Any) -> Any:
        return hook(*args, **kwargs) if threading.get_ident() == thread else None

    return only  # type: ignore[return-value]


@contextmanager
def shadowed(thing: Any, name: str, look: Callable[..., Any], every_thread: bool = False) -> Iterator[None]:
    """Calls of `thing.name(...)` go to `look(original, ...)` meanwhile; the class and other objects are left alone.

    Calls of other threads are left alone too, but see `concerning`; with `every_thread` it is up to `look` to do so.
    Several may look on, and stop in any order. Nothing happens where there is no such method. `look` should be `traced`
    or `untraced`.
    """
    with _LOCK:
        original = getattr(thing, name, None)
        if original is not None:
            concerns = None if every_thread else _CONCERNS.get() or _only_here()
            shadow = _Shadow(original, look, thing.__dict__.get(name), concerns)
            thing.__dict__[name] = shadow
    if original is None:
        yield
        return
    try:
        yield
    finally:
        shadow.open = False
        with _LOCK:  # what others put on top since stays, and takes this one along when it goes
            while isinstance(top := thing.__dict__.get(name), _Shadow) and not top.open:
                if top.before is None:
                    del thing.__dict__[name]
                else:
                    thing.__dict__[name] = top.before


def _only_here() -> Callable[[], bool]:
    thread = threading.get_ident()
    return untraced(lambda: threading.get_ident() == thread)


class _Shadow:
    """Calls `look(original, ...)`. Refuses to be copied: the copy's calls would go to the original object.

    Attributes:
        before: what stood in the object's own dictionary.
        open: until the look is over; then calls go on to the original.
    """

    __tokenprune__ = True

    def __init__(
        self, original: Callable[..., Any], look: Callable[..., Any], before: Any, concerns: Callable[[], bool] | None
    ) -> None:
        functools.update_wrapper(self, original)
        self._original, self._look, self._concerns = original, look, concerns
        self.before, self.open = before, True

    @traced
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not self.open or not (self._concerns is None or self._concerns()):
            return self._original(*args, **kwargs)
        return self._look(self._original, *args, **kwargs)

    def __deepcopy__(self, memo: Any) -> NoReturn:
        raise UnsupportedError(
            "a model cannot be copied or pickled while it is under tokenprune.prune(), since the copy would call the "
            "original; copy it before or after"
        )

    def __reduce__(self) -> NoReturn:
        self.__deepcopy__(None)
