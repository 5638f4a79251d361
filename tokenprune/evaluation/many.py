"""One query for each of many images of a user, and the mask of each: in batches if the model can, else one by one."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenprune.core.strategy import Strategy
from tokenprune.errors import BudgetError, EngineError, InputError, PluginError, TokenPruneError
from tokenprune.evaluation.models import SegmentationModel
from tokenprune.evaluation.samples import Outcome, SampleRecord, outcome_of, run_single

OF_ONE_IMAGE = (InputError, BudgetError, EngineError, PluginError)
"""Errors that may concern one image of many; others, such as IncompatibleError, concern all."""


@dataclass(frozen=True, eq=False)
class ImageOutcome:
    """What came of one image: an outcome or an error.

    Attributes:
        index: its number, from 0.
        outcome: the mask and the trace; None if it failed.
        error: why it failed; None if it did not.
        record: with the pixels, if it was run by itself.
    """

    index: int
    outcome: Outcome | None = None
    error: TokenPruneError | None = None
    record: SampleRecord | None = None


def run_many(
    model: SegmentationModel,
    pairs: Iterable[tuple[Path, str]],
    strategy: Strategy | None = None,
    batch_size: int | None = None,
    alone: bool = False,
    **options: Any,
) -> Iterator[ImageOutcome]:
    """The outcome of each image and query, in order; an image that cannot be used does not affect the others.

    Args:
        model: a model; one without a method `segment_many` runs the images one by one.
        pairs: images and queries.
        strategy: None runs the untouched model.
        batch_size: images that run together; None = the model's own choice.
        alone: run each image by itself, and give its record.
        options: further ones of the model's `segment` and `segment_many`.

    Raises:
        IncompatibleError: the strategy is incompatible with the model.
    """
    many = getattr(model, "segment_many", None)
    if many is None or alone:
        yield from _one_by_one(model, pairs, strategy, options)
        return
    size = {} if batch_size is None else {"batch_size": batch_size}
    for done in many(pairs, strategy, **size, **options):
        if done.error is not None:
            yield ImageOutcome(done.index, error=done.error)
            continue
        yield ImageOutcome(done.index, outcome_of(done.result, strategy, options, done.result.prompt_rows[0]))


def _one_by_one(
    model: SegmentationModel, pairs: Iterable[tuple[Path, str]], strategy: Strategy | None, options: dict[str, Any]
) -> Iterator[ImageOutcome]:
    for index, (image, query) in enumerate(pairs):
        try:
            record = run_single(model, image, query, strategy, **options)
        except OF_ONE_IMAGE as error:
            yield ImageOutcome(index, error=error)
            continue
        yield ImageOutcome(index, record.outcomes[0], record=record)
