"""How waiting requests become batches, with a model that is held up."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from typing import Any

import pytest

from tokenprune.serve.batches import Batches, ClosedError, Job

SECONDS = 30


class Slow:
    """Waits for `go_on` in each batch, and notes what it ran."""

    def __init__(self) -> None:
        self.ran: list[tuple[Any, list[str]]] = []
        self.running, self.go_on = threading.Event(), threading.Event()

    def __call__(self, jobs: Sequence[Job]) -> list[Any]:
        queries = [job.query for job in jobs]
        self.ran.append((jobs[0].strategy, queries))
        self.running.set()
        assert self.go_on.wait(SECONDS)
        if "ill" in queries:
            raise MemoryError
        return [ValueError(query) if query == "bad" else f"mask of {query}" for query in queries]


@pytest.fixture
def model() -> Slow:
    return Slow()


@pytest.fixture
def batches(model: Slow) -> Iterator[Batches]:
    made = Batches(model, largest=3)
    yield made
    model.go_on.set()
    made.close()
    assert not any(thread.name == "tokenprune-batches" for thread in threading.enumerate())


def submit(batches: Batches, model: Slow, requests: list[tuple[str, Any]]) -> list[Future[Any]]:
    """All of them wait behind the first one, which runs."""
    found = []
    for query, strategy in requests:
        found.append(batches.submit(Job("a picture", query, strategy)))
        assert model.running.wait(SECONDS)
    assert len(batches) == len(requests) - 1
    return found


def test_requests_that_wait_run_together_by_strategy_in_order(model: Slow, batches: Batches) -> None:
    csp, fastv = object(), object()
    requests = [("first", None), ("b", csp), ("c", None), ("d", csp), ("e", fastv), ("f", csp), ("g", csp), ("h", None)]
    asked = submit(batches, model, requests)
    model.go_on.set()
    assert [one.result(SECONDS) for one in asked] == [f"mask of {query}" for query, _ in requests]
    assert model.ran == [(None, ["first"]), (csp, ["b", "d", "f"]), (None, ["c", "h"]), (fastv, ["e"]), (csp, ["g"])]


def test_answers_of_different_lengths_do_not_run_together(model: Slow, batches: Batches) -> None:
    asked = [batches.submit(Job("a picture", f"{limit}", None, max_new_tokens=limit)) for limit in (1, 2, 3, 2)]
    assert model.running.wait(SECONDS)
    model.go_on.set()
    assert [one.result(SECONDS) for one in asked] == ["mask of 1", "mask of 2", "mask of 3", "mask of 2"]
    assert [queries for _, queries in model.ran] == [["1"], ["2", "2"], ["3"]]


def test_a_request_that_cannot_be_run_fails_alone(model: Slow, batches: Batches) -> None:
    asked = submit(batches, model, [(query, None) for query in ("first", "a", "bad", "ill", "b")])
    model.go_on.set()
    found = [one.exception(SECONDS) or one.result() for one in asked]
    assert [found[place] for place in (0, 1, 4)] == ["mask of first", "mask of a", "mask of b"]
    assert isinstance(found[2], ValueError)
    assert isinstance(found[3], MemoryError)
    assert [queries for _, queries in model.ran] == [["first"], ["a", "bad", "ill"], ["a"], ["bad"], ["ill"], ["b"]]


def test_what_is_cancelled_before_its_turn_is_not_run(model: Slow, batches: Batches) -> None:
    first, second, third = submit(batches, model, [(query, None) for query in ("first", "a", "b")])
    assert second.cancel()
    assert not first.cancel()
    model.go_on.set()
    assert (first.result(SECONDS), third.result(SECONDS)) == ("mask of first", "mask of b")
    with pytest.raises(CancelledError):
        second.result(SECONDS)
    assert [queries for _, queries in model.ran] == [["first"], ["b"]]


def test_a_batch_of_cancelled_requests_alone_is_skipped(model: Slow, batches: Batches) -> None:
    first, second = submit(batches, model, [("first", None), ("a", None)])
    assert second.cancel()
    model.go_on.set()
    assert first.result(SECONDS) == "mask of first"
    assert batches.submit(Job("a picture", "last", None)).result(SECONDS) == "mask of last"


def test_what_is_cancelled_takes_no_memory_while_a_batch_runs(model: Slow, batches: Batches) -> None:
    submit(batches, model, [("first", None)])
    for number in range(100):
        assert batches.submit(Job("a picture", f"number {number}", None)).cancel()
        assert len(batches) == 0
        assert len(batches._waiting) == 1


def test_closing_finishes_what_waits_and_takes_no_more(model: Slow, batches: Batches) -> None:
    asked = submit(batches, model, [("first", None), ("a", None), ("b", object())])
    with ThreadPoolExecutor(1) as pool:
        closing = pool.submit(batches.close)
        while not batches._closed:
            pass
        with pytest.raises(ClosedError):
            batches.submit(Job("a picture", "late", None))
        assert not closing.done()
        model.go_on.set()
        closing.result(SECONDS)
    assert [one.result(0) for one in asked] == ["mask of first", "mask of a", "mask of b"]
    batches.close()  # again


def test_what_ran_is_reported(model: Slow) -> None:
    told: list[tuple[int, float]] = []
    batches = Batches(model, 3, lambda batch, seconds: told.append((len(batch), seconds)))
    asked = submit(batches, model, [("first", None), ("a", None), ("b", None)])
    model.go_on.set()
    for one in asked:
        one.result(SECONDS)
    batches.close()
    assert [count for count, _ in told] == [1, 2]
    assert all(seconds >= 0 for _, seconds in told)
