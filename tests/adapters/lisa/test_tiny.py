"""The bundled model on queries that it was not trained on: it sees, and it is blind without image tokens."""

from __future__ import annotations

from pathlib import Path

import pytest

import tokenprune as tp
from tokenprune.datasets.shapes import Shapes
from tokenprune_adapters.bundled import lisa_tiny


@pytest.fixture(scope="module")
def model():
    return tp.load("lisa-tiny")


def giou(model, strategy=None):
    scores = []
    for scene in Shapes().scenes("test", limit=48, seed=5):
        masks = model.segment(scene.image, [query.text for query in scene.queries], strategy=strategy).masks.numpy()
        for query, mask in zip(scene.queries, masks, strict=True):
            scores.append((mask & query.mask).sum() / ((mask | query.mask).sum() + 1e-5))
    return sum(scores) / len(scores)


def test_finds_what_is_asked_for_and_only_by_seeing(model):
    assert giou(model) > 0.7
    assert giou(model, tp.strategy("blind")) < 0.1


def test_writes_its_answer_itself(model):
    scene = next(Shapes().scenes("test", limit=1, seed=5))
    result = model.segment(scene.image, scene.queries[0].text, answer="generate")
    assert result.text.replace(" ", "") == "[SEG]."
    assert result.masks.shape == (1, 256, 256)


def test_is_small_enough_to_be_shipped():
    folder = Path(lisa_tiny())
    assert sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) <= 25 * 2**20
