"""Times of the stages of a call in milliseconds, measured only on request: otherwise no device is synchronised."""

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
    """The times of the stages that run in this thread in this context, in milliseconds, by name and in order.

    `TOTAL` is the time of the whole context, set at its end.
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
    """One stage of a call; times of equal names are added. Stages are not nested."""
    times = _recording.get()
    if times is None:
        yield
        return
    start = _now()
    yield
    times[name] = times.get(name, 0.0) + _now() - start


def summary(times: dict[str, float]) -> str:
    """All stages and the total in one line."""
    parts = [f"{name} {milliseconds:.1f} ms" for name, milliseconds in times.items() if name != TOTAL]
    return "; ".join(part for part in (", ".join(parts), f"{times[TOTAL]:.1f} ms in all") if part)


def _now() -> float:
    """Milliseconds, after synchronising every device: kernels run asynchronously."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        for number in range(torch.cuda.device_count()):
            torch.cuda.synchronize(number)
    if torch is not None and torch.backends.mps.is_available():
        torch.mps.synchronize()
    return 1e3 * time.perf_counter()
