"""From many images and queries to results, in order, while the pictures that follow are read in other threads."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future
from contextlib import closing
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any

from PIL import Image

from tokenprune.errors import InputError, TokenPruneError
from tokenprune.utils.arguments import shown
from tokenprune.utils.images import to_rgb
from tokenprune.utils.prefetch import prefetch
from tokenprune.utils.stopwatch import stage
from tokenprune_adapters.segmentation.data import Segmentation
from tokenprune_adapters.segmentation.many.batch import Ready, Settings, run_batch
from tokenprune_adapters.segmentation.many.transfer import pinned
from tokenprune_adapters.segmentation.queries import as_list

if TYPE_CHECKING:
    from tokenprune_adapters.segmentation.segmenter import Segmenter


@dataclass(frozen=True)
class ImageResult:
    """What came of one image of many: a result or an error.

    Attributes:
        index: number of the request, from 0.
        image: as it was given.
        result: masks for its queries; None if it failed.
        error: why it failed; None if it did not.
    """

    index: int
    image: Any
    result: Segmentation | None = None
    error: TokenPruneError | None = None


@dataclass(frozen=True)
class _Read:
    """A request whose image was read, or why it could not be."""

    index: int
    image: Any
    ready: Ready | None
    error: TokenPruneError | None = None


def stream(
    model: Segmenter, requests: Iterable[Any], settings: Settings, workers: int, raise_errors: bool
) -> Iterator[ImageResult]:
    """The results of `Segmenter.segment_many`, whose arguments have been checked."""
    turns = threading.Lock()

    def read(numbered: tuple[int, Any]) -> _Read:
        index, request = numbered
        image = request[0] if _is_pair(request) else request
        try:
            return _Read(index, image, _ready(model, request, settings, turns))
        except TokenPruneError as error:
            return _Read(index, image, None, error)

    # While the model runs on one batch, the next one is read.
    reading = prefetch(enumerate(requests), read, workers, settings.batch_size + 1)
    with closing(reading):  # type: ignore[type-var]  # it is a generator
        # No name holds a batch, so that its pictures are freed before its results are handed out.
        while results := _finished(model, list(islice(reading, settings.batch_size)), settings):
            while results:
                if raise_errors and (error := results[0].error) is not None:
                    raise error
                yield results.popleft()


def _finished(model: Segmenter, batch: list[Future[_Read]], settings: Settings) -> deque[ImageResult]:
    """Results of one batch, in order."""
    with stage("preprocess"):
        requests = [future.result() for future in batch]
    ready = [request.ready for request in requests if request.ready is not None]
    found = iter(run_batch(model, ready, settings))
    results: deque[ImageResult] = deque()
    for request in requests:
        outcome = request.error if request.ready is None else next(found)
        failed = isinstance(outcome, TokenPruneError)
        named = {"error" if failed else "result": outcome}
        results.append(ImageResult(request.index, request.image, **named))  # type: ignore[arg-type]
    return results


def _ready(model: Segmenter, request: Any, settings: Settings, turns: threading.Lock) -> Ready:
    """Read and check one request, in a thread of its own."""
    if not _is_pair(request):
        raise InputError(f"request {shown(request)} found, expected a pair: (image, query) or (image, [query, …])")
    image, query = request
    prompts = model.prompts(query, settings.answer)
    if isinstance(image, Image.Image):
        with turns:  # PIL reads the pixels of an image on first use, and one image may be in several requests
            image = to_rgb(image)
    prepared = image if isinstance(image, model.encoded_type) else model.prepare_image(image)
    if prepared is not image and next(model.tower.parameters()).device.type == "cuda":
        prepared = pinned(prepared)
    return Ready(query if isinstance(query, str) else as_list(query, "query"), prompts, prepared)


def _is_pair(request: Any) -> bool:
    return isinstance(request, (tuple, list)) and len(request) == 2
