"""Which calls the present thread is in the middle of, as its stack tells, also of those that nobody saw begin."""

from __future__ import annotations

import inspect
from types import FrameType
from typing import Any


def under_way(thing: Any, name: str) -> bool:
    """Whether this thread is in a call of `thing.name(...)`."""
    return any(
        frame.f_code.co_name == name and frame.f_locals.get("self") is thing
        for frame in _stack()  # the name first, since asking for a frame's variables copies them
    )


def _stack() -> list[FrameType]:
    frames, frame = [], inspect.currentframe()
    while frame is not None:
        frames.append(frame)
        frame = frame.f_back
    return frames
