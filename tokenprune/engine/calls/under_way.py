"""Which calls the present thread is in the middle of, by its stack; also of those that began unseen."""

from __future__ import annotations

import inspect
import sys
import threading
from collections.abc import Iterator
from types import FrameType
from typing import Any

import torch
from torch import Tensor
from torch.utils import checkpoint


class CallsBefore:
    """The calls of a method that were under way when `note` was called, in any thread; none until then.

    Frames are known by their ids, since a frame that is kept keeps all that it refers to. An id may come again once its
    call is over: only a call that goes past what intercepts it, in a thread that had one under way, could be mistaken.

    Args:
        thing: whose method it is.
        name: of the method.
    """

    def __init__(self, thing: Any, name: str) -> None:
        self._thing, self._name = thing, name
        self._frames: dict[int, set[int]] = {}

    def note(self) -> None:
        """Note the calls that are under way now."""
        for thread, frame in sys._current_frames().items():
            found = {id(call) for call in _calls(frame, self._thing, self._name)}
            if found:
                self._frames[thread] = found

    def under_way(self) -> bool:
        """Whether the innermost call of the method on this thread's stack is one of them."""
        known = self._frames.get(threading.get_ident())
        if known is None:  # as nearly always: no stack is walked
            return False
        innermost = next(_calls(inspect.currentframe(), self._thing, self._name), None)
        return innermost is not None and id(innermost) in known


def _calls(frame: FrameType | None, thing: Any, name: str) -> Iterator[FrameType]:
    """The calls of `thing.name(...)` on a stack, innermost first."""
    for call in _stack(frame):
        # the name first, since asking for a frame's variables copies them
        if call.f_code.co_name == name and call.f_locals.get("self") is thing:
            yield call


def checkpointed() -> bool:
    """Whether this thread is in a function that `torch.utils.checkpoint` will run again in a backward pass."""
    return any(
        frame.f_code.co_filename == checkpoint.__file__ and _runs_again(frame)
        for frame in _stack(inspect.currentframe())
    )


def _stack(frame: FrameType | None) -> Iterator[FrameType]:
    """The frame and those below it, innermost first; no list, which would hold itself and so all that callers hold."""
    while frame is not None:
        yield frame
        frame = frame.f_back


def _runs_again(frame: FrameType) -> bool:
    if frame.f_code.co_name == "checkpoint":
        return torch.is_grad_enabled()  # which it is not inside of one that is reentrant
    given = frame.f_locals.get("args", ()) if frame.f_code.co_name == "forward" else ()
    return any(isinstance(value, Tensor) and value.requires_grad for value in given)
