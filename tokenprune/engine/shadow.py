"""Looking on at a method of one object, for as long as a context is open.

Forward hooks of PyTorch would not do: code that `torch.compile` made before does not look for new hooks, hooks run in
the order of their registration, so that what others see depends on who came first, and they have no `finally`. A method
in the instance's own dictionary is seen by compiled code, is innermost to all hooks, and is one function around the
call.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NoReturn, TypeVar

import torch

from tokenprune.errors import UnsupportedError

_Function = TypeVar("_Function", bound=Callable[..., Any])


def untraced(function: _Function) -> _Function:
    """`torch.compile` leaves this function and all that it calls alone."""
    return torch.compiler.disable(function)  # type: ignore[no-any-return,no-untyped-call]


def traced(function: _Function) -> _Function:
    """`torch.compile` leaves this function alone, but compiles what it calls."""
    return torch.compiler.disable(function, recursive=False)  # type: ignore[no-any-return,no-untyped-call]


@contextmanager
def shadowed(thing: Any, name: str, look: Callable[..., Any]) -> Iterator[None]:
    """Calls of `thing.name(...)` go to `look(original, ...)` meanwhile; the class and other objects are left alone.

    Nothing happens where there is no such method. `look` should be `traced` or `untraced`.
    """
    original = getattr(thing, name, None)
    if original is None:
        yield
        return
    before = thing.__dict__.get(name)
    shadow = _Shadow(original, look)
    thing.__dict__[name] = shadow
    try:
        yield
    finally:
        if thing.__dict__.get(name) is shadow:  # else somebody else put another one there since
            if before is None:
                del thing.__dict__[name]
            else:
                thing.__dict__[name] = before


class _Shadow:
    """Calls `look(original, ...)`. Refuses to be copied: the copy's calls would go to the original object."""

    __tokenprune__ = True

    def __init__(self, original: Callable[..., Any], look: Callable[..., Any]) -> None:
        functools.update_wrapper(self, original)
        self._original, self._look = original, look

    @traced
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._look(self._original, *args, **kwargs)

    def __deepcopy__(self, memo: Any) -> NoReturn:
        raise UnsupportedError(
            "a model cannot be copied or pickled while it is under tokenprune.prune(), since the copy would call the "
            "original; copy it before or after"
        )

    def __reduce__(self) -> NoReturn:
        self.__deepcopy__(None)
