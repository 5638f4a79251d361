"""Which calls the present thread is in the middle of, by its stack; also of those that began unseen."""

from __future__ import annotations

import inspect
from types import FrameType
from typing import Any

import torch
from torch import Tensor
from torch.utils import checkpoint


def under_way(thing: Any, name: str) -> bool:
    """Whether this thread is in a call of `thing.name(...)`."""
    frame = inspect.currentframe()  # not a list of them, which would hold itself and so all that callers hold
    while frame is not None:
        # the name first, since asking for a frame's variables copies them
        if frame.f_code.co_name == name and frame.f_locals.get("self") is thing:
            return True
        frame = frame.f_back
    return False


def checkpointed() -> bool:
    """Whether this thread is in a function that `torch.utils.checkpoint` will run again in a backward pass."""
    frame = inspect.currentframe()
    while frame is not None:
        if frame.f_code.co_filename == checkpoint.__file__ and _runs_again(frame):
            return True
        frame = frame.f_back
    return False


def _runs_again(frame: FrameType) -> bool:
    if frame.f_code.co_name == "checkpoint":
        return torch.is_grad_enabled()  # which it is not inside of one that is reentrant
    given = frame.f_locals.get("args", ()) if frame.f_code.co_name == "forward" else ()
    return any(isinstance(value, Tensor) and value.requires_grad for value in given)
