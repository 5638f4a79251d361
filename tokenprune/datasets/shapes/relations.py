"""Relations to another object, the anchor. Ours.

In version 1 of the dataset the anchor is often needless. "The star above the ring" is asked where one star alone is
above the ring; that is always the topmost star, so no choice of words or scenes can make the ring matter. Version 2
asks for "the nearest star above the ring", and only where the same words with another anchor mean another object.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import dist

from tokenprune.datasets.shapes.phrases import (
    ANYTHING,
    NEAR_MARGIN,
    POSITION_MARGIN,
    Attributes,
    Candidate,
    along,
    describe,
    groups,
    unique_names,
)
from tokenprune.datasets.shapes.scenes import SceneObject

RELATIONS = {"left of": (-1, 0), "right of": (1, 0), "above": (0, -1), "below": (0, 1)}
OPPOSITE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}

Balanced = list[list[list[list[Candidate]]]]
"""Queries by the words without the anchor, then by answer, then by anchor, which can have several names."""


def outermost_side(objects: Sequence[SceneObject]) -> list[Candidate]:
    """ "the blue thing above the white ring": the answer alone is on that side (version 1)."""
    found = []
    for description, name, anchor, others in _pairs(objects):
        for word, direction in RELATIONS.items():
            ahead = [along(item, direction) - along(anchor, direction) for item in others]
            best = max(range(len(others)), key=ahead.__getitem__)
            if ahead[best] >= POSITION_MARGIN and all(d <= 0 for i, d in enumerate(ahead) if i != best):
                found.append((f"the {describe(description)} {word} the {describe(name)}", others[best]))
    return found


def nearest(objects: Sequence[SceneObject]) -> list[Candidate]:
    """ "the star closest to the small red thing", also where every anchor gives the same star (version 1)."""
    found = []
    for description, name, anchor, others in _pairs(objects):
        item = _nearest(anchor, others)
        if item is not None:
            found.append((f"the {describe(description)} closest to the {describe(name)}", item))
    return found


def closest(objects: Sequence[SceneObject]) -> Balanced:
    """ "the star closest to the small red thing"."""
    found = _Found()
    for description, anchor, names, others in _anchored(objects):
        item = _nearest(anchor, others)
        if item is not None:
            found.add(f"the {describe(description)} closest to the", anchor, names, item)
    return found.balanced()


def side(objects: Sequence[SceneObject]) -> Balanced:
    """ "the nearest star above the small red thing".

    The opposite side of the anchor has an answer too, so that the side decides as well.
    """
    found = _Found()
    for description, anchor, names, others in _anchored(objects):
        answers = {word: _nearest_on_side(anchor, others, direction) for word, direction in RELATIONS.items()}
        for word, item in answers.items():
            if item is not None and answers[OPPOSITE[word]] is not None:
                found.add(f"the nearest {describe(description)} {word} the", anchor, names, item)
    return found.balanced()


class _Found:
    """Queries by words, answer and anchor."""

    def __init__(self) -> None:
        self._by_words: dict[str, dict[int, dict[int, list[Candidate]]]] = {}

    def add(self, words: str, anchor: SceneObject, names: Sequence[Attributes], item: SceneObject) -> None:
        answers = self._by_words.setdefault(words, {})
        answers.setdefault(item.label, {})[anchor.label] = [(f"{words} {describe(name)}", item) for name in names]

    def balanced(self) -> Balanced:
        """Those whose words mean two objects at least, each with its own anchors.

        Drawn level by level, each object is then equally likely for the words: who ignores the anchor is right in
        half of the cases at most.
        """
        return [
            [list(anchors.values()) for anchors in answers.values()]
            for answers in self._by_words.values()
            if len(answers) > 1
        ]


def _pairs(
    objects: Sequence[SceneObject],
) -> Iterator[tuple[Attributes, Attributes, SceneObject, list[SceneObject]]]:
    """A description, an anchor's name, the anchor, and the two or more other objects that the description fits."""
    named = unique_names(objects)
    for description, fit in groups(objects).items():
        if len(fit) < 2 or description == ANYTHING:
            continue
        for name, anchor in named:
            others = [item for item in fit if item is not anchor]
            if len(others) >= 2:
                yield description, name, anchor, others


def _anchored(
    objects: Sequence[SceneObject],
) -> Iterator[tuple[Attributes, SceneObject, list[Attributes], list[SceneObject]]]:
    """As `_pairs`, with all names of an anchor together."""
    found: dict[tuple[Attributes, int], tuple[Attributes, SceneObject, list[Attributes], list[SceneObject]]] = {}
    for description, name, anchor, others in _pairs(objects):
        found.setdefault((description, anchor.label), (description, anchor, [], others))[2].append(name)
    yield from found.values()


def _nearest(anchor: SceneObject, others: Sequence[SceneObject]) -> SceneObject | None:
    """The object nearest to the anchor, if no other is about as near."""
    if not others:
        return None
    ordered = sorted(others, key=lambda item: (item.x - anchor.x) ** 2 + (item.y - anchor.y) ** 2)
    gaps = [dist((item.x, item.y), (anchor.x, anchor.y)) for item in ordered[:2]]
    return ordered[0] if len(gaps) == 1 or gaps[1] >= NEAR_MARGIN * gaps[0] else None


def _nearest_on_side(
    anchor: SceneObject, others: Sequence[SceneObject], direction: tuple[int, int]
) -> SceneObject | None:
    """The object nearest to the anchor of those on a side of it, if it is so with or without those just beside it."""
    ahead = {item.label: along(item, direction) - along(anchor, direction) for item in others}
    item = _nearest(anchor, [item for item in others if ahead[item.label] > -POSITION_MARGIN])
    return item if item is not None and ahead[item.label] >= POSITION_MARGIN else None
