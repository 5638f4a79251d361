"""Results of background threads, in order, and never more of them than asked for."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest

from tokenprune.utils.prefetch import prefetch


def ours() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("tokenprune-prefetch")]


def test_results_are_in_order_whichever_is_done_first() -> None:
    second = threading.Event()

    def work(item: int) -> int:
        if item == 0:
            assert second.wait(60)
        elif item == 1:
            second.set()
        return item * item

    assert [future.result() for future in prefetch(range(5), work, workers=2, ahead=3)] == [0, 1, 4, 9, 16]
    assert not ours()


def test_items_are_taken_as_they_are_needed() -> None:
    taken: list[int] = []

    def items() -> Iterator[int]:
        for item in range(100):
            taken.append(item)
            yield item

    reading = prefetch(items(), abs, workers=3, ahead=4)
    assert not taken
    for count in range(1, 20):
        next(reading)
        assert len(taken) <= count + 4
    reading.close()
    assert len(taken) < 30
    assert not ours()


def test_nothing_and_fewer_items_than_ahead() -> None:
    assert list(prefetch([], abs, 2, 4)) == []
    assert [future.result() for future in prefetch([-1], abs, 2, 4)] == [1]


def test_results_that_were_handed_out_at_the_end_are_still_made() -> None:
    futures = list(prefetch(range(50), abs, workers=1, ahead=50))
    assert [future.result() for future in futures] == list(range(50))


def test_an_error_in_the_work_is_in_its_future() -> None:
    first, second, third = prefetch([4, 0, 2], lambda item: 8 // item, 2, 3)
    assert (first.result(), third.result()) == (2, 4)
    with pytest.raises(ZeroDivisionError):
        second.result()


def test_an_error_of_the_items_comes_after_the_results_before_it() -> None:
    def items() -> Iterator[int]:
        yield 1
        yield 2
        raise OSError("the list ends here")

    reading = prefetch(items(), abs, 2, 8)
    assert [next(reading).result(), next(reading).result()] == [1, 2]
    with pytest.raises(OSError, match="the list ends here"):
        next(reading)
    assert not ours()


def test_an_error_of_the_caller_ends_the_threads() -> None:
    begun = threading.Event()

    def work(item: int) -> int:
        begun.set()
        return item

    def use() -> None:
        for _ in prefetch(range(1000), work, workers=2, ahead=500):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        use()
    assert begun.is_set()
    assert not ours()
