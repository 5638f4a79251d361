"""Intervals of medians and break-even points, against independent computations."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binom

from tokenprune.recommendation.intervals import break_even, least_values, median_interval

TIMES = st.floats(1e-6, 1e3)


@pytest.mark.parametrize("count", range(1, 13))
def test_the_interval_holds_the_median_as_often_as_it_says(count: int) -> None:
    """By enumeration: every value is independently below or above the true median, 0, with equal chance."""
    found = 0
    for signs in itertools.product((-1, 1), repeat=count):
        interval = median_interval([sign * (1 + place) for place, sign in enumerate(signs)])
        if interval is None:
            assert count < least_values()
            return
        found += interval[0] < 0 < interval[1]
    assert found / 2**count >= 0.95


@pytest.mark.parametrize("count", [6, 7, 9, 17, 40])
@pytest.mark.parametrize("level", [0.5, 0.9, 0.95])
def test_its_ends_are_the_innermost_order_statistics_that_do(count: int, level: float) -> None:
    values = list(range(count))
    low, high = median_interval(values, level) or (-1, -1)
    assert high == count - 1 - low
    assert 1 - 2 * binom.cdf(low, count, 0.5) >= level - 1e-12
    assert 1 - 2 * binom.cdf(low + 1, count, 0.5) < level  # one further inside holds it too seldom


def test_few_values_show_nothing() -> None:
    assert least_values() == 6
    assert median_interval([1.0] * 5) is None
    assert median_interval([1.0] * 6) == (1.0, 1.0)
    assert median_interval([]) is None


@given(st.lists(TIMES, min_size=6, max_size=50), st.randoms(use_true_random=False))
def test_order_does_not_matter_and_outliers_move_nothing_beyond_themselves(
    values: list[float], shuffle: object
) -> None:
    low, high = median_interval(values) or (0.0, 0.0)
    ordered = sorted(values)
    assert low <= ordered[(len(values) - 1) // 2] <= ordered[len(values) // 2] <= high
    mixed = list(values)
    shuffle.shuffle(mixed)  # type: ignore[attr-defined]
    assert median_interval(mixed) == (low, high)
    if high < ordered[-1]:
        assert median_interval([*ordered[:-1], 1e9]) == (low, high)


@given(st.dictionaries(st.integers(1, 4000), st.none() | st.floats(0.1, 2)))
def test_break_even_is_the_first_number_that_is_shown(bounds: dict[int, float | None]) -> None:
    first, beyond = break_even(bounds)
    rows = sorted(bounds.items())
    while rows and (rows[0][1] is None or rows[0][1] >= 1):
        rows.pop(0)
    assert first == (rows[0][0] if rows else None)
    assert beyond == [tokens for tokens, bound in rows if not (bound or 2) < 1]
