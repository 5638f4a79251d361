"""Calls in progress, found on the stacks of threads, including those that began before they could be intercepted."""

from __future__ import annotations

import gc
import inspect
import sys
import threading
from collections.abc import Iterator
from types import FrameType
from typing import Any

import torch
from torch import Tensor
from torch.utils import checkpoint


class EarlierCalls:
    """The calls of a method that were in progress when `record` was called, in all threads; none until then.

    Frames are stored by id, since a stored frame would keep everything alive that it refers to. An id may be reused
    after its call has ended, but only an unintercepted call in a thread that had an earlier call could be mistaken.

    Args:
        thing: the object with the method.
        name: name of the method.
    """

    def __init__(self, thing: Any, name: str) -> None:
        self._thing, self._name = thing, name
        self._frames: dict[int, set[int]] = {}

    def record(self) -> None:
        """Record the calls that are in progress now."""
        for thread, frame in _current_frames().items():
            found = {id(call) for call in _calls(frame, self._thing, self._name)}
            if found:
                self._frames[thread] = found

    def in_progress(self) -> bool:
        """Whether the innermost call of the method on this thread's stack is one of them."""
        known = self._frames.get(threading.get_ident())
        if known is None:  # the usual case, in which no stack is walked
            return False
        innermost = next(_calls(inspect.currentframe(), self._thing, self._name), None)
        return innermost is not None and id(innermost) in known


def _current_frames() -> dict[int, FrameType]:
    """The innermost frame of every thread."""
    collects = gc.isenabled()
    gc.disable()  # a collection in this call deadlocks in Python up to 3.11.7 and 3.12.1 (CPython issue 106883)
    try:
        return sys._current_frames()
    finally:
        if collects:
            gc.enable()


def _calls(frame: FrameType | None, thing: Any, name: str) -> Iterator[FrameType]:
    """The calls of `thing.name(...)` on a stack, innermost first."""
    for call in _stack(frame):
        # the name first, since reading f_locals copies the variables
        if call.f_code.co_name == name and call.f_locals.get("self") is thing:
            yield call


def in_checkpoint() -> bool:
    """Whether this thread is in a function that `torch.utils.checkpoint` will recompute in the backward pass."""
    return any(
        frame.f_code.co_filename == checkpoint.__file__ and _is_recomputed(frame)
        for frame in _stack(inspect.currentframe())
    )


def _stack(frame: FrameType | None) -> Iterator[FrameType]:
    """The frame and its callers, innermost first. A generator: a list of frames would be a reference cycle."""
    while frame is not None:
        yield frame
        frame = frame.f_back


def _is_recomputed(frame: FrameType) -> bool:
    if frame.f_code.co_name == "checkpoint":
        return torch.is_grad_enabled()  # disabled inside a reentrant checkpoint
    given = frame.f_locals.get("args", ()) if frame.f_code.co_name == "forward" else ()
    return any(isinstance(value, Tensor) and value.requires_grad for value in given)
