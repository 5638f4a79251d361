"""Intervals and paired differences, against plain computations."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenprune.errors import InputError
from tokenprune.evaluation import metrics
from tokenprune.evaluation.statistics import mean_interval, paired_difference, ratio_interval


def test_values_are_those_of_the_metrics() -> None:
    generator = np.random.default_rng(0)
    union = generator.integers(0, 50, 40)
    overlaps = [(int(generator.integers(0, u + 1)), int(u)) for u in union]
    scenes = [number // 3 for number in range(40)]
    ious = [metrics.expression_iou(*pair) for pair in overlaps]
    assert mean_interval(ious, scenes).value == pytest.approx(metrics.giou(overlaps), abs=1e-12)
    found = ratio_interval([pair[0] for pair in overlaps], [pair[1] for pair in overlaps], scenes)
    assert found.value == pytest.approx(metrics.ciou(overlaps), abs=1e-12)
    assert found.low <= found.value <= found.high


def test_an_interval_is_that_of_resampled_scenes() -> None:
    """Against a plain loop that draws scenes with replacement."""
    generator = np.random.default_rng(1)
    sizes = generator.integers(1, 6, 30)
    scenes = [number for number, size in enumerate(sizes) for _ in range(size)]
    level = generator.random(30)
    values = [float(np.clip(level[scene] + generator.normal(0, 0.1), 0, 1)) for scene in scenes]
    parts = [[v for v, s in zip(values, scenes, strict=True) if s == scene] for scene in range(30)]
    means = []
    for _ in range(4000):
        drawn = [value for scene in generator.integers(0, 30, 30) for value in parts[scene]]
        means.append(sum(drawn) / len(drawn))
    low, high = np.percentile(means, [2.5, 97.5])
    found = mean_interval(values, scenes)
    assert (found.low, found.high) == pytest.approx((low, high), abs=0.012)
    alone = mean_interval(values, range(len(values)))  # as if queries were independent: too narrow here
    assert found.high - found.low > 1.3 * (alone.high - alone.low)


@given(st.lists(st.integers(-8, 8).map(lambda eighths: eighths / 8), min_size=2, max_size=9))
@settings(deadline=None, max_examples=30)
def test_p_is_the_share_of_signs(gaps: list[float]) -> None:
    """All signs are tried where there are few scenes."""
    total = abs(sum(gaps))
    count = sum(
        abs(sum(s * g for s, g in zip(signs, gaps, strict=True))) >= total - 1e-12
        for signs in product((1, -1), repeat=len(gaps))
    )
    found = paired_difference(gaps, [0.0] * len(gaps), range(len(gaps)))
    assert found.value == pytest.approx(sum(gaps) / len(gaps), abs=1e-12)
    assert found.p == pytest.approx(min(count / 2 ** len(gaps), 1), abs=2 / 2 ** len(gaps) + 1e-9)


def test_what_is_shown() -> None:
    generator = np.random.default_rng(2)
    first = generator.random(200)
    scenes = [number // 4 for number in range(200)]
    worse = (first - 0.02 + generator.normal(0, 0.02, 200)).tolist()
    found = paired_difference(first.tolist(), worse, scenes)
    assert found.shown
    assert found.low < 0.02 < found.high
    assert not paired_difference(first.tolist(), generator.permutation(first).tolist(), scenes).shown
    assert paired_difference(first.tolist(), first.tolist(), scenes).p == 1.0
    assert not paired_difference([0.9], [0.1], ["one"]).shown  # a single scene shows nothing


def test_a_false_difference_is_shown_as_often_as_agreed() -> None:
    """Of 100 pairs without a difference, about one in twenty may seem to have one."""
    generator = np.random.default_rng(3)
    seen = 0
    for _ in range(100):
        gaps = generator.normal(0, 0.1, 25)
        seen += paired_difference(gaps.tolist(), [0.0] * 25, range(25)).shown
    assert seen <= 12


def test_mistakes() -> None:
    with pytest.raises(InputError, match="found 0 values of 0 queries' scenes"):
        mean_interval([], [])
    with pytest.raises(InputError, match="found 2 values of 1 queries' scenes"):
        mean_interval([0.1, 0.2], [1])
    with pytest.raises(InputError, match="paired values: found 2 and 1"):
        paired_difference([0.1, 0.2], [0.3], [1, 2])


def test_few_scenes_are_told_and_show_nothing() -> None:
    one = mean_interval([0.9, 0.92], ["a", "a"])
    assert (one.scenes, one.interval, str(one)) == (1, None, "0.910 [–]")
    five = paired_difference([0.9] * 5, [0.1] * 5, list("abcde"))
    assert (five.scenes, five.too_few, five.shown) == (5, True, False)
    assert five.p >= 2 / 2**5
    six = paired_difference([0.9] * 6, [0.1] * 6, list("abcdef"))
    assert (six.scenes, six.too_few, six.shown) == (6, False, True)
    assert str(mean_interval([0.0, 1.0] * 4, list("abcdefgh"))).startswith("0.500 [0.")
