"""MUSE: questions with several targets, images of three subsets of COCO."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from dataset_files import LEFT, RIGHT, filled, muse

import tokenprune as tp
from tokenprune.datasets.base import Scene
from tokenprune.errors import InputError, UnknownNameError
from tokenprune.testing.dataset_conformance import DatasetConformance

pytest.importorskip("pycocotools")


class TestConformance(DatasetConformance):
    @pytest.fixture(autouse=True)
    def _written(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(type(self), "dataset", f"muse:{muse(tmp_path)}")


def scenes(path: Path, split: str = "val", **options: Any) -> list[Scene]:
    return list(tp.dataset(f"muse:{path}", **options).scenes(split))


def test_questions_are_queries_with_targets(tmp_path: Path) -> None:
    found = scenes(muse(tmp_path))
    assert [scene.id for scene in found] == ["0-COCO_train2014_000000000001", "1-000000000002", "2-000000000003"]
    queries = [query for scene in found for query in scene.queries]
    assert [(query.id, query.text, query.kind, len(query.targets), query.is_sentence) for query in queries] == [
        ("0-0", "What could one sit on?", "single", 0, True),
        ("0-1", "What are the two?", "multiple", 2, True),
        ("1-0", "Which one?", "single", 0, True),
        ("2-0", "Any cat?", "none", 0, True),
    ]
    first, second = filled(LEFT, (8, 8, 15, 15)), filled(RIGHT)
    for query, mask in zip(queries, (first, first | second, second, filled()), strict=True):
        assert np.array_equal(query.mask, mask)
    assert [np.array_equal(*pair) for pair in zip(queries[1].targets, (first, second), strict=True)] == [True, True]


def test_splits_are_the_files_that_are_there(tmp_path: Path) -> None:
    muse(tmp_path)
    (tmp_path / "muse_val.json").rename(tmp_path / "muse_test_many.json")
    assert tp.dataset(f"muse:{tmp_path}").splits == ("test_many",)
    assert len(scenes(tmp_path, "test_many")) == 3
    with pytest.raises(UnknownNameError, match="known: test_many"):
        scenes(tmp_path)


@pytest.mark.parametrize("place", ["images/mscoco/images", "images", ".", "../elsewhere"])
def test_images_are_looked_for_beside_the_files(tmp_path: Path, place: str) -> None:
    root = muse(tmp_path / "data")
    target = root / place
    target.mkdir(parents=True, exist_ok=True)
    for subset in list((root / "refer_seg/images/mscoco/images").iterdir()):
        subset.rename(target / subset.name)
    options = {"images": str(target)} if ".." in place else {}
    assert len(scenes(root, **options)) == 3


def test_missing_images(tmp_path: Path) -> None:
    muse(tmp_path).joinpath("refer_seg").rename(tmp_path / "away")
    said = r"3 of 3 images, of 4 queries, are missing: .*refer_seg/.*give its place with the option images"
    with pytest.raises(InputError, match=said):
        scenes(tmp_path)
    with pytest.raises(InputError, match="images '/no/where' is not a folder"):
        scenes(tmp_path, images="/no/where")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda all: all[0].pop("height"), "muse_val.json', entry 0 has no 'height'"),
        (lambda all: all[0]["questions"].pop(), "entry 0 has 1 questions and 2 answers, expected as many"),
        (lambda all: all[0].update(answers=[3, []]), "entry 0, question 0: its answer is 3, expected a list"),
        (lambda all: all[0].update(questions=["", "x"]), "entry 0, question 0 is '', expected words"),
        (lambda all: all[0]["answers"][1][1].pop("segmentation"), "entry 0, question 1 has no 'segmentation'"),
        (lambda all: all[1].pop("coco_url"), "entry 1 has no 'coco_url'"),
        (lambda all: all[1].update(coco_url="x.jpg"), "entry 1 has coco_url 'x.jpg', expected …/train2017/NAME"),
        (lambda all: all.insert(0, 3), "entry 0 is 3, expected an object with 'height'"),
        (lambda all: all.clear(), "is not a list of images; get the file again"),
        (lambda all: all[1].update(height=31), "is 40×30, but its annotations are made for 40×31"),
        (
            lambda all: all[0]["answers"][1][1].update(segmentation=[[1, 2]]),
            "query '0-1': object 1 of its answer: polygon .* at least three points",
        ),
    ],
)
def test_damaged_files_are_refused(tmp_path: Path, change: Callable[[Any], Any], message: str) -> None:
    file = muse(tmp_path) / "muse_val.json"
    found = json.loads(file.read_text())
    change(found)
    file.write_text(json.dumps(found))
    with pytest.raises(InputError, match=message) as told:
        scenes(tmp_path)
    assert "\n" not in str(told.value)


def test_mistakes(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no file of MUSE is in .*; expected a folder with muse_val\.json, "):
        scenes(tmp_path)
