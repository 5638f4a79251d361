"""Requests that wait for a model are run together: those of one strategy as one batch, in order of arrival.

Nothing waits for a batch to fill. While the model works, requests gather, so that batches grow with the load.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

import tokenprune as tp


class ClosedError(Exception):
    """The server stops, and this request was not run."""


@dataclass(frozen=True, eq=False)
class Waiting:
    """A request. `result` is set to what `segment` returns, or to the error."""

    image: Any
    query: str
    strategy: tp.Strategy | None
    result: Future[Any] = field(default_factory=Future)


class Batches:
    """A model with a thread that runs the requests of all others.

    Args:
        model: a segmentation model of `tokenprune.load`.
        largest: requests in a batch; 1 runs them one at a time.
    """

    def __init__(self, model: Any, largest: int = 8) -> None:
        self.model, self.largest = model, largest
        self._waiting: deque[Waiting] = deque()
        self._changed = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._work, name="batches")
        self._thread.start()

    def segment(self, image: Any, query: str, strategy: tp.Strategy | None = None) -> Any:
        """What `model.segment` returns, from any thread. Its trace is the batch's, with the row `prompt_rows[0]`.

        Requests are in one batch only if they share their strategy, as one object or None.

        Raises:
            TokenPruneError: as of `model.segment`, about this request alone.
            ClosedError: `close` was called before it was run.
        """
        request = Waiting(image, query, strategy)
        with self._changed:
            if self._closed:
                raise ClosedError
            self._waiting.append(request)
            self._changed.notify()
        return request.result.result()

    def close(self) -> None:
        """Finish the batch that runs, refuse the requests that wait, and end the thread."""
        with self._changed:
            self._closed = True
            for request in self._waiting:
                request.result.set_exception(ClosedError())
            self._waiting.clear()
            self._changed.notify()
        self._thread.join()

    def _work(self) -> None:
        while batch := self._next():
            self._run(batch)

    def _next(self) -> list[Waiting]:
        """The request that has waited longest, and those behind it with its strategy; empty once closed."""
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._closed)
            if self._closed:
                return []
            strategy = self._waiting[0].strategy
            batch = [request for request in self._waiting if request.strategy is strategy][: self.largest]
            self._waiting = deque(request for request in self._waiting if request not in batch)
        return batch

    def _run(self, batch: Sequence[Waiting]) -> None:
        """Set the results of a batch. If it fails as a whole, each request is run by itself."""
        done: list[Any] = []
        try:
            # An image goes through the towers by itself, and not again while the model remembers it.
            pairs = [(self.model.encoded(request.image), request.query) for request in batch]
            done = list(self.model.segment_many(pairs, batch[0].strategy, batch_size=len(batch), workers=1))
        except BaseException as error:  # whatever it is, no request may wait for ever
            if len(batch) == 1:
                batch[0].result.set_exception(error)
                return
        if not done:  # the error is gone, and with it the memory that it held
            for request in batch:
                self._run([request])
        for request, found in zip(batch, done, strict=bool(done)):
            if found.error is None:
                request.result.set_result(found.result)
            else:
                request.result.set_exception(found.error)
