"""What the vision side of a model offers to strategies."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from tokenprune.reads import Read


@dataclass(frozen=True)
class VisionSource:
    """Answers the reads that come from outside the decoder; model adapters build one per call.

    Attributes:
        answers: kind of read -> a function that takes the read (with its options, such as the tower layer) and gives
            the value,
            already lined up with the batch rows: [batch, N, …].
        layers: layers of the vision tower, 0 where there is none.
    """

    answers: Mapping[type[Read], Callable[[Any], Any]] = field(default_factory=dict)
    layers: int = 0

    def provide(self, read: Read) -> Any:
        """The answer."""
        return self.answers[type(read)](read)
