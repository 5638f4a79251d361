"""Access of threads to a model: our own methods take turns, and only one pruning context is open at a time.

A turn ends with its call, so any thread may wait for it. A context ends when its owner closes it, and the owner may be
waiting for the thread that wants a turn. So turns of other threads do not wait for a context, and run unpruned.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Literal
from weakref import WeakKeyDictionary

from torch import nn

from tokenprune.engine.decoder import find_decoder
from tokenprune.engine.interface.bound_model import BoundModel
from tokenprune.engine.interface.checked_model import bound_model_of
from tokenprune.errors import BusyError, OptionError, TokenPruneError, UnsupportedError
from tokenprune.utils.arguments import one_of, shown

Wait = bool | float

POLL_SECONDS = 0.5  # how often a waiting thread checks whether the one that it waits for has ended


class _Queue:
    """The queue of one decoder. Threads are compared as objects, since identifiers of ended threads are reused.

    Attributes:
        holder: the thread whose turn it is; None = no turn is in progress.
        depth: number of its nested turns.
        inside: whether it has opened a pruning context within its turn.
        opener: the thread that has a pruning context open outside any turn; None = no such context.
        waiting: tickets in the order of arrival; True = to open such a context, False = for a turn.
    """

    def __init__(self) -> None:
        self.changed = threading.Condition()
        self.holder: threading.Thread | None = None
        self.depth = 0
        self.inside = False
        self.opener: threading.Thread | None = None
        self.waiting: dict[object, bool] = {}

    def begin_turn(self, wait: Wait, name: str) -> None:
        me = threading.current_thread()
        with self.changed:
            if self.holder is not me:
                self._wait_in_queue(False, wait, name)
                self.holder = me
            self.depth += 1

    def end_turn(self) -> None:
        with self.changed:
            self.depth -= 1
            if not self.depth:
                self.holder = None
                self.changed.notify_all()

    def open(self, wait: Wait, name: str) -> bool:
        """Let this thread open a context; returns whether it is within a turn of the thread."""
        me = threading.current_thread()
        with self.changed:
            within = self.holder is me
            if self.opener is me or (within and self.inside):
                raise UnsupportedError(
                    f"{name} is under tokenprune.prune() already in this thread; contexts on one model do not nest"
                )
            if within:
                self.inside = True
            else:
                self._wait_in_queue(True, wait, name)
                self.opener = me
            return within

    def close(self, within: bool) -> None:
        """Close a context, also from another thread, as some frameworks do."""
        with self.changed:
            if within:
                self.inside = False
            else:
                self.opener = None
            self.changed.notify_all()

    def _wait_in_queue(self, opens: bool, wait: Wait, name: str) -> None:
        ticket = object()
        self.waiting[ticket] = opens
        try:
            end = time.monotonic() + (float("inf") if wait is True else float(wait))
            while not self._is_next(ticket, opens):
                rest, user = end - time.monotonic(), self._user(opens)
                if rest <= 0 or (user is not None and not user.is_alive()):
                    raise self._busy(name, wait, user)
                self.changed.wait(min(rest, POLL_SECONDS))
        finally:
            del self.waiting[ticket]
            self.changed.notify_all()

    def _is_next(self, ticket: object, opens: bool) -> bool:
        if self.holder is not None or (opens and self.opener is not None):
            return False
        # a ticket that waits for the open context does not block turns behind it
        return ticket is next(one for one, other in self.waiting.items() if not (other and self.opener is not None))

    def _user(self, opens: bool) -> threading.Thread | None:
        """The thread that blocks; None = it is an earlier ticket that is waiting too."""
        return (self.opener if opens else None) or self.holder

    def _busy(self, name: str, wait: Wait, user: threading.Thread | None) -> BusyError:
        thread = f"thread {user.name!r}" if user is not None else "another thread"
        opened = user is not None and user is self.opener
        if user is not None and not user.is_alive():
            what = "its pruning context" if opened else "its turn (tokenprune.engine.model_turn)"
            return BusyError(
                f"{name} is still in use by {thread}, which has ended without closing {what}; close that context "
                "from any thread, or reload the model"
            )
        doing = "a pruning context is open there" if opened else "it is segmenting or answering there"
        waited = f" after {wait:g} s" if wait else ""
        return BusyError(
            f"{name} is still in use in {thread}{waited}: {doing}; pass wait=True to tokenprune.prune() to wait until "
            "it is free, or give each thread its own model, loaded separately or copied while no context is open on it"
        )


_QUEUES: WeakKeyDictionary[nn.Module, _Queue] = WeakKeyDictionary()
_LOCK = threading.Lock()


def _queue_of(decoder: nn.Module) -> _Queue:
    with _LOCK:
        return _QUEUES.setdefault(decoder, _Queue())


@contextmanager
def model_turn(model: nn.Module) -> Iterator[None]:
    """Call a model safely from any thread: turns run one at a time, in order of arrival.

    Inside a turn, `tokenprune.prune` opens a context for this thread only, without waiting. A context that another
    thread has open has no effect inside; one that this thread has open stays in effect. Turns may be nested.

    Args:
        model: the decoder, or any model that `tokenprune.prune` accepts.
    """
    decoder = decoder_in(model)
    queue = _queue_of(decoder)
    queue.begin_turn(True, type(decoder).__name__)
    try:
        yield
    finally:
        queue.end_turn()


def decoder_in(model: nn.Module) -> nn.Module:
    """The decoder that `tokenprune.prune` would intercept; the model itself if it has none."""
    if model in _QUEUES:
        return model
    if isinstance(model, BoundModel):
        model = model.decoder
    try:
        return find_decoder(model).module
    except UnsupportedError:  # several decoders; an adapter may know the right one
        try:
            return find_decoder(bound_model_of(model).decoder).module
        except TokenPruneError:
            return model


@contextmanager
def open_context(decoder: nn.Module, wait: Wait, threads: Literal["any", "own"]) -> Iterator[Callable[[], bool]]:
    """Reserve the pruning context of a decoder for this thread.

    Args:
        decoder: the module that runs the decoder layers.
        wait: as in `tokenprune.prune`.
        threads: as in `tokenprune.prune`; "own" within a turn.

    Yields:
        A function that tells whether the context applies to the thread that calls it.

    Raises:
        OptionError: `wait` or `threads` has an invalid value.
        BusyError: another thread still uses the model, or has ended with its context open.
        UnsupportedError: this thread already has a context open on it.
    """
    if not isinstance(wait, (bool, int, float)) or not wait >= 0:
        raise OptionError(f"wait={shown(wait)} found, expected True, False or a number of seconds")
    one_of("threads", threads, ("any", "own"))
    queue, me = _queue_of(decoder), threading.current_thread()
    within = queue.open(wait, type(decoder).__name__)

    def applies() -> bool:
        thread = threading.current_thread()
        if within or threads == "own":
            return thread is me
        return queue.holder is not thread or queue.opener is thread  # turns of other threads run unpruned

    try:
        yield applies
    finally:
        queue.close(within)
