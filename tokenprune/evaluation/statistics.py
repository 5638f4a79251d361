"""Intervals of gIoU and cIoU, and paired differences between strategies, over scenes.

Queries about one image are no independent samples, so whole scenes are resampled.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from tokenprune.errors import InputError

RESAMPLES = 2000
LEVEL = 0.95
ENOUGH = 6  # scenes: with fewer, not even differences of one sign give the permutation test p < 0.05


@dataclass(frozen=True)
class Estimate:
    """A value and its interval.

    Attributes:
        value: of the sample.
        low, high: 95 % bootstrap interval (percentiles) over scenes; equal to the value where there is one scene.
        scenes: how many; 0 = unknown.
    """

    value: float
    low: float
    high: float
    scenes: int = 0

    @property
    def interval(self) -> tuple[float, float] | None:
        """Low and high; None for one scene, which has no spread."""
        return None if self.scenes == 1 else (self.low, self.high)

    def __str__(self) -> str:
        """As in tables: "0.910 [0.900, 0.920]"."""
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]" if self.interval else f"{self.value:.3f} [–]"


@dataclass(frozen=True)
class Difference:
    """The mean difference of two strategies' IoUs on the same queries.

    Attributes:
        value: first minus second.
        low, high: 95 % bootstrap interval over scenes.
        p: two-sided, of a paired permutation test over scenes: how often the sum of differences is at least as large
            when each scene's sign is drawn at random.
        scenes: how many; 0 = unknown.
    """

    value: float
    low: float
    high: float
    p: float
    scenes: int = 0

    @property
    def too_few(self) -> bool:
        """Whether so few scenes could not show any difference."""
        return 0 < self.scenes < ENOUGH

    @property
    def shown(self) -> bool:
        """Whether the data show a difference: p below 0.05, and an interval without 0."""
        return self.p < 1 - LEVEL and not self.low <= 0 <= self.high


def mean_interval(values: Sequence[float], scenes: Sequence[Hashable], seed: int = 0) -> Estimate:
    """The mean of values (gIoU, of IoUs) with its interval. Raises InputError for none, or lengths that differ."""
    ones = np.ones(len(values))
    return ratio_interval(values, ones.tolist(), scenes, seed)


def ratio_interval(
    above: Sequence[float], below: Sequence[float], scenes: Sequence[Hashable], seed: int = 0
) -> Estimate:
    """A ratio of sums (cIoU, of intersections over unions) with its interval.

    Args:
        above, below: of each query.
        scenes: the scene of each query.
        seed: of the resampling.

    Raises:
        InputError: no query, or lengths that differ.
    """
    top, bottom = _by_scene(above, scenes), _by_scene(below, scenes)

    def ratio(a: NDArray[np.float64], b: NDArray[np.float64], axis: int = -1) -> NDArray[np.float64]:
        total, under = a.sum(axis=axis), b.sum(axis=axis)
        # an empty union counts as 1, as in `metrics.ciou`
        return np.where(under > 0, total / np.where(under > 0, under, 1), 1.0)

    value = float(ratio(top, bottom))
    if len(top) < 2:
        return Estimate(value, value, value, len(top))
    found = stats.bootstrap(
        (top, bottom),
        ratio,
        paired=True,
        n_resamples=RESAMPLES,
        confidence_level=LEVEL,
        method="percentile",
        vectorized=True,
        rng=np.random.default_rng(seed),
    ).confidence_interval
    return Estimate(value, float(found.low), float(found.high), len(top))


def paired_difference(
    first: Sequence[float], second: Sequence[float], scenes: Sequence[Hashable], seed: int = 0
) -> Difference:
    """The mean difference of two strategies on the same queries; arguments and errors as above."""
    if len(first) != len(second):
        raise InputError(f"paired values: found {len(first)} and {len(second)}, expected as many of the same queries")
    gaps = [a - b for a, b in zip(first, second, strict=True)]
    estimate = mean_interval(gaps, scenes, seed)
    sums = _by_scene(gaps, scenes)
    if len(sums) < 2 or not np.any(sums):  # one scene shows nothing, nor does equality
        return Difference(estimate.value, estimate.low, estimate.high, 1.0, len(sums))
    p = stats.permutation_test(
        (sums,),
        lambda x, axis=-1: x.sum(axis=axis),
        permutation_type="samples",
        n_resamples=RESAMPLES * 5,
        vectorized=True,
        rng=np.random.default_rng(seed),
    ).pvalue
    return Difference(estimate.value, estimate.low, estimate.high, float(p), len(sums))


def _by_scene(values: Sequence[float], scenes: Sequence[Hashable]) -> NDArray[np.float64]:
    """The sum of each scene's values, in the order of first appearance."""
    if not len(values) or len(values) != len(scenes):
        raise InputError(f"found {len(values)} values of {len(scenes)} queries' scenes, expected as many, at least one")
    number: dict[Hashable, int] = {}
    index = [number.setdefault(scene, len(number)) for scene in scenes]
    return np.bincount(index, weights=np.asarray(values, dtype=np.float64)).astype(np.float64)
