"""Work on items in background threads, a bounded number of items ahead of the one in use, in the given order."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")
R = TypeVar("R")


def prefetch(items: Iterable[T], work: Callable[[T], R], workers: int, ahead: int) -> Iterator[Future[R]]:
    """The result of each item, in order, as a future, while threads work on those that follow.

    Closing the iterator, or an exception in the code that uses it, cancels what has not begun, and waits for the
    threads, each of which finishes its item.

    Args:
        items: taken one by one, in the thread that iterates. If taking one raises an exception, it is raised after the
            results of those before it.
        work: called in other threads, with one item each.
        workers: number of threads, at least 1.
        ahead: largest number of items that have been taken and whose results have not been handed out, at least 1.
    """
    source = iter(items)
    waiting: deque[Future[R]] = deque()
    failed: Exception | None = None
    ended = False
    with ThreadPoolExecutor(workers, thread_name_prefix="tokenprune-prefetch") as pool:
        try:
            while True:
                while not ended and len(waiting) < ahead:
                    try:
                        waiting.append(pool.submit(work, next(source)))
                    except StopIteration:
                        ended = True
                    except Exception as error:
                        ended, failed = True, error
                if not waiting:
                    break
                yield waiting.popleft()
        except BaseException:  # GeneratorExit too; at the end, results that were handed out may still be in work
            pool.shutdown(wait=True, cancel_futures=True)
            raise
    if failed is not None:
        raise failed
