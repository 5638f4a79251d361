"""Fair timing: contenders run on the same samples, interleaved: a drift of the machine affects all equally."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext

Run = Callable[[], object]


def interleaved_medians(
    samples: Sequence[Sequence[Run]],
    *,
    rounds: int = 3,
    clock: Callable[[], float] = time.perf_counter,
    on_sample: Callable[[], None] = lambda: None,
    alone: Callable[[], AbstractContextManager[object]] = nullcontext,
) -> list[float]:
    """Median seconds of every contender over samples × rounds.

    In every sample all contenders run once without measurement, then `rounds` times in turn; each round begins with the
    next contender, so that none always runs first. The result is the median over samples of the median over rounds:
    samples of different lengths have the same weight.

    Args:
        samples: for every sample one run per contender, in the same order.
        rounds: measured runs per sample and contender.
        clock: seconds; replaced in tests.
        on_sample: called after every sample.
        alone: a context for every run; the time to enter it is not measured.
    """
    contenders = len(samples[0]) if samples else 0
    found: list[list[float]] = [[] for _ in range(contenders)]
    for number, runs in enumerate(samples):
        for run in runs:
            with alone():
                run()
        taken: list[list[float]] = [[] for _ in range(contenders)]
        for turn in range(rounds):
            first = (number + turn) % contenders
            for contender in [*range(first, contenders), *range(first)]:
                with alone():
                    start = clock()
                    runs[contender]()
                    taken[contender].append(clock() - start)
        for contender, times in enumerate(taken):
            found[contender].append(statistics.median(times))
        on_sample()
    return [statistics.median(times) for times in found]
