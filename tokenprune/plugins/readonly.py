"""Detects whether a plugin modifies a tensor in place, or keeps one after the prefill.

Used by `prune(..., strict=True)` and the conformance kits. Both follow from what PyTorch records anyway: the version of
a tensor, which every in-place write increases (also through views and `detach()`), and whether the tensor is still
alive. Not detected are writes through `.data` or `.numpy()` or to inference tensors (the conformance kit compares
values, and detects them), and copies that a plugin keeps.
"""

from __future__ import annotations

import gc
import warnings
import weakref
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import Tensor

from tokenprune.errors import PluginError, PluginWarning


@dataclass
class ReadOnlyTensors:
    """Tensors that plugins must not modify, by name."""

    tensors: list[tuple[str, Tensor, int]] = field(default_factory=list)

    def add(self, name: str, value: Any) -> None:
        """Record the current version of a tensor, or of the tensors in a tuple or list."""
        for tensor in _tensors(value):
            if not tensor.is_inference():
                self.tensors.append((name, tensor, tensor._version))

    def written(self) -> str | None:
        """The name of the first tensor that was modified in place, or None."""
        return next((name for name, tensor, version in self.tensors if tensor._version != version), None)

    def check_unwritten(self, who: str, stage: str) -> None:
        """Raise if one of the tensors was modified in place.

        Args:
            who: strategy name, for messages.
            stage: stage name, for messages.

        Raises:
            PluginError: names strategy, stage and tensor.
        """
        name = self.written()
        if name is not None:
            raise PluginError(
                f"strategy {who!r}, stage {stage!r}: choose() modified tokens.{name} in place; tensors of Tokens are "
                f"read-only (work on tokens.{name}.clone())"
            )


class LeakDetector:
    """Weak references to the tensors that stages were shown, to find those that are still alive after the prefill."""

    _reported: ClassVar[weakref.WeakSet[type]] = weakref.WeakSet()

    def __init__(self) -> None:
        self._open: list[tuple[str, str, weakref.ref[Tensor]]] = []

    def note(self, stage: str, name: str, value: Any) -> None:
        """Watch a value that a stage was shown. Tensors with gradients are left out: autograd may keep them."""
        for tensor in _tensors(value):
            if not tensor.requires_grad:
                self._open.append((stage, name, weakref.ref(tensor)))

    def warn_of_kept(self, strategy: Any) -> None:
        """Warn, once per strategy class, if a tensor is still alive."""
        if type(strategy) in self._reported or not any(tensor() is not None for _, _, tensor in self._open):
            return
        gc.collect()  # tensors in reference cycles are not kept
        for stage, name, reference in self._open:
            tensor = reference()
            if tensor is not None:
                self._reported.add(type(strategy))
                kind = f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"
                size = tensor.numel() * tensor.element_size()
                warnings.warn(
                    f"strategy {strategy.name!r}, stage {stage!r}: tokens.{name} ({kind}, {size} bytes) is still held "
                    "after the prefill, by the strategy or an observer; put what a later stage needs into "
                    "tokens.memory, which is cleared after the prefill, and keep copies of what you need for longer",
                    PluginWarning,
                    stacklevel=2,
                )
                return


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for part in value:
            yield from _tensors(part)
