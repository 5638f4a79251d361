"""The Pareto front of points with a cost and a value."""

from __future__ import annotations

from collections.abc import Sequence


def front(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """The points (cost, value) that no other one equals or beats in both, by rising cost; at least one.

    Examples:
        >>> front([(1.0, 0.2), (2.0, 0.1), (3.0, 0.9)])
        [(1.0, 0.2), (3.0, 0.9)]
    """
    found: list[tuple[float, float]] = []
    for cost, value in sorted(points, key=lambda point: (point[0], -point[1])):
        if not found or value > found[-1][1]:
            found.append((cost, value))
    return found
