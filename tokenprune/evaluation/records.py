"""The record of one contender on one query: what every table, interval and picture of an evaluation is made from."""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from tokenprune.core.trace import Trace
from tokenprune.evaluation.accounting import QueryCost
from tokenprune.evaluation.coverage import Box, numbered_cells
from tokenprune.evaluation.metrics import expression_iou


@dataclass(frozen=True)
class Record:
    """One contender on one query.

    Attributes:
        scene: number of the scene in its split, from 0.
        query: number of the query in its scene, from 0.
        sample: name of the query: its own, or that of the scene and the number.
        kind: of the query.
        size: bucket of the target; None for an empty one.
        overlap: pixels in the intersection and the union with the target.
        predicted: pixels of the mask, without ignored ones.
        agreement: overlap with the mask of the untouched model.
        coverage: share of the target's area whose place a kept token of the last stage has; None for an empty target.
        cost: tokens, FLOPs and bytes.
        layers: image tokens entering each decoder layer.
        milliseconds: by step of the model, of the batch that the query was in, divided by the batch's queries.
        metrics: those that plugins add.
        mask: bool [H, W], the contender's.
        stages: as from `stages_of`.
        matched: the mean IoU of several masks that were matched to single targets, in place of that of the overlap.
    """

    scene: int
    query: int
    sample: str
    kind: str
    size: str | None
    overlap: tuple[int, int]
    predicted: int
    agreement: tuple[int, int]
    coverage: float | None
    cost: QueryCost
    layers: tuple[int, ...]
    milliseconds: Mapping[str, float] = field(default_factory=dict)
    metrics: Mapping[str, float | None] = field(default_factory=dict)
    mask: NDArray[np.bool_] | None = None
    stages: tuple[dict[str, Any], ...] = ()
    matched: float | None = None

    @property
    def iou(self) -> float:
        """See `metrics.expression_iou`."""
        return expression_iou(*self.overlap) if self.matched is None else self.matched


def stages_of(trace: Trace, row: int, box: Box) -> tuple[dict[str, Any], ...]:
    """The stages of a batch row as plain data, enough to draw them.

    Each has its name, layer and kind; `kept`, the numbers of the active image tokens; `grid`, (rows, columns) of the
    first image; `box`, the part of the image that the grid divides; `cells` and `parked`, the numbers of the grid cells
    whose place an active or parked token has, row by row from 0. `cells` is None where it is the same as `kept`.

    Args:
        trace: of the run.
        row: batch row.
        box: (top, left, bottom, right) in pixels of the image.
    """
    (rows, columns), numbers = numbered_cells(trace, row)
    found = []
    for stage in trace.stages_of(row):
        kept, cells = stage.kept[row], _cells(stage.places()[row], numbers)
        found.append(
            {
                "name": stage.name,
                "layer": stage.layer,
                "kind": stage.kind,
                "kept": kept,
                "grid": (rows, columns),
                "box": box,
                "cells": None if cells == kept else cells,
                "parked": _cells(stage.parked[row], numbers),
            }
        )
    return tuple(found)


def _cells(tokens: Tensor, numbers: Tensor) -> list[int]:
    return sorted(number for number in numbers[tokens.cpu()].tolist() if number >= 0)


def packed_mask(mask: NDArray[np.bool_]) -> bytes:
    """A mask as compressed bits, eight pixels a byte, row by row."""
    return zlib.compress(np.packbits(np.asarray(mask, dtype=np.bool_)).tobytes())


def unpacked_mask(data: bytes, height: int, width: int) -> NDArray[np.bool_]:
    """The mask [height, width] of `packed_mask`."""
    bits = np.unpackbits(np.frombuffer(zlib.decompress(data), dtype=np.uint8), count=height * width)
    return bits.reshape(height, width).astype(np.bool_)


def packed_json(value: Any) -> bytes:
    """Plain data as compressed JSON."""
    return zlib.compress(json.dumps(value, separators=(",", ":")).encode())


def unpacked_json(data: bytes) -> Any:
    """The data of `packed_json`."""
    return json.loads(zlib.decompress(data))
