"""Answers of a model's vision side to the reads of strategies."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from tokenprune.core.reads import Read
from tokenprune.errors import InputError


@dataclass(frozen=True)
class VisionSource:
    """Answers the reads that come from outside the decoder; model adapters build one per call.

    Attributes:
        answers: kind of read -> a function that takes the read (with its options, such as the tower layer) and gives
            the value, aligned with the batch rows: [batch, N, …].
        layers: layers of the vision tower, 0 where there is none.
        source: who answers, for messages; empty = the model.
    """

    answers: Mapping[type[Read], Callable[[Any], Any]] = field(default_factory=dict)
    layers: int = 0
    source: str = ""

    def provide(self, read: Read) -> Any:
        """The answer."""
        return self.answers[type(read)](read)


def lined_up(answer: Any, read: Read, shape: Sequence[int], source: str) -> Any:
    """Check that the answer to a read has a value for each of the [batch, N] image tokens, where it should have one.

    Args:
        answer: of a model's vision side.
        read: that it answers.
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
