"""Threads that meet at chosen places, so that every interleaving is made on purpose; nothing waits for ever."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

from torch import nn

from tokenprune.engine.interface.turns import _queue_of, decoder_in

PATIENCE = 60  # seconds until a test fails that would hang


def started(run: Callable[[], Any], name: str = "other") -> Future[Any]:
    """What `run` gives or raises in a thread of its own; ask by `.result(PATIENCE)`."""
    future: Future[Any] = Future()

    def work() -> None:
        try:
            future.set_result(run())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=work, name=name, daemon=True).start()
    return future


def elsewhere(run: Callable[[], Any], name: str = "other") -> Any:
    """Run it in another thread while this one waits for it."""
    return started(run, name).result(PATIENCE)


def side_by_side(runs: Sequence[Callable[[], Any]], threads: int = 8) -> list[Any]:
    """What each of them gives, with so many threads at work that change places as often as Python lets them."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        with ThreadPoolExecutor(threads) as pool:
            return [future.result(PATIENCE) for future in [pool.submit(run) for run in runs]]
    finally:
        sys.setswitchinterval(interval)


class Stop:
    """Where one thread stops until it is told to go on.

    Attributes:
        reached: set once it is there.
        go: set this to let it go on.
    """

    def __init__(self) -> None:
        self.reached, self.go = threading.Event(), threading.Event()

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        self.reached.set()
        assert self.go.wait(PATIENCE), "nobody said go"

    def wait(self) -> None:
        """Until the thread is there."""
        assert self.reached.wait(PATIENCE), "nobody came"


@contextmanager
def stopping(module: nn.Module, thread: str) -> Iterator[Stop]:
    """The thread of that name stops, the first time, before it runs the module."""
    stop = Stop()

    def hook(*args: Any) -> None:
        if threading.current_thread().name == thread and not stop.reached.is_set():
            stop()

    handle = module.register_forward_pre_hook(hook)
    try:
        yield stop
    finally:
        stop.go.set()
        handle.remove()


def until_waiting(model: nn.Module, count: int = 1) -> None:
    """Until so many threads stand in line for the model."""
    queue = _queue_of(decoder_in(model))
    for _ in range(100 * PATIENCE):
        if len(queue.waiting) >= count:
            return
        time.sleep(0.01)
    raise AssertionError(f"{len(queue.waiting)} threads stand in line, not {count}")


def is_free(model: nn.Module) -> bool:
    """Whether nobody has the model, and nobody waits for it."""
    queue = _queue_of(decoder_in(model))
    return (queue.holder, queue.depth, queue.inside, queue.opener, queue.waiting) == (None, 0, False, None, {})


def left_on(model: nn.Module) -> list[Any]:
    """Everything that looking on may leave on the modules."""
    return [
        (
            len(module._forward_hooks),
            len(module._forward_pre_hooks),
            sorted(vars(module)),
            id(vars(module).get("config")),
        )
        for module in model.modules()
    ]
