"""Forms of queries without a second object: words alone, extremes, and five forms of reasoning. Ours.

Each gives the queries that a scene allows. Wherever one of these (but for words alone) states a colour, a shape or a
size, at least two objects of the scene fit what it states; the answer is one object, and it wins by a margin.
"""

from __future__ import annotations

from collections.abc import Sequence

from tokenprune.datasets.shapes.phrases import (
    ANYTHING,
    POSITION_MARGIN,
    SIZE_MARGIN,
    Candidate,
    along,
    describe,
    groups,
    plural,
    unique_names,
)
from tokenprune.datasets.shapes.scenes import SceneObject

EXTREMES = {"leftmost": (-1, 0), "rightmost": (1, 0), "topmost": (0, -1), "bottommost": (0, 1)}
ORDERS = {"the left": (1, 0), "the right": (-1, 0), "the top": (0, 1), "the bottom": (0, -1)}
KNOWLEDGE = {
    "three corners": ("triangle",),
    "four corners": ("square", "diamond"),
    "six corners": ("hexagon",),
    "no corners": ("circle", "ring"),
    "five points": ("star",),
    "four arms": ("cross",),
    "a hole": ("ring",),
}


def attribute(objects: Sequence[SceneObject]) -> list[Candidate]:
    """Words alone decide: "the small red star"."""
    return [("the " + describe(name), item) for name, item in unique_names(objects)]


def extreme(objects: Sequence[SceneObject]) -> list[Candidate]:
    """ "the leftmost green thing"."""
    found = []
    for description, fit in groups(objects).items():
        if len(fit) < 2:
            continue
        for word, direction in EXTREMES.items():
            ordered = sorted(fit, key=lambda item: -along(item, direction))
            if along(ordered[0], direction) - along(ordered[1], direction) >= POSITION_MARGIN:
                found.append((f"the {word} {describe(description)}", ordered[0]))
    return found


def exclusion(objects: Sequence[SceneObject]) -> list[Candidate]:
    """ "the star that is not red"."""
    found = []
    for description, fit in groups(objects).items():
        if len(fit) < 2 or description == ANYTHING:
            continue
        if description[1] is None:
            for colour in {item.colour for item in fit}:
                rest = [item for item in fit if item.colour != colour]
                if len(rest) == 1:
                    found.append((f"the {describe(description)} that is not {colour}", rest[0]))
        if description[2] is None:
            for shape in {item.shape for item in fit}:
                rest = [item for item in fit if item.shape != shape]
                if len(rest) == 1:
                    found.append((f"the {describe(description)} that is not a {shape}", rest[0]))
    return sorted(found, key=lambda pair: pair[0])


def comparison(objects: Sequence[SceneObject]) -> list[Candidate]:
    """ "the largest red thing", "the smaller of the two crosses"."""
    found = []
    for description, fit in groups(objects).items():
        if len(fit) < 2 or description[0] is not None:
            continue
        for word, reverse in (("largest", True), ("smallest", False)):
            first, *rest = sorted(fit, key=lambda item: item.radius, reverse=reverse)
            pairs = [(first, other) if reverse else (other, first) for other in rest]
            if all(a.radius >= SIZE_MARGIN * b.radius and a.area >= SIZE_MARGIN * b.area for a, b in pairs):
                found.append((f"the {word} {describe(description)}", first))
                if len(fit) == 2:
                    word = "larger" if reverse else "smaller"
                    found.append((f"the {word} of the two {plural(describe(description))}", first))
    return found


def knowledge(objects: Sequence[SceneObject]) -> list[Candidate]:
    """ "the red thing with three corners"."""
    found = []
    for description, fit in groups(objects).items():
        if len(fit) < 2 or description[2] is not None:
            continue
        for phrase, shapes in KNOWLEDGE.items():
            having = [item for item in fit if item.shape in shapes]
            if len(having) == 1:
                found.append((f"the {describe(description)} with {phrase}", having[0]))
    return found


def unshared(objects: Sequence[SceneObject]) -> list[Candidate]:
    """ "the only thing that shares its colour with no other"."""
    found = []
    for word in ("colour", "shape"):
        values = [getattr(item, word) for item in objects]
        alone = [item for item, value in zip(objects, values, strict=True) if values.count(value) == 1]
        if len(alone) == 1:
            found.append((f"the only thing that shares its {word} with no other", alone[0]))
    return found


def order(objects: Sequence[SceneObject]) -> list[Candidate]:
    """ "the second star from the left"."""
    found = []
    for description, fit in groups(objects).items():
        if len(fit) < 3:
            continue
        for word, direction in ORDERS.items():
            places = sorted((along(item, direction), item.label, item) for item in fit)[:3]
            if places[1][0] - places[0][0] >= POSITION_MARGIN <= places[2][0] - places[1][0]:
                found.append((f"the second {describe(description)} from {word}", places[1][2]))
    return found
