"""Reads of a model's vision side."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from tokenprune.core.reads import Read
from tokenprune.errors import InputError


@dataclass(frozen=True)
class VisionSource:
    """Provides the reads from outside the decoder; adapters build one for each call.

    Attributes:
        answers: from each kind of read to a function that takes the read (with its options, such as the tower layer)
            and returns its value, aligned with the batch rows: [batch, N, …].
        layers: number of layers of the vision tower, 0 without one.
        source: who provides the reads, for messages; empty = the model.
    """

    answers: Mapping[type[Read], Callable[[Any], Any]] = field(default_factory=dict)
    layers: int = 0
    source: str = ""

    def provide(self, read: Read) -> Any:
        """The value of a read."""
        return self.answers[type(read)](read)


def check_aligned(answer: Any, read: Read, shape: Sequence[int], source: str) -> Any:
    """Check that the answer to a read is aligned with the image tokens, if the read has a token axis; returns it.

    Args:
        answer: the answer of a model's vision side.
        read: the read.
        shape: [batch, N].
        source: who answered, for messages.

    Raises:
        InputError: it has another shape.
    """
    if read.axis is None or (
        isinstance(answer, Tensor) and answer.shape[:2] == tuple(shape) and answer.device.type != "meta"
    ):
        return answer
    found = f"shape {list(answer.shape)} on {answer.device}" if isinstance(answer, Tensor) else type(answer).__name__
    raise InputError(
        f"{source}: the answer to {read} has {found}, expected {[*shape]} for batch rows and image tokens, then others"
    )
