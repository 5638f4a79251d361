"""Which calls the present thread is in the middle of, as its stack tells, also of those that nobody saw begin."""

from __future__ import annotations

import inspect
from types import FrameType
from typing import Any

import torch
from torch import Tensor
from torch.utils import checkpoint


def under_way(thing: Any, name: str) -> bool:
    """Whether this thread is in a call of `thing.name(...)`."""
    return any(
        frame.f_code.co_name == name and frame.f_locals.get("self") is thing
        for frame in _stack()  # the name first, since asking for a frame's variables copies them
    )


def checkpointed() -> bool:
    """Whether this thread is in a function that `torch.utils.checkpoint` will run again in a backward pass."""
    for frame in _stack():
        if frame.f_code.co_filename == checkpoint.__file__:
            if frame.f_code.co_name == "checkpoint" and torch.is_grad_enabled():  # not where it is reentrant
                return True
            given = frame.f_locals.get("args", ()) if frame.f_code.co_name == "forward" else ()
            if any(isinstance(value, Tensor) and value.requires_grad for value in given):
                return True
    return False


def _stack() -> list[FrameType]:
    frames, frame = [], inspect.currentframe()
    while frame is not None:
        frames.append(frame)
        frame = frame.f_back
    return frames
