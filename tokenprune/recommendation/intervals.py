"""What repeated times show: an interval of the median without assumptions on the noise, and break-even points."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

LEVEL = 0.95


def median_interval(values: Sequence[float], level: float = LEVEL) -> tuple[float, float] | None:
    """An interval that holds the median of the distribution with at least this probability.

    Its ends are order statistics, so it holds for any distribution of independent values: times have long tails, and a
    normal approximation would be wrong. None if there are too few values for the level: 6 are needed for 95 %.

    Args:
        values: independent measurements.
        level: in (0, 1).

    Examples:
        >>> median_interval([0.9, 0.8, 0.7, 0.95, 0.85, 0.75])
        (0.7, 0.95)
    """
    ordered, count = sorted(values), len(values)
    beyond, cut = 0.0, -1
    for left in range(count):  # P(Binomial(count, 1/2) <= left): the chance that the median is left of ordered[left]
        beyond += math.comb(count, left) / 2**count
        if beyond > (1 - level) / 2:
            break
        cut = left
    return None if cut < 0 else (ordered[cut], ordered[count - 1 - cut])


def least_values(level: float = LEVEL) -> int:
    """The smallest number of values for which `median_interval` gives an interval."""
    return math.ceil(1 - math.log2(1 - level))


def break_even(upper_bounds: Mapping[int, float | None]) -> tuple[int | None, list[int]]:
    """The smallest number of image tokens from which a strategy is shown to save time.

    Args:
        upper_bounds: by number of image tokens, the upper bound of the time relative to that without pruning; None if
            the measurements give none.

    Returns:
        The smallest number whose bound is below 1, None if none is; and the larger numbers at which it is not.

    Examples:
        >>> break_even({64: 1.1, 256: 0.9, 576: 0.6})
        (256, [])
    """
    shown = {tokens: bound is not None and bound < 1 for tokens, bound in upper_bounds.items()}
    first = min((tokens for tokens, pays in shown.items() if pays), default=None)
    if first is None:
        return None, []
    return first, sorted(tokens for tokens, pays in shown.items() if tokens > first and not pays)
