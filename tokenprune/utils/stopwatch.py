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

    `TOTAL` is the time of the whole context, set at its end. Stages also count in a context around this one.

    Examples:
        >>> import numpy as np, tokenprune as tp
        >>> from tokenprune.utils.stopwatch import recorded
        >>> with recorded() as times:
        ...     found = tp.load("lisa-tiny").segment(np.zeros((24, 32, 3), np.uint8), "the red ring")
        >>> list(times)
        ['preprocess', 'vision tower', 'mask encoder', 'prefill', 'mask decoder', 'total']
    """
    around = _recording.get()
    times: dict[str, float] = {}
    token = _recording.set(times)
    start = _now()
    try:
        yield times
    finally:
        _recording.reset(token)
        if around is not None:
            for name, milliseconds in times.items():
                around[name] = around.get(name, 0.0) + milliseconds
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
    """All stages and the total in one line, in seconds from one second on."""
    unit, scale, digits = ("s", 1e-3, 2) if times[TOTAL] >= 1e3 else ("ms", 1, 1)
    told = {name: f"{milliseconds * scale:.{digits}f} {unit}" for name, milliseconds in times.items()}
    parts = [f"{name} {time}" for name, time in told.items() if name != TOTAL]
    return f"time: {'; '.join(part for part in (', '.join(parts), f'{told[TOTAL]} in all') if part)}"


def rate(times: dict[str, float], number: int) -> str:
    """The total of some images, and how many it is in a second."""
    seconds = times[TOTAL] / 1e3
    return f"{seconds:.1f} s, {number / max(seconds, 1e-9):.2f} images/s"


def _now() -> float:
    """Milliseconds, after synchronising every device: kernels run asynchronously."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        for number in range(torch.cuda.device_count()):
            torch.cuda.synchronize(number)
    if torch is not None and torch.backends.mps.is_available():
        torch.mps.synchronize()
    return 1e3 * time.perf_counter()
