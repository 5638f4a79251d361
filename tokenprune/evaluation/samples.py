"""One image and one query, and the mask that each strategy gave: of a dataset or of a user's own file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from tokenprune.core.budget import budget_words
from tokenprune.core.strategy import Strategy
from tokenprune.core.trace import Trace
from tokenprune.datasets.base import Dataset, Query, Scene
from tokenprune.datasets.validation import check_request, numbered_scenes
from tokenprune.errors import InputError
from tokenprune.evaluation import metrics
from tokenprune.evaluation.coverage import Box
from tokenprune.evaluation.models import SegmentationModel
from tokenprune.utils.arguments import whole_number
from tokenprune.utils.images import to_rgb
from tokenprune.utils.stopwatch import recorded


@dataclass(frozen=True, eq=False)
class Outcome:
    """The result of one strategy on a sample.

    Attributes:
        label: the strategy, with options or budget if several rows share its name.
        mask: bool [H, W]; of several masks of an answer, their union.
        trace: of the batch that the sample was in; None without a strategy.
        row: the sample's row in that batch.
        iou: against the target; None without one.
        budget: of the run; None without one.
        milliseconds: the time of each stage of the model and the total, from `stopwatch.recorded`; empty if it was not
            measured.
        text: the answer that the model generated; None if it was given.
        masks: how many the answer had.
    """

    label: str
    mask: NDArray[np.bool_]
    trace: Trace | None
    row: int
    iou: float | None = None
    budget: float | None = None
    milliseconds: dict[str, float] = field(default_factory=dict)
    text: str | None = None
    masks: int = 1


@dataclass(frozen=True, eq=False)
class SampleRecord:
    """One image and query.

    Attributes:
        id: of the scene.
        image: uint8 RGB [H, W, 3].
        query: the words.
        target: mask [H, W], or None if it is unknown.
        box: the part of the image that the image tokens divide: (top, left, bottom, right) in pixels.
        outcomes: one per strategy.
    """

    id: str
    image: NDArray[np.uint8]
    query: str
    target: NDArray[Any] | None
    box: Box
    outcomes: list[Outcome] = field(default_factory=list)


def sample(dataset: Dataset | str, split: str, index: int, seed: int = 0) -> tuple[Scene, Query]:
    """Query number `index` of a split, and its scene.

    Raises:
        UnknownNameError: no such dataset or split.
        OptionError: a negative index or seed.
        InputError: the split has fewer queries.
        PluginError: the dataset failed.
    """
    whole_number("index", index, 0)
    data = check_request(dataset, split, index + 1, seed)
    passed = 0

    def has_it(number: int, queries: int) -> bool:
        nonlocal passed
        passed += queries
        return passed > index

    for _, scene in numbered_scenes(data, split, index + 1, seed, has_it):
        return scene, scene.queries[-1]  # the limit cuts the scene behind it
    raise InputError(f"dataset {data.name!r}, split {split!r} has no query number {index}; choose a lower one")


def run_query(model: SegmentationModel, scene: Scene, query: Query, strategy: Strategy | None = None) -> SampleRecord:
    """One query of a dataset, with its target."""
    result = model.segment(scene.image, [query.text], strategy, is_sentence=[query.is_sentence])
    mask = _union(result.masks)
    iou = metrics.expression_iou(*metrics.overlap(mask, query.mask))
    outcome = Outcome(label_of(strategy), mask, result.trace, 0, iou)
    box = model.grid_box(*scene.image.shape[:2])
    return SampleRecord(scene.id, scene.image, query.text, query.mask, box, [outcome])


def run_single(
    model: SegmentationModel, image: Any, query: str, strategy: Strategy | None = None, **options: Any
) -> SampleRecord:
    """A user's own image (see `tokenprune.utils.images.to_rgb`) and query; `options` are further ones of `segment`.

    Raises:
        InputError: no such file, not an image, an empty query.
    """
    with recorded() as milliseconds:
        pixels = np.asarray(to_rgb(image))  # the model must see the same pixels as overlays
        result = model.segment(pixels, [query], strategy, **options)
    box = model.grid_box(*pixels.shape[:2])
    name = str(image) if isinstance(image, (str, Path)) else "image"
    outcome = outcome_of(result, strategy, options, milliseconds=milliseconds)
    return SampleRecord(name, pixels, query, None, box, [outcome])


def outcome_of(
    result: Any, strategy: Strategy | None, options: Mapping[str, Any], row: int = 0, **known: Any
) -> Outcome:
    """The outcome of one query.

    Args:
        result: of `segment` with one query.
        strategy, options: of that call.
        row: of the query in the result's trace.
        known: further attributes.
    """
    if options.get("answer") == "generate":
        known |= {"text": result.text if isinstance(result.text, str) else result.text[0], "masks": len(result.masks)}
    return Outcome(label_of(strategy), _union(result.masks), result.trace, row, **known)


def token_summary(outcome: Outcome) -> str:
    """The run in one line: image tokens per stage, and equivalent tokens."""
    if outcome.trace is None:
        return f"{outcome.label}: no pruning"
    return f"{outcome.label}: {outcome.trace.summary(outcome.row)}"


def label_of(strategy: Strategy | None) -> str:
    """The name of a strategy with its budget, for a table or a line."""
    return "none" if strategy is None else f"{strategy.name}{budget_words(strategy)}"


def _union(masks: torch.Tensor) -> NDArray[np.bool_]:
    """Of the masks of a query: of a forced answer one, of a generated one any number."""
    return np.asarray(masks.detach().any(0).cpu().numpy(), dtype=np.bool_)
