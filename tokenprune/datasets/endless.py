"""Datasets whose scenes are drawn, one after the other, without end."""

from __future__ import annotations

from collections.abc import Iterator

from tokenprune.datasets.base import Scene
from tokenprune.errors import OptionError

MOST = 20_000


def limited(name: str, scenes: Iterator[Scene], limit: int | None) -> Iterator[Scene]:
    """Yield scenes until `limit` queries were given; the last one is cut.

    Args:
        name: of the dataset.
        scenes: of a split, without end.
        limit: number of queries; None = no end.

    Raises:
        OptionError: more than `MOST` queries, which would be minutes of drawing.
    """
    if limit is not None and limit > MOST:
        raise OptionError(
            f"dataset {name!r} draws scenes one after the other, at most {MOST} queries; {limit} were asked "
            "for, choose a lower limit or index, or another seed"
        )
    left = limit
    while left is None or left > 0:
        scene = next(scenes)
        if left is not None:
            scene = scene.only(range(min(left, len(scene.queries))))
            left -= len(scene.queries)
        yield scene
