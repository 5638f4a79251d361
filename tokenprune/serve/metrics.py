"""What a server counts, in the text format of Prometheus."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from tokenprune.serve.batches import Job
from tokenprune.serve.work import Done

CONTENT_TYPE = CONTENT_TYPE_LATEST
SECONDS = (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100)


class Metrics:
    """Counters of one server.

    Args:
        routes: paths that are counted under their name; all others are "other", or clients could make any number.
    """

    def __init__(self, routes: Sequence[str]) -> None:
        self._routes = routes
        self._registry = CollectorRegistry()
        self._requests = Counter(
            "tokenprune_requests", "Requests that were answered.", ("route", "status"), registry=self._registry
        )
        self._seconds = self._histogram("request_seconds", "From the headers of a request to its answer.", ("route",))
        self._waited = self._histogram("queue_seconds", "From a complete request to the model's beginning.")
        self._model = self._histogram("model_seconds", "Of the model, for a batch.")
        self._batch = self._histogram("batch_requests", "Requests in a batch.", buckets=(1, 2, 4, 8, 16, 32))
        self._queue = Gauge("tokenprune_queue_length", "Requests that wait for the model.", registry=self._registry)
        self._uploads = Gauge("tokenprune_upload_bytes", "Of incomplete uploads, in memory.", registry=self._registry)
        self._tokens = Counter(
            "tokenprune_image_tokens", "Image tokens before pruning, of answered requests.", registry=self._registry
        )
        self._kept = Counter(
            "tokenprune_kept_tokens", "Equivalent image tokens, of answered requests.", registry=self._registry
        )

    def _histogram(
        self, name: str, about: str, labels: Sequence[str] = (), buckets: Sequence[float] = SECONDS
    ) -> Histogram:
        return Histogram(f"tokenprune_{name}", about, labels, registry=self._registry, buckets=buckets)

    def watch_queue(self, length: Callable[[], float]) -> None:
        """Read the length of the queue there."""
        self._queue.set_function(length)

    def watch_uploads(self, held: Callable[[], float]) -> None:
        """Read the bytes of incomplete uploads there."""
        self._uploads.set_function(held)

    def answered(self, path: str, status: int, seconds: float) -> None:
        """A request has its answer."""
        route = path if path in self._routes else "other"
        self._requests.labels(route, str(status)).inc()
        self._seconds.labels(route).observe(seconds)

    def ran(self, batch: Sequence[Job], seconds: float) -> None:
        """The model has run a batch."""
        now = time.perf_counter()
        for job in batch:
            self._waited.observe(max(0.0, now - seconds - job.arrived))
        self._model.observe(seconds)
        self._batch.observe(len(batch))

    def kept(self, done: Done) -> None:
        """A request's tokens."""
        self._tokens.inc(done.image_tokens)
        self._kept.inc(done.equivalent_tokens)

    def text(self) -> bytes:
        """All of it, for `GET /metrics`."""
        return generate_latest(self._registry)
