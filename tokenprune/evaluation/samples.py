"""One sample of a dataset with what every strategy made of it: the material of overlay pictures."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tokenprune.core.trace import Trace
from tokenprune.evaluation.coverage import Box


@dataclass(frozen=True, eq=False)
class Outcome:
    """What one strategy made of a sample.

    Attributes:
        label: the strategy, with options or budget where that tells it apart.
        mask: bool [H, W].
        trace: of the batch that the sample was in; None where nothing pruned.
        row: the sample's row in that batch.
        iou: against the target; None without one.
        budget: that it ran at; None without one.
        milliseconds: what each stage of the model took, and all of it, as `stopwatch.recorded` tells; empty where it
            was not measured.
    """

    label: str
    mask: NDArray[np.bool_]
    trace: Trace | None
    row: int
    iou: float | None = None
    budget: float | None = None
    milliseconds: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class SampleRecord:
    """One image and query.

    Attributes:
        id: of the scene.
        image: uint8 RGB [H, W, 3].
        query: the words.
        target: mask [H, W], or None where it is not known.
        box: the part of the image that the image tokens divide: (top, left, bottom, right) in pixels.
        outcomes: one per strategy.
    """

    id: str
    image: NDArray[np.uint8]
    query: str
    target: NDArray[Any] | None
    box: Box
    outcomes: list[Outcome] = field(default_factory=list)
