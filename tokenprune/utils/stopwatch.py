"""Milliseconds of the stages of a call, for whoever asks; otherwise nothing is measured and no device is waited for."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

TOTAL = "total"
_recording: ContextVar[dict[str, float] | None] = ContextVar("stages", default=None)


@contextmanager
def recorded() -> Iterator[dict[str, float]]:
    """What the stages take that run in this thread while open, in milliseconds by name and in their order.

    `TOTAL`, once it is left, is everything: the stages, and what belongs to none.
    """
    times: dict[str, float] = {}
    token = _recording.set(times)
    start = _now()
    try:
        yield times
    finally:
        _recording.reset(token)
        times[TOTAL] = _now() - start


@contextmanager
def stage(name: str) -> Iterator[None]:
    """One stage of a call; a name that comes again counts on. Stages do not hold each other."""
    times = _recording.get()
    if times is None:
        yield
        return
    start = _now()
    yield
    times[name] = times.get(name, 0.0) + _now() - start


def told(times: dict[str, float]) -> str:
    """In one line: every stage, and the total."""
    parts = [f"{name} {milliseconds:.1f} ms" for name, milliseconds in times.items() if name != TOTAL]
    return "; ".join(part for part in (", ".join(parts), f"{times[TOTAL]:.1f} ms in all") if part)


def _now() -> float:
    """Milliseconds, once every device has done what it was given: kernels run on after the call that starts them."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        for number in range(torch.cuda.device_count()):
            torch.cuda.synchronize(number)
    if torch is not None and torch.backends.mps.is_available():
        torch.mps.synchronize()
    return 1e3 * time.perf_counter()
