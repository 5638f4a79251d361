"""The dataset `shapes-2`: one answer each, and in relations the anchor decides. The right answers are a helper's."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from shapes_answers import SIDES, answer, fits, score

import tokenprune as tp
from tokenprune.datasets.shapes import COLOURS, KINDS, SHAPES, SIZES, Shapes, Shapes2, draw
from tokenprune.datasets.shapes.queries import forms, sample

RELATION = re.compile(
    r"(?P<words>the (?:nearest (?P<what>.+) (?P<side>left of|right of|above|below)|.+ closest to) the) (?P<name>.+)"
)
OPPOSITES = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
scenes = st.tuples(st.sampled_from(Shapes2.splits), st.integers(0, 3), st.integers(0, 10_000))


@pytest.fixture(scope="module")
def drawn() -> list[Any]:
    return [draw("val", 4, index, version=2) for index in range(60)]


def answered(text, objects):
    """The answer, or None where the words mean no object or it is a close call."""
    try:
        return answer(text, objects)[0]
    except (AssertionError, ValueError, IndexError):
        return None


def names(item, objects):
    """Every way to name an object by size, colour and shape that fits no other object."""
    found = []
    for size in ("", item.size):
        for colour in ("", item.colour):
            for shape in ("thing", item.shape):
                name = " ".join(word for word in (size, colour, shape) if word)
                if [o for o in objects if fits(name, o)] == [item]:
                    found.append(name)
    return found


@settings(max_examples=25, deadline=None)
@given(scenes)
def test_every_query_has_one_answer(where):
    scene, queries = draw(*where, version=2)
    for kind, (text, item) in queries:
        expected, stated = answer(text, scene.objects)
        assert expected == item, text
        assert kind == "attribute" or len(stated) >= 2, text


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000), st.sampled_from(["closest", "side"]))
def test_another_anchor_means_another_object(index, form):
    scene, _ = draw("train", 5, index, version=2)
    for text, item in some(forms(2)[form](scene.objects)):
        found = RELATION.fullmatch(text)
        assert found, text
        others = [names(o, scene.objects) for o in scene.objects if not fits(found["name"], o)]
        answers = [answered(f"{found['words']} {named[0]}", scene.objects) for named in others if named]
        assert any(other not in (None, item) for other in answers), text


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000))
def test_the_opposite_side_means_another_object(index):
    scene, _ = draw("train", 6, index, version=2)
    for text, item in some(forms(2)["side"](scene.objects)):
        word = RELATION.fullmatch(text)["side"]
        other = answered(text.replace(f" {word} ", f" {OPPOSITES[word]} "), scene.objects)
        assert other not in (None, item), text


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000), st.sampled_from(["closest", "side"]))
def test_who_ignores_the_anchor_is_right_in_half_of_the_cases_at_most(index, form):
    scene, _ = draw("train", 7, index, version=2)
    chances: dict[str, Counter[int]] = defaultdict(Counter)
    for chance, text, item in with_chances(forms(2)[form](scene.objects), Fraction(1)):
        chances[RELATION.fullmatch(text)["words"]][item.label] += chance
    for words, answers in chances.items():
        assert max(answers.values()) <= answers.total() / 2, words
    assert sum(answers.total() for answers in chances.values()) in (0, 1)


def with_chances(queries, chance):
    """Every query of nested lists with the chance that it is drawn, if all entries of a list are equally likely."""
    if isinstance(queries, tuple):
        yield chance, *queries
    else:
        for entry in queries:
            yield from with_chances(entry, chance / len(queries))


def some(queries, count=8):
    """About `count` queries of nested lists, from all of them."""
    found = [(text, item) for _, text, item in with_chances(queries, Fraction(1))]
    return found[:: max(1, len(found) // count)]


def test_a_side_is_not_the_outermost(drawn):
    """What version 1 asks of a side is always the outermost object that fits; here that is often wrong."""
    right = []
    for scene, _ in drawn:
        for text, item in some(forms(2)["side"](scene.objects)):
            found = RELATION.fullmatch(text)
            outermost = max(
                (o for o in scene.objects if fits(found["what"], o)), key=lambda o: score(o, SIDES[found["side"]])
            )
            right.append(outermost is item)
    assert len(right) > 50
    assert sum(right) / len(right) < 0.65


def test_draws_follow_the_chances(drawn):
    queries = next(found for scene, _ in drawn if (found := forms(2)["closest"](scene.objects)))
    counts = Counter(sample(np.random.default_rng(i), queries, 1)[0][1].label for i in range(600))
    chances: Counter[int] = Counter()
    for chance, _, item in with_chances(queries, Fraction(1)):
        chances[item.label] += chance
    assert len(chances) > 1
    for label, chance in chances.items():
        assert abs(counts[label] / 600 - chance) < 0.1


def test_no_form_of_reasoning_is_rare(drawn):
    patterns = ("that is not", "largest|smallest|the two", " with (?!no other)", "shares its", "the second")
    texts = [text for _, queries in drawn for kind, (text, _) in queries if kind == "reasoning"]
    counts = {pattern: sum(bool(re.search(pattern, text)) for text in texts) for pattern in patterns}
    assert sum(counts.values()) == len(texts) >= 55
    assert min(counts.values()) >= 0.07 * len(texts), counts


def test_its_scenes_are_those_of_version_1_under_other_names():
    one, two = (list(data.scenes("val", limit=40)) for data in (Shapes(), tp.dataset("shapes-2")))
    assert [scene.id for scene in one][:2] == ["shapes-val-0-0", "shapes-val-0-1"]
    assert [scene.id for scene in two][:2] == ["shapes-2-val-0-0", "shapes-2-val-0-1"]
    assert all((a.image == b.image).all() for a, b in zip(one, two, strict=False))
    assert [q.text for s in one for q in s.queries] != [q.text for s in two for q in s.queries]
    assert {query.kind for scene in two for query in scene.queries} == set(KINDS) == set(Shapes2.kinds)
    again = list(Shapes2().scenes("val", limit=40))
    assert [q.text for s in again for q in s.queries] == [q.text for s in two for q in s.queries]
    words = {word for scene in two for query in scene.queries for word in query.text.split()}
    assert words & set(COLOURS)
    assert words & set(SHAPES)
    assert words & set(SIZES)
