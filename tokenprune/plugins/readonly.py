"""Tensors that plugins are shown: whether one was modified in place, and whether one is kept after the prefill.

Looked for under `prune(..., strict=True)` and in the conformance kits. Both are told from what PyTorch counts anyway: a
tensor's version, which every in-place write raises (through views and `detach()` too), and whether the tensor is still
alive. Writes through `.data`, `.numpy()` or to tensors of inference mode are not counted (the conformance kit, which
compares values, sees them), and copies that a plugin makes and keeps are not seen.
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
    """Tensors that plugins may read only, by the name that they are known by."""

    tensors: list[tuple[str, Tensor, int]] = field(default_factory=list)

    def add(self, name: str, value: Any) -> None:
        """Note a tensor, or the tensors of a tuple or list, as they are now."""
        for tensor in _tensors(value):
            if not tensor.is_inference():
                self.tensors.append((name, tensor, tensor._version))

    def written(self) -> str | None:
        """The name of one of them that was written to, or None."""
        return next((name for name, tensor, version in self.tensors if tensor._version != version), None)

    def check_unwritten(self, who: str, stage: str) -> None:
        """Raise where one of them was written to.

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
    """Weak references to what a prefill has shown, to tell what is still held once it is over."""

    _told: ClassVar[weakref.WeakSet[type]] = weakref.WeakSet()

    def __init__(self) -> None:
        self._open: list[tuple[str, str, weakref.ref[Tensor]]] = []

    def note(self, stage: str, name: str, value: Any) -> None:
        """Watch what a stage has shown. Tensors with gradients are left out: autograd may keep them."""
        for tensor in _tensors(value):
            if not tensor.requires_grad:
                self._open.append((stage, name, weakref.ref(tensor)))

    def warn_of_kept(self, strategy: Any) -> None:
        """Warn, once for each class of strategies, where some of it is still alive."""
        if type(strategy) in self._told or not any(tensor() is not None for _, _, tensor in self._open):
            return
        gc.collect()  # what hangs in a cycle of references is not kept
        for stage, name, reference in self._open:
            tensor = reference()
            if tensor is not None:
                self._told.add(type(strategy))
                kind = f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"
                size = tensor.numel() * tensor.element_size()
                warnings.warn(
                    f"strategy {strategy.name!r}, stage {stage!r}: tokens.{name} ({kind}, {size} bytes) is still held "
                    "after the prefill, by the strategy or an observer; put what a later stage needs into "
                    "tokens.memory, which is emptied then, and keep copies of the few numbers that you need for longer",
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
