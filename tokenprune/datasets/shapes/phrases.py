"""Noun phrases for objects of a scene, and the margins by which an answer wins. Ours."""

from __future__ import annotations

from collections.abc import Sequence

from tokenprune.datasets.shapes.scenes import SceneObject

Candidate = tuple[str, SceneObject]
"""The text of a query and the object it means."""

POSITION_MARGIN = 12.0
"""Least distance in pixels, along the axis asked about, by which an extreme, ordered or related object wins."""
SIZE_MARGIN = 1.35
"""Least ratio of radii between compared objects; their visible areas must agree with the same ratio."""
NEAR_MARGIN = 1.4
"""Least ratio of the second-nearest to the nearest distance in "closest to" and "nearest"."""

Attributes = tuple[str | None, str | None, str | None]
ANYTHING: Attributes = (None, None, None)


def describe(attributes: Attributes) -> str:
    """A noun phrase without article: ("small", "red", None) gives "small red thing"."""
    size, colour, shape = attributes
    return " ".join(word for word in (size, colour, shape or "thing") if word)


def plural(phrase: str) -> str:
    """The phrase for several such objects."""
    return phrase + ("es" if phrase.endswith("s") else "s")


def groups(objects: Sequence[SceneObject]) -> dict[Attributes, list[SceneObject]]:
    """Every description that fits an object of the scene, with the objects that it fits."""
    found: dict[Attributes, list[SceneObject]] = {}
    for item in objects:
        for size in (None, item.size):
            for colour in (None, item.colour):
                for shape in (None, item.shape):
                    found.setdefault((size, colour, shape), []).append(item)
    return found


def unique_names(objects: Sequence[SceneObject]) -> list[tuple[Attributes, SceneObject]]:
    """Descriptions by colour or shape that fit one object of the scene alone, with that object."""
    return [(d, fit[0]) for d, fit in groups(objects).items() if len(fit) == 1 and (d[1] or d[2])]


def along(item: SceneObject, direction: tuple[int, int]) -> float:
    """How far an object lies in a direction, in pixels."""
    return item.x * direction[0] + item.y * direction[1]
