"""The dataset `shapes`: every answer is derived again from the words and the objects, by the rules of a test helper."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from shapes_answers import answer

from tokenprune.datasets.shapes import HELD_OUT, KINDS, SIZES, Shapes, UnknownSplitError, draw
from tokenprune.errors import OptionError

FIRST = [
    "the green thing",
    "the topmost thing",
    "the triangle closest to the small green triangle",
    "the largest triangle",
    "the orange thing",
    "the leftmost small yellow thing",
    "the small yellow thing below the large orange thing",
    "the smallest diamond",
    "the blue thing",
    "the bottommost cross",
    "the small thing left of the large blue thing",
    "the only thing that shares its colour with no other",
]

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


def test_version_1_stays_what_published_results_stand_on() -> None:
    first = [query.text for scene in Shapes().scenes("test", limit=12) for query in scene.queries]
    assert first == FIRST
