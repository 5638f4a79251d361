"""What the model does for a batch of requests, and what is told of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from tokenprune.core.strategy import Strategy
from tokenprune.core.trace import Trace
from tokenprune.errors import OptionError, TokenPruneError
from tokenprune.evaluation.models import AnsweringModel, SegmentationModel
from tokenprune.serve.batches import Job


@dataclass(frozen=True)
class Done:
    """What came of a request.

    Attributes:
        layer_tokens: image tokens that entered each decoder layer.
        image_tokens: before any pruning.
        mask: bool [H, W], the union if there are several; None for an answer in words.
        text: the answer in words, of a mask the given one.
    """

    layer_tokens: list[int]
    image_tokens: int
    mask: NDArray[np.bool_] | None
    text: str | None

    @property
    def equivalent_tokens(self) -> float:
        """Mean of the image tokens over layers."""
        return sum(self.layer_tokens) / max(len(self.layer_tokens), 1)


Work = Callable[[Sequence[Job]], Sequence[Any]]


def work_of(model: Any) -> Work:
    """The function that runs batches on a model: a `Done` or a `TokenPruneError` for each job."""
    if not isinstance(model, SegmentationModel):
        return lambda jobs: [_answered(model, job) for job in jobs]
    if getattr(model, "segment_many", None) is None:
        return lambda jobs: [_segmented(model, job) for job in jobs]
    return lambda jobs: _segmented_together(model, jobs)


def check_work(model: Any, strategy: Strategy, batch: int | None = None) -> None:
    """Run a picture of noise: what cannot be run at all is found before there is a server.

    Args:
        model, strategy: the server's own.
        batch: of `Limits`.

    Raises:
        OptionError: a batch for a model that runs requests one at a time.
        TokenPruneError: the model cannot run the strategy.
    """
    if batch is not None and not hasattr(model, "segment_many"):
        raise OptionError(f"--batch has no effect on {model.name!r}, which runs requests one at a time; leave it out")
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    (found,) = work_of(model)([Job(Image.fromarray(noise), "What is it?", strategy, max_new_tokens=1)])
    if isinstance(found, TokenPruneError):
        raise found


def _segmented_together(model: Any, jobs: Sequence[Job]) -> list[Done | TokenPruneError]:
    """In one batch. An image goes through the towers by itself, and not again while the model remembers it."""
    encoded = getattr(model, "encoded", lambda picture: picture)
    pairs = [(encoded(job.picture), job.query) for job in jobs]
    found = model.segment_many(pairs, jobs[0].strategy, batch_size=len(jobs), workers=1)
    return [_mask(one.result, one.result.prompt_rows[0]) if one.error is None else one.error for one in found]


def _segmented(model: SegmentationModel, job: Job) -> Done | TokenPruneError:
    try:
        return _mask(model.segment(np.asarray(job.picture), job.query, job.strategy), 0)
    except TokenPruneError as error:
        return error


def _mask(result: Any, row: int) -> Done:
    union = np.asarray(result.masks.detach().any(0).cpu().numpy(), dtype=np.bool_)
    text = getattr(result, "text", None)
    return Done(*_tokens(result.trace, row), mask=union, text=text if isinstance(text, str) else None)


def _answered(model: AnsweringModel, job: Job) -> Done | TokenPruneError:
    try:
        said = model.answer(job.picture, job.query, strategy=job.strategy, max_new_tokens=job.max_new_tokens)
    except TokenPruneError as error:
        return error
    return Done(*_tokens(said.trace, said.row), mask=None, text=said.text)


def _tokens(trace: Trace | None, row: int) -> tuple[list[int], int]:
    assert trace is not None  # every request has a strategy
    return [entry.image[row] for entry in trace.ledger.entries], trace.ledger.image_tokens[row]
