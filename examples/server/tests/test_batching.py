"""Batches of waiting requests: what runs together, what fails alone, and what happens at the end."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))
from batching import Batches, ClosedError

SECONDS = 60


class Slow:
    """A model that notes its batches, and waits in each until it may go on. "bad" fails, "ill" makes its batch fail."""

    def __init__(self) -> None:
        self.ran: list[tuple[Any, list[str]]] = []
        self.running, self.go_on = threading.Event(), threading.Event()

    def encoded(self, image: str) -> str:
        return f"encoded {image}"

    def segment_many(self, pairs: list[tuple[str, str]], strategy: Any, *, batch_size: int, workers: int) -> Any:
        assert batch_size == len(pairs)
        assert all(image.startswith("encoded ") for image, _ in pairs)
        queries = [query for _, query in pairs]
        self.ran.append((strategy, queries))
        self.running.set()
        assert self.go_on.wait(SECONDS)
        if "ill" in queries:
            raise MemoryError
        for query in queries:
            yield SimpleNamespace(error=ValueError(query) if query == "bad" else None, result=f"mask of {query}")


@pytest.fixture
def model() -> Iterator[Slow]:
    made = Slow()
    yield made
    made.go_on.set()


def gather(batches: Batches, pool: ThreadPoolExecutor, requests: list[tuple[str, Any]]) -> list[Any]:
    """Requests in order of arrival, all waiting behind the first one, which runs."""
    model, asked = batches.model, []
    for number, (query, strategy) in enumerate(requests):
        asked.append(pool.submit(batches.segment, "a.png", query, strategy))
        if number == 0:
            assert model.running.wait(SECONDS)
        while len(batches._waiting) < number:
            pass
    return asked


def test_requests_that_wait_run_together_by_strategy_in_order(model: Slow) -> None:
    csp, fastv = object(), object()
    requests = [("first", None), ("b", csp), ("c", None), ("d", csp), ("e", fastv), ("f", csp), ("g", csp), ("h", None)]
    batches = Batches(model, largest=3)
    with ThreadPoolExecutor(len(requests)) as pool:
        asked = gather(batches, pool, requests)
        model.go_on.set()
        assert [one.result(SECONDS) for one in asked] == [f"mask of {query}" for query, _ in requests]
    batches.close()
    assert model.ran == [(None, ["first"]), (csp, ["b", "d", "f"]), (None, ["c", "h"]), (fastv, ["e"]), (csp, ["g"])]


def test_a_request_that_cannot_be_run_fails_alone(model: Slow) -> None:
    batches = Batches(model)
    with ThreadPoolExecutor(8) as pool:
        asked = gather(batches, pool, [(query, None) for query in ("first", "a", "bad", "ill", "b")])
        model.go_on.set()
        found = [one.exception(SECONDS) or one.result() for one in asked]
    batches.close()
    good = [found[place] for place in (0, 1, 4)]
    assert good == ["mask of first", "mask of a", "mask of b"]
    assert isinstance(found[2], ValueError)
    assert isinstance(found[3], MemoryError)
    together, alone = ["a", "bad", "ill", "b"], [["a"], ["bad"], ["ill"], ["b"]]
    assert [queries for _, queries in model.ran] == [["first"], together, *alone]


def test_at_the_end_what_runs_is_finished_and_what_waits_is_refused(model: Slow) -> None:
    batches = Batches(model)
    with ThreadPoolExecutor(4) as pool:
        first, *others = gather(batches, pool, [("first", None), ("a", None), ("b", None)])
        closing = pool.submit(batches.close)
        assert all(isinstance(one.exception(SECONDS), ClosedError) for one in others)
        assert not closing.done()
        model.go_on.set()
        assert first.result(SECONDS) == "mask of first"
        closing.result(SECONDS)
    assert not any(thread.name == "batches" for thread in threading.enumerate())
    with pytest.raises(ClosedError):
        batches.segment("a.png", "late")
    batches.close()  # again
