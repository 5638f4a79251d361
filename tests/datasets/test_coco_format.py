"""COCO's format: categories or texts as queries, crowds that do not count, masks as pycocotools draws them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import dataset_files as files
import numpy as np
import pytest
from dataset_files import CROWD, LEFT, RIGHT, SMALL, coco, coco_annotation, filled, polygon, runs

import tokenprune as tp
from tokenprune.datasets.base import Query, Scene
from tokenprune.errors import InputError, OptionError, TokenPruneError
from tokenprune.testing.dataset_conformance import DatasetConformance
from tokenprune.utils.masks import foreground, ignored

pytest.importorskip("pycocotools")


class TestConformance(DatasetConformance):
    @pytest.fixture(autouse=True)
    def _written(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(type(self), "dataset", f"coco:{coco(tmp_path)}")


def scenes(file: Path, **options: Any) -> list[Scene]:
    data = tp.dataset(f"coco:{file}", **options)
    return list(data.scenes(data.splits[0]))


def by_id(found: list[Scene]) -> dict[str, Query]:
    return {query.id: query for scene in found for query in scene.queries}


def test_categories_are_queries(tmp_path: Path) -> None:
    found = scenes(coco(tmp_path))
    assert [scene.id for scene in found] == ["1", "3"]  # image 2 has a crowd alone
    queries = by_id(found)
    assert {id: (query.text, query.kind) for id, query in queries.items()} == {
        "1-18": ("dog", "category"),
        "1-17": ("cat", "category"),
        "3-17": ("cat", "category"),
    }
    dogs = filled(LEFT, (12, 3, 14, 12), RIGHT)
    assert np.array_equal(foreground(queries["1-18"].mask), dogs)
    assert np.array_equal(ignored(queries["1-18"].mask), filled(CROWD) & ~dogs)
    assert [target.sum() for target in queries["1-18"].targets] == [filled(LEFT).sum() + 18, filled(RIGHT).sum()]
    assert np.array_equal(queries["1-17"].mask, filled((0, 20, 9, 30)))
    assert queries["1-17"].targets == ()


def test_masks_are_those_of_the_reference_implementation(tmp_path: Path) -> None:
    from pycocotools.coco import COCO

    rng = np.random.default_rng(1)
    annotations = []
    for number in range(30):
        points = rng.uniform(-3, 45, (int(rng.integers(3, 9)), 2)).round(2)
        parts = [points.ravel().tolist(), polygon((1, 1, 4, 9))] if number % 3 else runs(rng.random((30, 40)) < 0.4)
        annotations.append(coco_annotation(100 + number, 1 + number % 3, 17, parts, caption=f"thing {number}"))
    file = coco(tmp_path, annotations)
    reference = COCO(str(file))
    queries = by_id(scenes(file))
    assert len(queries) == 30
    for id, query in queries.items():
        assert np.array_equal(query.mask, reference.annToMask(reference.anns[int(id)]) > 0)


def texts(**fields: Any) -> list[dict[str, Any]]:
    return [
        coco_annotation(1, 1, 17, [polygon(LEFT)], **{key: value[0] for key, value in fields.items()}),
        coco_annotation(2, 1, 18, [polygon(RIGHT)], **{key: value[1] for key, value in fields.items()}),
    ]


@pytest.mark.parametrize("field", ["query", "caption", "ref"])
def test_texts_are_queries(tmp_path: Path, field: str) -> None:
    queries = by_id(scenes(coco(tmp_path, texts(**{field: ["left ", "right"]}))))
    assert [(id, query.text, query.kind, query.is_sentence) for id, query in queries.items()] == [
        ("1", "left", "text", False),
        ("2", "right", "text", False),
    ]
    assert np.array_equal(queries["2"].mask, filled(RIGHT))


def test_several_texts_and_sentences(tmp_path: Path) -> None:
    annotations = texts(queries=[["the left", "both"], ["both"]], is_sentence=[True, True])
    queries = by_id(scenes(coco(tmp_path, annotations)))
    assert {id: query.text for id, query in queries.items()} == {"1#1": "the left", "1#2": "both"}
    assert np.array_equal(queries["1#2"].mask, filled(LEFT, RIGHT))
    assert len(queries["1#2"].targets) == 2
    assert all(query.is_sentence for query in queries.values())


def test_a_crowd_with_the_text_does_not_count(tmp_path: Path) -> None:
    annotations = texts(ref=["dogs", "cats"])
    annotations.append(coco_annotation(3, 1, 17, runs(filled(CROWD)), iscrowd=1, ref="dogs"))
    annotations.append(coco_annotation(4, 1, 17, runs(filled(SMALL)), iscrowd=1))
    queries = by_id(scenes(coco(tmp_path, annotations)))
    assert np.array_equal(ignored(queries["1"].mask), filled(CROWD))
    assert not ignored(queries["2"].mask).any()


def test_which_texts_can_be_chosen(tmp_path: Path) -> None:
    file = coco(tmp_path, texts(caption=["a", "b"], note=["c", "d"]))
    assert [query.text for query in by_id(scenes(file, field="note")).values()] == ["c", "d"]
    assert [query.text for query in by_id(scenes(file, queries="category")).values()] == ["cat", "dog"]
    some = coco(tmp_path, texts(caption=["a", ""]), "some.json")
    with pytest.raises(
        InputError, match=r"1 of 2 annotations have no 'caption'; .*queries=text, or .*queries=category"
    ):
        scenes(some)
    assert list(by_id(scenes(some, queries="text"))) == ["1"]


@pytest.mark.parametrize(
    ("name", "options", "split"),
    [
        ("instances_val2017.json", {}, "val"),
        ("instances_train2017.json", {}, "train"),
        ("my-test.json", {}, "test"),
        ("dogs.json", {}, "val"),
        ("train_and_val.json", {}, "val"),
        ("dogs.json", {"split": "minival"}, "minival"),
    ],
)
def test_the_split_is_that_of_the_name(tmp_path: Path, name: str, options: dict[str, Any], split: str) -> None:
    assert tp.dataset(f"coco:{coco(tmp_path, name=name)}", **options).splits == (split,)


@pytest.mark.parametrize("place", ["", "images", "../images", "../val2017", "elsewhere"])
def test_images_are_looked_for_near_the_file(tmp_path: Path, place: str) -> None:
    folder = tmp_path / "annotations"
    file = coco(folder, name="instances_val2017.json")
    images = folder / "images"
    target = (folder / place).resolve()
    if target != images:
        target.mkdir(parents=True, exist_ok=True)
        for image in images.iterdir():
            image.rename(target / image.name)
    if place == "elsewhere":
        with pytest.raises(InputError, match=r"2 of 2 images, .*give its place with the option images, or leave"):
            scenes(file)
        assert len(list(tp.dataset(f"coco:{file},images={target}").scenes("val"))) == 2
    else:
        assert len(scenes(file)) == 2


def test_an_image_of_another_size(tmp_path: Path) -> None:
    file = coco(tmp_path)
    files.image(tmp_path / "images" / f"{3:012d}.jpg", width=20)
    with pytest.raises(InputError, match="is 20×30, but its annotations are made for 40×30"):
        scenes(file)


def of(change: Any) -> Any:
    """An annotation with this change, None for a field that is removed."""
    whole = {**coco_annotation(7, 1, 18, [polygon(LEFT)]), **change}
    return [{key: value for key, value in whole.items() if value is not None}]


@pytest.mark.parametrize(
    ("annotations", "options", "message"),
    [
        (of({"segmentation": [[1, 2, 3, 4]]}), {}, "'1', query '1-18': annotation 7: polygon .*at least three points"),
        (of({"segmentation": []}), {}, "annotation 7 has no 'segmentation'; boxes and captions alone give no target"),
        (of({"segmentation": {"size": [3, 3], "counts": [9]}}), {}, "annotation 7: run lengths for"),
        (of({"image_id": 99}), {}, "annotation 7 is about image 99, which is not among the images"),
        (of({"category_id": 99}), {}, "annotation 7 is of category 99, which is not among the categories"),
        (of({"category_id": None}), {}, "annotation 7 has no 'category_id'"),
        (of({"iscrowd": 5}), {}, "annotation 7 has 'iscrowd' 5, expected 0 or 1"),
        (of({"id": None}), {}, "annotation 0 has no 'id'"),
        (of({"id": [1]}), {}, r"annotation 0 has 'id' \[1\], expected a whole number or text"),
        (of({}) * 2, {}, r"annotation 7 is there 2 times; .*\(the first of 2 such problems: tokenprune data check\)"),
        (of({"caption": ["a", 3]}), {}, "annotation 7, its 'caption' is 3, expected words"),
        (
            of({"caption": "a", "ref": "b"}),
            {},
            "annotations have 'caption' and 'ref'; choose one with the option field",
        ),
        (of({}), {"queries": "text"}, "no annotation of .* has text in 'query' or 'queries' or 'caption'"),
        (of({}), {"field": "words"}, "no annotation of .* has text in 'words'"),
        (of({}), {"field": "words", "queries": "category"}, "field has no effect with queries=category"),
        (of({"iscrowd": 1}), {}, "no annotation of .* has a category and is no crowd, so there is no query"),
        (of({}), {"images": "/no/where"}, "images '/no/where' is not a folder; check the option"),
        ([3], {}, "annotation 0 is 3, expected an object with 'id'"),
    ],
)
def test_damaged_annotations_are_refused(
    tmp_path: Path, annotations: Any, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message) as told:
        scenes(coco(tmp_path, annotations), **options)
    assert "\n" not in str(told.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[]", r"is \[\], expected an object with 'images'"),
        ('{"images": []}', "has no 'annotations'; found 'images'"),
        ('{"images": [{"id": 1}], "annotations": []}', "image 0 has no 'file_name'"),
        ('{"images": [], "annotations": []}', "so there is no query"),
        ('{"images": [\n', "line 2: not JSON"),
        ("[" * 100_000, r"not annotations \(nested too deeply\)"),
        ("[" + "1" * 5000 + "]", "not annotations"),
    ],
)
def test_damaged_files_are_refused(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "x.json").write_text(content)
    with pytest.raises(InputError, match=message) as told:
        scenes(tmp_path / "x.json")
    assert "\n" not in str(told.value)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [({"queries": "all"}, OptionError, "queries"), ({"fields": "x"}, OptionError, "did you mean 'field'")],
)
def test_mistakes(tmp_path: Path, options: dict[str, Any], error: type[TokenPruneError], message: str) -> None:
    with pytest.raises(error, match=message):
        scenes(coco(tmp_path), **options)
    with pytest.raises(InputError, match="is a folder, expected a JSON file with images, annotations"):
        scenes(tmp_path)


def test_a_second_image_of_the_same_id(tmp_path: Path) -> None:
    file = coco(tmp_path)
    found = json.loads(file.read_text())
    found["images"].append(found["images"][0])
    file.write_text(json.dumps(found))
    with pytest.raises(InputError, match="image 3 has the id 1 of another image"):
        scenes(file)


@pytest.mark.parametrize(
    ("key", "said"),
    [("images", "image 3 has the id '1' of another image"), ("annotations", "annotation 11 is there 2 times")],
)
def test_a_number_and_its_text_are_one_id(tmp_path: Path, key: str, said: str) -> None:
    file = coco(tmp_path)
    found = json.loads(file.read_text())
    found[key].append({**found[key][0], "id": str(found[key][0]["id"])})
    file.write_text(json.dumps(found))
    with pytest.raises(InputError, match=said):
        scenes(file)


def test_a_second_category_of_the_same_id(tmp_path: Path) -> None:
    file = coco(tmp_path)
    found = json.loads(file.read_text())
    found["categories"].append({"id": 17, "name": "cow"})
    file.write_text(json.dumps(found))
    with pytest.raises(InputError, match="category 2 has the id 17 of another category; give each its own id"):
        scenes(file)


def with_size(root: Path, **sides: Any) -> Path:
    """A file whose image 3 has these sides; None for one that is left out."""
    file = coco(root)
    found = json.loads(file.read_text())
    changed = {**found["images"][2], **sides}
    found["images"][2] = {key: value for key, value in changed.items() if value is not None}
    file.write_text(json.dumps(found))
    return file


def test_whole_numbers_may_be_written_as_floats(tmp_path: Path) -> None:
    assert len(scenes(with_size(tmp_path, height=30.0, width=40.0))) == 2
    with pytest.raises(InputError, match="is 40×30, but its annotations are made for 40×31"):
        scenes(with_size(tmp_path, height=31.0))
    assert len(scenes(with_size(tmp_path, height=None, width=None))) == 2  # no size is stated


def test_the_frame_of_a_turned_image_is_that_of_its_size_in_floats(tmp_path: Path) -> None:
    """Annotated as it is stored, on its side: 30 wide, 40 high, which PIL turns to 40 × 30."""
    file = with_size(tmp_path, height=40.0, width=30.0)
    files.image(tmp_path / "images" / f"{3:012d}.jpg", form="turned")
    (scene,) = (scene for scene in scenes(file) if scene.id == "3")
    assert scene.image.shape[:2] == scene.queries[0].mask.shape == (40, 30)


@pytest.mark.parametrize("height", ["30", 30.5, 0, -30, True, [30], float("nan"), float("inf")])
def test_a_size_that_is_none_is_refused(tmp_path: Path, height: Any) -> None:
    with pytest.raises(InputError, match=r"image 3 has 'height' .*, expected a whole number of pixels; get the file"):
        scenes(with_size(tmp_path, height=height))


def test_half_a_size_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="image 3 has no 'height'"):
        scenes(with_size(tmp_path, height=None))


def test_hundreds_of_parts_over_a_pixel(tmp_path: Path) -> None:
    (query,) = by_id(scenes(coco(tmp_path, [coco_annotation(7, 1, 18, [polygon(LEFT)] * 256)]))).values()
    assert np.array_equal(query.mask, filled(LEFT))


def test_places_tell_an_object_from_the_others(tmp_path: Path) -> None:
    """One cat; three dogs, of which the middle one is the biggest; a speck of a bird; a crowd of dogs."""
    boxes = {11: (30, 20, 36, 26), 12: (0, 0, 6, 6), 13: (14, 2, 24, 14), 14: (33, 0, 39, 6), 15: (0, 27, 3, 30)}
    category = {11: 17, 15: 19}
    annotations = [coco_annotation(id, 1, category.get(id, 18), [polygon(box)]) for id, box in boxes.items()]
    annotations.append(coco_annotation(16, 1, 18, runs(filled((20, 0, 26, 4))), iscrowd=1))
    annotations += [
        coco_annotation(21, 2, 18, [polygon((0, 0, 8, 8))]),
        coco_annotation(22, 2, 18, [polygon((1, 1, 9, 9))]),
    ]
    file = coco(tmp_path, annotations)
    found = json.loads(file.read_text())
    found["categories"].append({"id": 19, "name": "bird"})
    file.write_text(json.dumps(found))
    queries = by_id(scenes(file, queries="places"))  # image 2: two dogs at the same place, of one size
    assert {id: (query.text, query.kind) for id, query in queries.items()} == {
        "11-class": ("the cat", "class"),
        "12-side": ("the dog on the left", "side"),
        "14-side": ("the dog on the right", "side"),
        "13-size": ("the biggest dog", "size"),
    }
    for id, query in queries.items():
        assert np.array_equal(foreground(query.mask), filled(boxes[int(id[:2])]))
        assert ignored(query.mask).any() == (query.text != "the cat")
        assert query.targets == ()


def test_places_that_cannot_be_told(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="field has no effect with queries=places; leave one out"):
        scenes(coco(tmp_path), queries="places", field="ref")
    with pytest.raises(InputError, match=r"no annotation of .* can be told from the others of its category"):
        scenes(coco(tmp_path, [coco_annotation(1, 1, 17, [polygon((0, 0, 2, 2))])]), queries="places")
    with pytest.raises(InputError, match="image 3 has no 'height'"):
        scenes(with_size(tmp_path, height=None, width=None), queries="places")
    with pytest.raises(InputError, match="annotation 7: polygon"):
        scenes(coco(tmp_path, [coco_annotation(7, 1, 18, [[0, 0, 4, 4]])]), queries="places")
