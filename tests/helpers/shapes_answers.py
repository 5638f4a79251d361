"""The answers of the datasets `shapes` and `shapes-2`, derived from words and objects by rules of this file alone."""

from __future__ import annotations

import itertools
import math
import re

from tokenprune.datasets.shapes import COLOURS, SHAPES, SIZES

CORNERS = {"three corners": {"triangle"}, "four corners": {"square", "diamond"}, "six corners": {"hexagon"}}
FEATURES = {"no corners": {"circle", "ring"}, "five points": {"star"}, "four arms": {"cross"}, "a hole": {"ring"}}
TOWARDS = {"left": (-1, 0), "right": (1, 0), "top": (0, -1), "bottom": (0, 1)}
SIDES = {"left of": "left", "right of": "right", "above": "top", "below": "bottom"}


def fits(words, item):
    """Whether an object is what a phrase like "small red star" says; None for a phrase that says something else."""
    for word in words.split():
        if word in SIZES:
            ok = item.size == word
        elif word in COLOURS:
            ok = item.colour == word
        elif word in SHAPES:
            ok = item.shape == word
        elif word == "thing":
            ok = True
        else:
            raise AssertionError(f"unknown word {word!r} in {words!r}")
        if not ok:
            return False
    return True


def score(item, side):
    dx, dy = TOWARDS[side]
    return dx * item.x + dy * item.y


def by_margin(items, key, margin):
    ordered = sorted(items, key=key, reverse=True)
    assert key(ordered[0]) - key(ordered[1]) >= margin
    return ordered[0]


def answer(text, objects):
    """(the object that the text means, the objects that fit what it states)."""

    def matching(words):
        return [o for o in objects if fits(words, o)]

    if found := re.fullmatch(r"the only thing that shares its (colour|shape) with no other", text):
        (one,) = [o for o in objects if [getattr(p, found[1]) for p in objects].count(getattr(o, found[1])) == 1]
        return one, objects
    if found := re.fullmatch(r"the (.+) that is not (?:a )?(\w+)", text):
        pool = matching(found[1])
        (one,) = [o for o in pool if found[2] not in (o.colour, o.shape)]
        return one, pool
    if found := re.fullmatch(r"the (.+) with (.+)", text):
        pool = matching(found[1])
        (one,) = [o for o in pool if o.shape in {**CORNERS, **FEATURES}[found[2]]]
        return one, pool
    if found := re.fullmatch(r"the second (.+) from the (\w+)", text):
        pool = matching(found[1])
        places = sorted(pool, key=lambda o: -score(o, found[2]))
        assert min(score(a, found[2]) - score(b, found[2]) for a, b in itertools.pairwise(places[:3])) >= 10
        return places[1], pool
    if found := re.fullmatch(r"the (larger|smaller) of the two (.+)", text):
        pool = matching(found[2].removesuffix("es" if found[2].endswith("crosses") else "s"))
        assert len(pool) == 2
        return compared(pool, found[1] == "larger"), pool
    if found := re.fullmatch(r"the (largest|smallest) (.+)", text):
        pool = matching(found[2])
        return compared(pool, found[1] == "largest"), pool
    if found := re.fullmatch(r"the (left|right|top|bottom)most (.+)", text):
        pool = matching(found[2])
        return by_margin(pool, lambda o: score(o, found[1]), 10), pool
    if found := re.fullmatch(r"the nearest (.+) (left of|right of|above|below) the (.+)", text):
        (anchor,) = matching(found[3])
        pool = [o for o in matching(found[1]) if o is not anchor]
        ahead = [o for o in pool if score(o, SIDES[found[2]]) > score(anchor, SIDES[found[2]])]
        near = nearest_by_margin(ahead, anchor)
        assert score(near, SIDES[found[2]]) - score(anchor, SIDES[found[2]]) >= 10
        return near, pool
    if found := re.fullmatch(r"the (.+) (left of|right of|above|below) the (.+)", text):
        (anchor,) = matching(found[3])
        pool = [o for o in matching(found[1]) if o is not anchor]
        ahead = [o for o in pool if score(o, SIDES[found[2]]) > score(anchor, SIDES[found[2]])]
        assert len(ahead) == 1
        assert score(ahead[0], SIDES[found[2]]) - score(anchor, SIDES[found[2]]) >= 10
        return ahead[0], pool
    if found := re.fullmatch(r"the (.+) closest to the (.+)", text):
        (anchor,) = matching(found[2])
        pool = [o for o in matching(found[1]) if o is not anchor]
        return nearest_by_margin(pool, anchor), pool
    (one,) = matching(text.removeprefix("the "))
    return one, [one]


def compared(pool, large):
    ordered = sorted(pool, key=lambda o: o.radius, reverse=large)
    ratio = ordered[0].radius / ordered[1].radius
    assert max(ratio, 1 / ratio) >= 1.3
    return ordered[0]


def nearest_by_margin(pool, anchor):
    def gap(item):
        return math.dist((item.x, item.y), (anchor.x, anchor.y))

    near = sorted(pool, key=gap)
    assert len(near) == 1 or gap(near[1]) >= 1.3 * gap(near[0])
    return near[0]
