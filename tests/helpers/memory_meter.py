"""Counts the bytes of tensors that are alive, on any device: the same at every run, unlike an allocator's figures."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class MemoryMeter(TorchDispatchMode):
    """Follows every storage that an operation makes while the context is open.

    What existed before (weights, inputs) is not counted, nor what a kernel allocates for itself.

    Attributes:
        peak: bytes alive at once, at most, since the context was opened.
        now: bytes alive.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._alive: dict[weakref.ref[Any], int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        given = {id(x.untyped_storage()) for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)}
        for value in tree_leaves(result):
            if isinstance(value, torch.Tensor) and id(value.untyped_storage()) not in given:
                self._note(value, value.untyped_storage().nbytes())
        return result

    def _note(self, tensor: torch.Tensor, size: int) -> None:
        reference = weakref.ref(tensor.untyped_storage(), self._gone)
        if reference not in self._alive:
            self._alive[reference] = size
            self.now += size
            self.peak = max(self.peak, self.now)

    def _gone(self, reference: weakref.ref[Any]) -> None:
        self.now -= self._alive.pop(reference, 0)
