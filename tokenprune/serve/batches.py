"""Requests that wait for the model are run together: those of one strategy as one batch, in order of arrival.

Nothing waits for a batch to fill. While the model works, requests gather, so that batches grow with the load.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

from tokenprune.core.strategy import Strategy


class ClosedError(Exception):
    """The server stops, and takes no more requests."""


@dataclass(eq=False)
class Job:
    """A request, ready for the model.

    Attributes:
        picture: PIL RGB.
        query: the words.
        strategy: one object for all requests that may run together.
        max_new_tokens: limit of an answer in words.
        began: set when the model begins.
        arrived: on `time.perf_counter`.
        result: what came of it; a job that is cancelled before it began is not run.
    """

    picture: Any
    query: str
    strategy: Strategy
    max_new_tokens: int = 1
    began: threading.Event = field(default_factory=threading.Event)
    arrived: float = field(default_factory=time.perf_counter)
    result: Future[Any] = field(default_factory=Future)

    def goes_with(self, other: Job) -> bool:
        """Whether both may be in one batch."""
        return self.strategy is other.strategy and self.max_new_tokens == other.max_new_tokens


class Batches:
    """A thread that runs the jobs of all others.

    Args:
        run: gives a result or an exception for each job of a batch; if it raises, the jobs run one by one.
        largest: jobs in a batch.
        ran: told of each batch that it has run, and of the seconds that this took.
    """

    def __init__(
        self,
        run: Callable[[Sequence[Job]], Sequence[Any]],
        largest: int,
        ran: Callable[[Sequence[Job], float], None] = lambda batch, seconds: None,
    ) -> None:
        self._run_batch, self._largest, self._ran = run, largest, ran
        self._waiting: deque[Job] = deque()
        self._changed = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._work, name="tokenprune-batches")
        self._thread.start()

    def __len__(self) -> int:
        """Jobs that wait."""
        with self._changed:
            return sum(not job.result.cancelled() for job in self._waiting)

    def submit(self, job: Job) -> Future[Any]:
        """The job's result, from any thread. Raises ClosedError after `close`."""
        with self._changed:
            if self._closed:
                raise ClosedError
            # Those that were cancelled go now: clients that leave must not fill the memory while a batch runs.
            self._waiting = deque(other for other in self._waiting if not other.result.cancelled())
            self._waiting.append(job)
            self._changed.notify()
        return job.result

    def close(self) -> None:
        """Finish what waits, and end the thread."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join()

    def _work(self) -> None:
        while batch := self._next():
            if begun := [job for job in batch if job.result.set_running_or_notify_cancel()]:
                start = time.perf_counter()
                for job in begun:
                    job.began.set()
                self._run(begun)
                self._ran(begun, time.perf_counter() - start)

    def _next(self) -> list[Job]:
        """The job that has waited longest, and those behind it that go with it; empty once closed and done."""
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._closed)
            if not self._waiting:
                return []
            first = self._waiting[0]
            batch = [job for job in self._waiting if job.goes_with(first)][: self._largest]
            self._waiting = deque(job for job in self._waiting if job not in batch)
        return batch

    def _run(self, batch: Sequence[Job]) -> None:
        """Set the results of a batch. If it fails as a whole, each job is run by itself."""
        found: Sequence[Any] = ()
        try:
            found = self._run_batch(batch)
        except BaseException as error:  # whatever it is, no request may wait for ever
            if len(batch) == 1:
                found = [error]
        if not found:  # the error is gone, and with it the memory that it held
            for job in batch:
                self._run([job])
        for job, one in zip(batch, found, strict=bool(found)):
            if isinstance(one, BaseException):
                job.result.set_exception(one)
            else:
                job.result.set_result(one)
