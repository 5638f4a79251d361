"""PyTorch's process-wide settings, which a plugin's code must not change.

Loading a model changes some of them temporarily: changes while another thread loads one are not attributed to a plugin.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from tokenprune.errors import PluginError

# name: how to get it, how to set it
SETTINGS: dict[str, tuple[Callable[[], Any], Callable[[Any], Any]]] = {
    "whether gradients are recorded": (torch.is_grad_enabled, torch.set_grad_enabled),
    "the default type": (torch.get_default_dtype, torch.set_default_dtype),
    "whether algorithms are deterministic": (
        torch.are_deterministic_algorithms_enabled,
        torch.use_deterministic_algorithms,
    ),
}


OF_THE_THREAD = ("whether gradients are recorded",)  # the others are per process
_LOCK = threading.Lock()
_numbers = itertools.count(1)
_loads: set[int] = set()
_latest = 0


@contextmanager
def loading() -> Iterator[None]:
    """A context in which a model is loaded."""
    global _latest
    with _LOCK:
        _latest = number = next(_numbers)
        _loads.add(number)
    try:
        yield
    finally:
        with _LOCK:
            _loads.remove(number)


def _loaded_since(latest: int, loads: set[int]) -> bool:
    return bool(loads) or _latest != latest


@contextmanager
def same_settings(refuse: Callable[[str], PluginError]) -> Iterator[None]:
    """Restore PyTorch's settings at the end.

    Args:
        refuse: makes the error that names the plugin from what it changed.

    Raises:
        PluginError: one of them was changed, and no other error was raised.
    """
    before, latest, loads = [ask() for ask, _ in SETTINGS.values()], _latest, set(_loads)
    try:
        yield
    except BaseException:
        _put_back(before, _loaded_since(latest, loads))
        raise
    changed = _put_back(before, _loaded_since(latest, loads))
    if changed:
        raise refuse(f"changed {' and '.join(changed)} for the whole process")


def _put_back(before: list[Any], loaded: bool) -> list[str]:
    changed = []
    for (what, (ask, put)), old in zip(SETTINGS.items(), before, strict=True):
        if ask() != old and not (loaded and what not in OF_THE_THREAD):
            put(old)
            changed.append(what)
    return changed
