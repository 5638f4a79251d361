"""PyTorch's settings of the whole process, which a plugin's code must leave as they were."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from tokenprune.errors import PluginError

# what it is: how to ask for it, how to set it
SETTINGS: dict[str, tuple[Callable[[], Any], Callable[[Any], Any]]] = {
    "whether gradients are recorded": (torch.is_grad_enabled, torch.set_grad_enabled),
    "the default type": (torch.get_default_dtype, torch.set_default_dtype),
    "whether algorithms are deterministic": (
        torch.are_deterministic_algorithms_enabled,
        torch.use_deterministic_algorithms,
    ),
}


@contextmanager
def same_settings(refuse: Callable[[str], PluginError]) -> Iterator[None]:
    """Put PyTorch's settings back on the way out.

    Args:
        refuse: makes the error that names the plugin from what it changed.

    Raises:
        PluginError: one of them had been changed, and nothing else was raised.
    """
    before = [ask() for ask, _ in SETTINGS.values()]
    try:
        yield
    except BaseException:
        _put_back(before)
        raise
    changed = _put_back(before)
    if changed:
        raise refuse(f"changed {' and '.join(changed)} for the whole process")


def _put_back(before: list[Any]) -> list[str]:
    changed = []
    for (what, (ask, put)), old in zip(SETTINGS.items(), before, strict=True):
        if ask() != old:
            put(old)
            changed.append(what)
    return changed
