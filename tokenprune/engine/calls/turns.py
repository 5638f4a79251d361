"""Access of threads to a model: our own calls take turns, and pruning contexts are open one at a time.

A turn ends by itself, so any thread may wait for it. A context ends when its owner closes it, and the owner may be
waiting for the thread that would wait for the context; so turns of other threads do not wait for it but run beside it,
as if it were not there.
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
from tokenprune.engine.interface.bound_model import BoundModel, bound_model_of
from tokenprune.errors import BusyError, OptionError, TokenPruneError, UnsupportedError
from tokenprune.utils.arguments import one_of, shown

Wait = bool | float

GLANCE = 0.5  # seconds after which waiting threads check whether they wait for a thread that has ended


class _Queue:
    """Of one decoder. Threads are compared as objects, since a new thread may get the number of one that has ended.

    Attributes:
        holder: the thread whose turn it is; None = no thread's.
        depth: how many turns it has begun, one inside the other.
        inside: whether it has opened a pruning context within its turn.
        opener: the thread that opened the pruning context of its own, outside of any turn; None = there is none.
        waiting: who waits, in the order of arrival; True = to open such a context, False = for a turn.
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
                self._stand_in_line(False, wait, name)
                self.holder = me
            self.depth += 1

    def end_turn(self) -> None:
        with self.changed:
            self.depth -= 1
            if not self.depth:
                self.holder = None
                self.changed.notify_all()

    def open(self, wait: Wait, name: str) -> bool:
        """Let this thread open a context; whether that is one within its turn."""
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
                self._stand_in_line(True, wait, name)
                self.opener = me
            return within

    def close(self, within: bool) -> None:
        """Also from another thread than the one that opened, as where a framework closes what it opened elsewhere."""
        with self.changed:
            if within:
                self.inside = False
            else:
                self.opener = None
            self.changed.notify_all()

    def _stand_in_line(self, opens: bool, wait: Wait, name: str) -> None:
        ticket = object()
        self.waiting[ticket] = opens
        try:
            end = time.monotonic() + (float("inf") if wait is True else float(wait))
            while not self._may_go(ticket, opens):
                rest, user = end - time.monotonic(), self._user(opens)
                if rest <= 0 or (user is not None and not user.is_alive()):
                    raise self._busy(name, wait, user)
                self.changed.wait(min(rest, GLANCE))
        finally:
            del self.waiting[ticket]
            self.changed.notify_all()

    def _may_go(self, ticket: object, opens: bool) -> bool:
        if self.holder is not None or (opens and self.opener is not None):
            return False
        # those that wait for the open context to be closed keep no turn waiting
        return ticket is next(one for one, other in self.waiting.items() if not (other and self.opener is not None))

    def _user(self, opens: bool) -> threading.Thread | None:
        """The thread that keeps one waiting; None = it is one that waits too, and came earlier."""
        return (self.opener if opens else None) or self.holder

    def _busy(self, name: str, wait: Wait, user: threading.Thread | None) -> BusyError:
        thread = f"thread {user.name!r}" if user is not None else "another thread"
        opened = user is not None and user is self.opener
        if user is not None and not user.is_alive():
            what = "its pruning context" if opened else "its turn (tokenprune.engine.model_turn)"
            return BusyError(
                f"{name} is still in use by {thread}, which has ended without closing {what}; leave that context, "
                "which any thread may do, or load the model anew"
            )
        doing = "a pruning context is open there" if opened else "it is segmenting or answering there"
        waited = f" after {wait:g} s" if wait else ""
        return BusyError(
            f"{name} is still in use in {thread}{waited}: {doing}; pass wait=True to tokenprune.prune() to wait until "
            "it is free, or give each thread a model of its own, loaded anew or copied while no context is open on it"
        )


_QUEUES: WeakKeyDictionary[nn.Module, _Queue] = WeakKeyDictionary()
_LOCK = threading.Lock()


def _queue_of(decoder: nn.Module) -> _Queue:
    with _LOCK:
        return _QUEUES.setdefault(decoder, _Queue())


@contextmanager
def model_turn(model: nn.Module) -> Iterator[None]:
    """Call a model safely from any thread: such calls take turns, in the order in which they come.

    Inside, `tokenprune.prune` opens a context of this thread alone, without waiting. A context that another thread has
    open all the while changes nothing inside; one that this thread has open goes on. Turns may be nested.

    Args:
        model: the decoder, or any model that `tokenprune.prune` takes.
    """
    decoder = decoder_in(model)
    queue = _queue_of(decoder)
    queue.begin_turn(True, type(decoder).__name__)
    try:
        yield
    finally:
        queue.end_turn()


def decoder_in(model: nn.Module) -> nn.Module:
    """The module that `tokenprune.prune` hooks into; the model itself if it has none: its calls may take turns too."""
    if model in _QUEUES:  # found before
        return model
    if isinstance(model, BoundModel):
        model = model.decoder
    try:
        return find_decoder(model).module
    except UnsupportedError:  # several, of which an adapter knows the right one
        try:
            return find_decoder(bound_model_of(model).decoder).module
        except TokenPruneError:
            return model


@contextmanager
def open_context(decoder: nn.Module, wait: Wait, threads: Literal["any", "own"]) -> Iterator[Callable[[], bool]]:
    """Let this thread have the pruning context of a decoder.

    Args:
        decoder: the module that runs the decoder layers.
        wait: as in `tokenprune.prune`.
        threads: as in `tokenprune.prune`; "own" within a turn.

    Yields:
        Whether the thread that asks is one whose calls the context is for.

    Raises:
        OptionError: `wait` or `threads` is none of what they can be.
        BusyError: another thread still has the model, or has ended and left its context open.
        UnsupportedError: this thread has a context open on it already.
    """
    if not isinstance(wait, (bool, int, float)) or not wait >= 0:
        raise OptionError(f"wait={shown(wait)} found, expected True, False or a number of seconds")
    one_of("threads", threads, ("any", "own"))
    queue, me = _queue_of(decoder), threading.current_thread()
    within = queue.open(wait, type(decoder).__name__)

    def concerns() -> bool:
        thread = threading.current_thread()
        if within or threads == "own":
            return thread is me
        return queue.holder is not thread or queue.opener is thread  # others' turns run beside it

    try:
        yield concerns
    finally:
        queue.close(within)
