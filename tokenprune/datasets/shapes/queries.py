"""Queries of the `shapes` dataset. Extreme, relation and reasoning queries need position or comparison: ours.

Wherever a query of these kinds states a colour, a shape or a size, at least two objects of the scene fit what it
states; the answer is one object, and it wins by a margin (pixels, or ratio of sizes), so that no query is a close call.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from tokenprune.datasets.shapes.scenes import SceneObject

KINDS = ("attribute", "extreme", "relation", "reasoning")

Candidate = tuple[str, SceneObject]
"""The text of a query and the object it means."""

POSITION_MARGIN = 12.0
"""Least distance in pixels, along the axis asked about, by which an extreme, ordered or related object wins."""
SIZE_MARGIN = 1.35
"""Least ratio of radii between compared objects; their visible areas must agree with the same ratio."""
NEAR_MARGIN = 1.4
"""Least ratio of the second-nearest to the nearest distance in "closest to"."""

EXTREMES = {"leftmost": (-1, 0), "rightmost": (1, 0), "topmost": (0, -1), "bottommost": (0, 1)}
RELATIONS = {"left of": (-1, 0), "right of": (1, 0), "above": (0, -1), "below": (0, 1)}
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

Attributes = tuple[str | None, str | None, str | None]


def describe(attributes: Attributes) -> str:
    """A noun phrase without article: ("small", "red", None) gives "small red thing"."""
    size, colour, shape = attributes
    return " ".join(word for word in (size, colour, shape or "thing") if word)


def groups(objects: Sequence[SceneObject]) -> dict[Attributes, list[SceneObject]]:
    """Every description that fits an object of the scene, with the objects that it fits."""
    found: dict[Attributes, list[SceneObject]] = {}
    for item in objects:
        for size in (None, item.size):
            for colour in (None, item.colour):
                for shape in (None, item.shape):
                    found.setdefault((size, colour, shape), []).append(item)
    return found


def _along(item: SceneObject, direction: tuple[int, int]) -> float:
    return item.x * direction[0] + item.y * direction[1]


def attribute(objects: Sequence[SceneObject]) -> list[list[Candidate]]:
    """Words alone decide: "the small red star"."""
    return [[("the " + describe(d), fit[0]) for d, fit in groups(objects).items() if len(fit) == 1 and (d[1] or d[2])]]


def extreme(objects: Sequence[SceneObject]) -> list[list[Candidate]]:
    """ "the leftmost green thing"."""
    found = []
    for description, fit in groups(objects).items():
        if len(fit) < 2:
            continue
        for word, direction in EXTREMES.items():
            ordered = sorted(fit, key=lambda item: -_along(item, direction))
            if _along(ordered[0], direction) - _along(ordered[1], direction) >= POSITION_MARGIN:
                found.append((f"the {word} {describe(description)}", ordered[0]))
    return [found]


def relation(objects: Sequence[SceneObject]) -> list[list[Candidate]]:
    """ "the blue thing above the white ring", "the star closest to the small red thing"."""
    sided: list[Candidate] = []
    nearest: list[Candidate] = []
    described = groups(objects)
    anchors = [(d, fit[0]) for d, fit in described.items() if len(fit) == 1 and (d[1] or d[2])]
    for description, fit in described.items():
        if len(fit) < 2 or description == (None, None, None):
            continue
        for name, anchor in anchors:
            others = [item for item in fit if item is not anchor]
            if len(others) < 2:
                continue
            for word, direction in RELATIONS.items():
                ahead = [_along(item, direction) - _along(anchor, direction) for item in others]
                best = max(range(len(others)), key=ahead.__getitem__)
                if ahead[best] >= POSITION_MARGIN and all(d <= 0 for i, d in enumerate(ahead) if i != best):
                    sided.append((f"the {describe(description)} {word} the {describe(name)}", others[best]))
            far = sorted(others, key=lambda item: (item.x - anchor.x) ** 2 + (item.y - anchor.y) ** 2)
            near, second = (((o.x - anchor.x) ** 2 + (o.y - anchor.y) ** 2) ** 0.5 for o in far[:2])
            if second >= NEAR_MARGIN * near:
                nearest.append((f"the {describe(description)} closest to the {describe(name)}", far[0]))
    return [sided, sided, nearest]


def _excluded(objects: Sequence[SceneObject]) -> list[Candidate]:
    found = []
    for description, fit in groups(objects).items():
        if len(fit) < 2 or description == (None, None, None):
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


def _compared(objects: Sequence[SceneObject]) -> list[Candidate]:
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
                    found.append((f"the {word} of the two {_plural(describe(description))}", first))
    return found


def _plural(phrase: str) -> str:
    return phrase + ("es" if phrase.endswith("s") else "s")


def _known(objects: Sequence[SceneObject]) -> list[Candidate]:
    found = []
    for description, fit in groups(objects).items():
        if len(fit) < 2 or description[2] is not None:
            continue
        for phrase, shapes in KNOWLEDGE.items():
            having = [item for item in fit if item.shape in shapes]
            if len(having) == 1:
                found.append((f"the {describe(description)} with {phrase}", having[0]))
    return found


def _unshared(objects: Sequence[SceneObject]) -> list[Candidate]:
    found = []
    for word in ("colour", "shape"):
        values = [getattr(item, word) for item in objects]
        alone = [item for item, value in zip(objects, values, strict=True) if values.count(value) == 1]
        if len(alone) == 1:
            found.append((f"the only thing that shares its {word} with no other", alone[0]))
    return found


def _ordered(objects: Sequence[SceneObject]) -> list[Candidate]:
    found = []
    for description, fit in groups(objects).items():
        if len(fit) < 3:
            continue
        for word, direction in ORDERS.items():
            places = sorted((_along(item, direction), item.label, item) for item in fit)[:3]
            if places[1][0] - places[0][0] >= POSITION_MARGIN <= places[2][0] - places[1][0]:
                found.append((f"the second {describe(description)} from {word}", places[1][2]))
    return found


def reasoning(objects: Sequence[SceneObject]) -> list[list[Candidate]]:
    """Exclusion, comparison of sizes, shape knowledge, what is shared with nothing, counting from a side."""
    exclusion, comparison = _excluded(objects), _compared(objects)
    return [exclusion, exclusion, comparison, comparison, _known(objects), _unshared(objects), _ordered(objects)]


GENERATORS: dict[str, Callable[[Sequence[SceneObject]], list[list[Candidate]]]] = {
    "attribute": attribute,
    "extreme": extreme,
    "relation": relation,
    "reasoning": reasoning,
}
"""For each kind a list of pools; a pool is drawn first, then a query in it (a pool listed twice counts twice)."""


def sample_queries(
    rng: np.random.Generator, objects: Sequence[SceneObject], kind: str, count: int = 1
) -> list[Candidate]:
    """Draw up to `count` different queries of one kind; fewer where the scene allows fewer."""
    pools = [pool for pool in GENERATORS[kind](objects) if pool]
    drawn: dict[str, SceneObject] = {}
    for _ in range(4 * count):
        if not pools or len(drawn) == count:
            break
        pool = pools[int(rng.integers(len(pools)))]
        text, item = pool[int(rng.integers(len(pool)))]
        drawn.setdefault(text, item)
    return list(drawn.items())
