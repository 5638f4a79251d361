"""Looking on at a method of one object, for as long as a context is open."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def shadowed(thing: Any, name: str, look: Callable[..., Any]) -> Iterator[None]:
    """Calls of `thing.name(...)` go to `look(original, ...)` meanwhile; the class and other objects are left alone.

    Nothing happens where there is no such method.
    """
    original = getattr(thing, name, None)
    if original is None:
        yield
        return
    before = thing.__dict__.get(name)
    thing.__dict__[name] = functools.wraps(original)(functools.partial(look, original))
    try:
        yield
    finally:
        if before is None:
            del thing.__dict__[name]
        else:
            thing.__dict__[name] = before
