"""Who may use a model: one thread at a time, the others wait in turn or are refused."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from weakref import WeakKeyDictionary

from torch import nn

from tokenprune.errors import BusyError, UnsupportedError


class _Queue:
    """Of one decoder.

    Attributes:
        holder: identifier of the thread that has the model; None = nobody.
        depth: how often it has entered.
        pruning: whether it has a pruning context open.
        waiting: threads in the order in which they came.
    """

    def __init__(self) -> None:
        self.changed = threading.Condition()
        self.holder: int | None = None
        self.depth = 0
        self.pruning = False
        self.waiting: list[object] = []

    def enter(self, wait: bool | float, name: str) -> None:
        me, ticket = threading.get_ident(), object()
        with self.changed:
            if self.holder != me:
                self.waiting.append(ticket)
                try:
                    patience = None if wait is True else float(wait)
                    if not self.changed.wait_for(lambda: self._free_for(ticket), patience):
                        raise _busy(name, wait)
                finally:
                    self.waiting.remove(ticket)
                    self.changed.notify_all()
                self.holder = me
            self.depth += 1

    def _free_for(self, ticket: object) -> bool:
        return self.holder is None and self.waiting[0] is ticket

    def leave(self) -> None:
        """Also from another thread than the one that entered, as where a framework closes what it opened elsewhere."""
        with self.changed:
            self.depth -= 1
            if not self.depth:
                self.holder = None
                self.changed.notify_all()


_QUEUES: WeakKeyDictionary[nn.Module, _Queue] = WeakKeyDictionary()
_LOCK = threading.Lock()


def _queue_of(decoder: nn.Module) -> _Queue:
    with _LOCK:
        return _QUEUES.setdefault(decoder, _Queue())


@contextmanager
def model_turn(decoder: nn.Module, wait: bool | float = True) -> Iterator[None]:
    """Have a model to this thread alone; it may enter again inside.

    Args:
        decoder: the module that runs the decoder layers.
        wait: for another thread to be done: True = as long as it takes, False = not at all, or so many seconds.

    Raises:
        BusyError: another thread still has it.
    """
    queue = _queue_of(decoder)
    queue.enter(wait, type(decoder).__name__)
    try:
        yield
    finally:
        queue.leave()


@contextmanager
def pruning_turn(decoder: nn.Module, wait: bool | float) -> Iterator[None]:
    """The same for a pruning context, of which a model has one at a time.

    Raises:
        BusyError: see `model_turn`.
        UnsupportedError: this thread has a context open on it already.
    """
    queue = _queue_of(decoder)
    with model_turn(decoder, wait):
        if queue.pruning:
            raise UnsupportedError(
                f"{type(decoder).__name__} is under tokenprune.prune() already; contexts on one model do not nest"
            )
        queue.pruning = True
        try:
            yield
        finally:
            queue.pruning = False


def _busy(name: str, wait: bool | float) -> BusyError:
    waited = f" after {wait:g} s" if wait else ""
    return BusyError(
        f"{name} is in use in another thread{waited}: a pruning context is open on it, or it is segmenting or "
        "answering; pass wait=True to tokenprune.prune() to wait for it, or use a copy of the model"
    )
