"""ReasonSeg: files as the authors give them, drawn as their code draws them or as polygons are drawn elsewhere."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import dataset_files as files
import numpy as np
import pytest
from dataset_files import BIG, INSIDE, SMALL, filled, reasonseg, reasonseg_entry, shape

import tokenprune as tp
from tokenprune.datasets.base import Query, Scene
from tokenprune.errors import DataWarning, InputError, OptionError, TokenPruneError, UnknownNameError
from tokenprune.testing.dataset_conformance import DatasetConformance
from tokenprune.utils.masks import foreground, ignored

pytest.importorskip("pycocotools")


class TestConformance(DatasetConformance):
    @pytest.fixture(autouse=True)
    def _written(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(type(self), "dataset", f"reasonseg:{reasonseg(tmp_path)}")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return reasonseg(tmp_path)


def scenes(path: Path, split: str = "val", **options: Any) -> list[Scene]:
    return list(tp.dataset(f"reasonseg:{path}", **options).scenes(split))


def by_id(found: list[Scene]) -> dict[str, Query]:
    return {query.id: query for scene in found for query in scene.queries}


def test_targets_are_what_the_shapes_say(root: Path) -> None:
    found = by_id(scenes(root))
    nothing = filled()
    expected = {
        "a-plain": (filled(BIG), nothing),
        "b-old-encoding": (filled(SMALL), nothing),
        "c-in-each-other": (filled(BIG) & ~filled(SMALL) | filled(INSIDE), filled(SMALL) & ~filled(INSIDE)),
        # of two equal shapes the one that the file names first is drawn last, as in the original code
        "d-all-ignored": (filled(INSIDE), filled(SMALL) & ~filled(INSIDE)),
        "e-nothing": (nothing, nothing),
        "f-two": (filled(SMALL, (20, 15, 25, 28)), nothing),
    }
    assert list(found) == list(expected)
    for id, (target, void) in expected.items():
        assert np.array_equal(foreground(found[id].mask), target), id
        assert np.array_equal(ignored(found[id].mask), void), id


def test_a_target_that_is_ignored_as_a_whole(tmp_path: Path) -> None:
    reasonseg_entry(tmp_path / "val", "x", [shape("target", SMALL), shape("ignore", INSIDE), shape("ignore", SMALL)])
    (tmp_path / "val" / "x.json").write_text(
        json.dumps({"text": ["x"], "is_sentence": True, "shapes": [shape("ignore", SMALL), shape("target", SMALL)]})
    )
    (query,) = by_id(scenes(tmp_path)).values()
    assert not foreground(query.mask).any()
    assert np.array_equal(ignored(query.mask), filled(SMALL))
    shown = tp.compare("lisa-tiny", tp.dataset(f"reasonseg:{tmp_path}"), ["none"], limit=1, timing_samples=0)
    assert shown.samples == 1


def test_texts_kinds_and_turned_images(root: Path) -> None:
    found = scenes(root)
    queries = by_id(found)
    assert queries["b-old-encoding"].text == "something that protects from the rain – “where is it?”"
    assert [(query.kind, query.is_sentence) for query in queries.values()][1:3] == [("long", True), ("short", False)]
    assert {scene.image.shape for scene in found} == {(files.HEIGHT, files.WIDTH, 3)}
    assert list(tp.dataset(f"reasonseg:{root}").splits) == ["val", "test"]


def test_all_texts(root: Path) -> None:
    found = scenes(root, texts="all")
    assert [query.id for query in found[0].queries] == ["a-plain#1", "a-plain#2"]
    assert [query.text for query in found[0].queries][1] == "the umbrella, said otherwise"
    assert [len(scene.queries) for scene in found] == [2, 1, 1, 1, 1, 1]


@pytest.mark.parametrize("below", ["", "..", "../.."])
def test_the_folder_above_is_found_from(tmp_path: Path, below: str) -> None:
    root = reasonseg(tmp_path / "reason_seg")
    assert [scene.id for scene in scenes(root / below, "test")] == ["t"]


def test_faithful_is_the_drawing_of_the_original_code(tmp_path: Path) -> None:
    cv2 = pytest.importorskip("cv2")
    rng = np.random.default_rng(0)
    for number in range(12):
        shapes = []
        for label in rng.permutation(["target", "ignore", "target", "flag", "ignored area"]):
            points = rng.uniform(0, (files.WIDTH, files.HEIGHT), (rng.integers(1, 7), 2)).tolist()
            shapes.append({"label": str(label), "points": points})
        reasonseg_entry(tmp_path / "val", f"{number:02d}", shapes)
    for scene in scenes(tmp_path, faithful=True):
        record = json.loads((tmp_path / "val" / f"{scene.id}.json").read_text())
        areas = []
        for one in record["shapes"]:
            area = np.zeros((files.HEIGHT, files.WIDTH), np.uint8)
            points = np.array([one["points"]], dtype=np.int32)
            cv2.polylines(area, points, True, 1, 1)
            cv2.fillPoly(area, points, 1)
            if one["label"] != "flag":
                areas.append((int(area.sum()), area > 0, 255 if "ignore" in one["label"] else 1))
        expected = np.zeros((files.HEIGHT, files.WIDTH), np.uint8)
        areas.reverse()  # of equal ones the last is drawn first
        for _, area, value in sorted(areas, key=lambda one: -one[0]):
            expected[area] = value
        mask = scene.queries[0].mask
        assert np.array_equal(foreground(mask), expected == 1)
        assert np.array_equal(ignored(mask), expected == 255)


def test_faithful_is_a_pixel_fatter(root: Path) -> None:
    pytest.importorskip("cv2")
    x0, y0, x1, y1 = BIG
    mask = by_id(scenes(root, faithful=True))["a-plain"].mask
    assert np.array_equal(mask, filled((x0, y0, x1 + 1, y1 + 1)))


def test_missing_images_and_annotations_are_told_together(root: Path) -> None:
    (root / "val" / "a-plain.jpg").unlink()
    (root / "val" / "f-two.json").unlink()
    (root / "val" / "._f-two.json").write_bytes(b"\x00")  # as archives from another system leave them
    with pytest.raises(InputError) as told:
        scenes(root)
    assert "1 of 6 images, of 1 queries, are missing: " in str(told.value)
    assert "a-plain.jpg'" not in str(told.value).split("; ")[1]
    assert "1 masks or annotations are missing: " in str(told.value)
    assert "f-two.json" in str(told.value)
    with pytest.warns(DataWarning, match="their queries are left out"):
        assert len(scenes(root, missing="skip")) == 4


DAMAGED: list[tuple[Any, str]] = [
    (b'{"text": [', r"bad\.json', line 1: not JSON \(.*\); repair the line"),
    (b"\x81\x8d", r"bad\.json', line 1: no text in utf-8 or cp1252; save the file as UTF-8"),
    ({"text": ["x"], "is_sentence": True}, "bad.json' has no 'shapes'; found 'text', 'is_sentence'"),
    ({"text": "x", "is_sentence": True, "shapes": []}, "has 'text' 'x', expected a list"),
    ({"text": [], "is_sentence": True, "shapes": []}, "has an empty list 'text', expected at least one"),
    ({"text": [" "], "is_sentence": True, "shapes": []}, "a text is ' ', expected words"),
    ({"text": ["x"], "is_sentence": 1, "shapes": []}, "has 'is_sentence' 1, expected true or false"),
    ({"text": ["x"], "is_sentence": True, "shapes": [3]}, "shape 1 is 3, expected an object with 'label'"),
    (
        {"text": ["x"], "is_sentence": True, "shapes": [{"label": "target", "points": []}]},
        r"shape 1 \('target'\) has no points; remove the shape",
    ),
    (
        {"text": ["x"], "is_sentence": True, "shapes": [{"label": "target", "points": [[1, None]]}]},
        r"has the point \[1, None\], expected \[x, y\] in pixels",
    ),
]


@pytest.mark.parametrize(("content", "message"), DAMAGED)
def test_damaged_annotations_are_refused_in_one_line(root: Path, content: Any, message: str) -> None:
    file = reasonseg_entry(root / "val", "bad", [])
    file.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    with pytest.raises(InputError, match=message) as told:
        scenes(root)
    assert "\n" not in str(told.value)
    assert str(told.value).startswith("dataset 'reasonseg', split 'val': ")


def test_a_line_is_no_area_unless_the_outline_is_drawn(root: Path) -> None:
    file = reasonseg_entry(root / "val", "0-line", [{"label": "target", "points": [[3, 4], [9, 4]]}])
    with pytest.raises(InputError, match=r"'0-line'.*at least three points; repair it, or take faithful=true"):
        scenes(root)
    pytest.importorskip("cv2")
    assert np.array_equal(scenes(root, faithful=True)[0].queries[0].mask, filled((3, 4, 10, 5)))
    assert file.is_file()


@pytest.mark.parametrize(
    ("path", "options", "split", "error", "message"),
    [
        ("nowhere", {}, "val", InputError, "nothing is at '.*nowhere'; check the path; expected a folder with train"),
        (".", {"texts": "last"}, "val", OptionError, "option 'texts'"),
        ("val", {}, "val", InputError, "no folder train, val or test is in '.*val'; give the folder above it, '.*Reas"),
        (".", {}, "train", UnknownNameError, "unknown split of dataset 'reasonseg' 'train'; .*known: val, test"),
        ("val/empty", {}, "val", InputError, "no folder train, val or test is in '.*empty'; expected a folder with"),
    ],
)
def test_mistakes(
    root: Path, path: str, options: dict[str, Any], split: str, error: type[TokenPruneError], message: str
) -> None:
    (root / "val" / "empty").mkdir()
    with pytest.raises(error, match=message):
        scenes(root / path, split, **options)


def test_without_what_draws(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cv2", None)
    with pytest.raises(
        InputError, match=r'OpenCV.* is not installed; .*"tokenprune-vlm\[data\]", or leave faithful out'
    ):
        scenes(root, faithful=True)
    monkeypatch.setitem(sys.modules, "pycocotools", None)
    with pytest.raises(InputError, match="pycocotools"):
        scenes(root)


@pytest.mark.parametrize("ending", ["JPG", "JSON"])
def test_two_files_of_one_name(tmp_path: Path, ending: str) -> None:
    root = files.reasonseg(tmp_path)
    name = f"a-plain.{ending.lower()}"
    other = root / "val" / f"a-plain.{ending}"
    other.write_bytes((root / "val" / name).read_bytes())
    if len(list((root / "val").glob("[aA]-plain.*"))) < 3:
        pytest.skip("this file system does not tell small letters from large")
    with pytest.raises(InputError, match=rf"val' has a-plain.{ending} and {name}; keep one of them"):
        list(tp.dataset(f"reasonseg:{root}").scenes("val"))
