"""The dataset `shapes`: every answer is derived again from the words and the objects, by rules of this file alone."""

from __future__ import annotations

import itertools
import math
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenprune.datasets.shapes import COLOURS, HELD_OUT, KINDS, SHAPES, SIZES, Shapes, UnknownSplitError, draw
from tokenprune.errors import OptionError

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
        near = sorted(pool, key=lambda o: math.dist((o.x, o.y), (anchor.x, anchor.y)))
        gaps = [math.dist((o.x, o.y), (anchor.x, anchor.y)) for o in near]
        assert gaps[1] >= 1.3 * gaps[0]
        return near[0], pool
    (one,) = matching(text.removeprefix("the "))
    return one, [one]


def compared(pool, large):
    ordered = sorted(pool, key=lambda o: o.radius, reverse=large)
    ratio = ordered[0].radius / ordered[1].radius
    assert max(ratio, 1 / ratio) >= 1.3
    return ordered[0]


scenes = st.tuples(st.sampled_from(Shapes.splits), st.integers(0, 3), st.integers(0, 10_000))


@settings(max_examples=60, deadline=None)
@given(scenes)
def test_every_answer_follows_from_words_and_objects(where):
    scene, queries = draw(*where)
    for kind, (text, item) in queries:
        expected, stated = answer(text, scene.objects)
        assert expected == item, text
        if kind != "attribute":
            assert len(stated) >= 2, text


@settings(max_examples=40, deadline=None)
@given(scenes)
def test_scene_holds_what_its_objects_say(where):
    scene, _ = draw(*where)
    assert scene.image.shape == (256, 256, 3)
    assert scene.image.dtype == np.uint8
    assert 5 <= len(scene.objects) <= 10
    assert set(np.unique(scene.labels)) == {0, *(o.label for o in scene.objects)}
    for item in scene.objects:
        rows, columns = np.nonzero(scene.labels == item.label)
        assert len(rows) == item.area > 50
        assert math.isclose(rows.mean(), item.y, abs_tol=1e-3)
        assert math.isclose(columns.mean(), item.x, abs_tol=1e-3)
        assert np.hypot(rows - item.y, columns - item.x).max() < 2 * item.radius
        low, high = SIZES[item.size]
        assert low <= item.radius <= high


@settings(max_examples=40, deadline=None)
@given(st.sampled_from(["train", "val", "test"]), st.integers(0, 10_000))
def test_held_out_pairs_only_in_their_split(split, index):
    pairs = {(o.colour, o.shape) for o in draw(split, 0, index)[0].objects}
    assert not pairs & HELD_OUT
    scene, queries = draw("heldout", 0, index)
    assert {(o.colour, o.shape) for o in scene.objects} & HELD_OUT
    assert all((item.colour, item.shape) in HELD_OUT for _, (_, item) in queries)


def test_splits_and_seeds_are_disjoint_and_deterministic():
    images = {}
    for split, seed, index in itertools.product(Shapes.splits, (0, 1), range(5)):
        first, second = draw(split, seed, index), draw(split, seed, index)
        assert (first[0].image == second[0].image).all()
        assert first[1] == second[1]
        images[first[0].image.tobytes()] = (split, seed, index)
    assert len(images) == len(Shapes.splits) * 10


def test_dataset_counts_queries_and_masks_are_the_objects():
    data = Shapes()
    found = list(data.scenes("val", limit=42, seed=3))
    queries = [query for scene in found for query in scene.queries]
    assert len(queries) == 42
    assert len({scene.id for scene in found}) == len(found)
    assert {query.kind for query in queries} == set(KINDS) == set(data.kinds)
    for scene in found:
        for query in scene.queries:
            assert query.mask.shape == scene.image.shape[:2]
            assert query.mask.dtype == bool
            assert query.mask.any()
            assert query.text == query.text.lower().strip()
            assert not query.is_sentence
    repeated = list(data.scenes("val", limit=42, seed=3))
    assert all((a.image == b.image).all() for a, b in zip(found, repeated, strict=True))


def test_unknown_split_names_the_splits():
    with pytest.raises(UnknownSplitError, match="heldout"):
        next(Shapes().scenes("validation"))


def test_more_queries_than_can_be_drawn_are_refused_at_once() -> None:
    with pytest.raises(OptionError, match="at most 20000 queries; 20001 were asked for"):
        next(Shapes().scenes("val", limit=20_001))
    assert next(Shapes().scenes("val", limit=20_000)).queries
