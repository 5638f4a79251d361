"""Datasets in REFER's layout: what is listed, in which order, what the masks are, and what is refused."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from PIL import Image
from refer_files import (
    IMAGE_OF,
    PARTS,
    SIZES,
    annotation,
    annotations,
    box_mask,
    file_name,
    grefs,
    polygon,
    python2_pickle,
    ref,
    refs,
    write_refer,
)

import tokenprune as tp
from tokenprune.datasets.base import Query, Scene
from tokenprune.errors import DataWarning, InputError, OptionError, UnknownNameError
from tokenprune.evaluation import metrics
from tokenprune.testing.dataset_conformance import DatasetConformance

pytest.importorskip("pycocotools")
CLEF = "images/saiapr_tc-12"


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOKENPRUNE_CACHE", str(tmp_path / "cache"))


def queries(scenes: list[Scene]) -> dict[str, Query]:
    return {query.id: query for scene in scenes for query in scene.queries}


def read(name: str, split: str, **options: Any) -> list[Scene]:
    return list(tp.dataset(name, **options).scenes(split))


# what is listed ------------------------------------------------------------------------------------------------------


def test_scenes_are_images_with_all_their_sentences(tmp_path: Path) -> None:
    scenes = read(f"refcoco:{write_refer(tmp_path)}", "val", splitby="unc")
    assert [scene.id for scene in scenes] == ["581857", "12"]
    assert [[(query.id, query.text) for query in scene.queries] for scene in scenes] == [
        [("0", "the lady with the blue shirt"), ("1", "left one"), ("10", "right box")],
        [("30", "two boxes")],
    ]
    assert {(query.kind, query.is_sentence) for query in queries(scenes).values()} == {("phrase", False)}
    for scene in scenes:
        stored = Image.open(tmp_path / "images/mscoco/images/train2014" / file_name(int(scene.id)))
        assert np.array_equal(scene.image, np.asarray(stored.convert("RGB")))


@pytest.mark.parametrize(
    ("name", "splitby", "images_at"),
    [
        ("refcoco", "unc", "images/mscoco/images/train2014"),
        ("refcoco", "google", "train2014"),
        ("refcoco+", "unc", "images/train2014"),
        ("refcoco+", "google", "refcoco+/train2014"),
        ("refcocog", "umd", "images/mscoco/images/train2014"),
        ("refcocog", "google", "../train2014"),
        ("refclef", "unc", CLEF),
        ("refclef", "berkeley", f"refclef/{CLEF}"),
        ("grefcoco", "unc", "images/mscoco/images/train2014"),
    ],
)
@pytest.mark.parametrize("inside", [False, True], ids=["above", "own folder"])
def test_every_layout(tmp_path: Path, name: str, splitby: str, images_at: str, inside: bool) -> None:
    root = write_refer(tmp_path / "refer_seg", name, splitby, images_at=images_at)
    path = root / name if inside else root
    options = {} if name == "grefcoco" else {"splitby": splitby}
    data = tp.dataset(f"{name}:{path}", **options)
    several = name == "grefcoco"
    assert data.name == name
    assert data.splits == (("val", "testA", "testB") if several else ("train", "val", "testA"))
    asked = grefs() if several else refs()
    for split in data.splits:
        expected = [str(id) for one in asked if one["split"] == split for id in one["sent_ids"]]
        assert sorted(queries(list(data.scenes(split)))) == sorted(expected)


def test_the_default_split_is_the_usual_one(tmp_path: Path) -> None:
    for name, splitby in {"refcoco": "unc", "refcoco+": "unc", "refcocog": "umd", "refclef": "unc"}.items():
        write_refer(tmp_path, name, splitby, images_at=CLEF if name == "refclef" else "train2014")
        assert tp.dataset(f"{name}:{tmp_path}").options.splitby == splitby  # type: ignore[attr-defined]


def test_images_may_be_elsewhere(tmp_path: Path) -> None:
    root = write_refer(tmp_path / "seg", images_at="../elsewhere")
    with pytest.raises(InputError, match=r"no folder of images found; .*give it with the option images"):
        read(f"refcoco:{root}", "val")
    assert len(read(f"refcoco:{root},images={tmp_path / 'elsewhere'}", "val")) == 2
    with pytest.raises(InputError, match="option images is '/no/where', where no folder is"):
        read(f"refcoco:{root}", "val", images="/no/where")


def test_splits_of_several_letters_belong_to_each(tmp_path: Path) -> None:
    """REFER takes a reference of testAB, which refclef has, for testA and for testB."""
    asked = [ref(0, 101, "testA", "a"), ref(1, 102, "testAB", "b"), ref(2, 103, "test", "c"), ref(3, 104, "odd", "d")]
    data = tp.dataset(f"refclef:{write_refer(tmp_path, 'refclef', references=asked, images_at=CLEF)}")
    assert data.splits == ("test", "testA", "testB", "odd", "testAB")
    found = {split: list(queries(list(data.scenes(split)))) for split in data.splits}
    assert found == {"test": ["20"], "testA": ["0", "10"], "testB": ["10"], "odd": ["30"], "testAB": ["10"]}


def test_ids_are_unique(tmp_path: Path) -> None:
    asked = [ref(0, 101, "val", "a"), ref(1, 102, "val", "b", "c")]
    asked[1]["sentences"][0]["sent_id"] = 0
    assert list(queries(read(f"refcoco:{write_refer(tmp_path, references=asked)}", "val"))) == ["0-0", "1-0", "11"]


# masks ---------------------------------------------------------------------------------------------------------------


def original_counts(prediction: np.ndarray, covered: np.ndarray) -> tuple[int, int]:
    """Intersection and union of class 1 as the original evaluations count them, from how many parts cover a pixel."""
    target = covered.astype(np.uint8).ravel()
    output = np.where(target == 255, 255, prediction.astype(np.uint8).ravel())

    def of_class_1(values: np.ndarray) -> int:
        return int(np.histogram(values, bins=2, range=(0, 1))[0][1])  # values outside 0…1 are in no bin

    shared = of_class_1(output[output == target])
    return shared, of_class_1(output) + of_class_1(target) - shared


def test_masks_are_those_of_the_boxes(tmp_path: Path) -> None:
    coder = pytest.importorskip("pycocotools.mask")
    data = tp.dataset(f"refcoco:{write_refer(tmp_path)}")
    of_sentence = {str(sent): one["ann_id"] for one in refs() for sent in one["sent_ids"]}
    segmentation = {one["id"]: one["segmentation"] for one in annotations()}
    compared = 0
    for split in data.splits:
        for id, query in queries(list(data.scenes(split))).items():
            ann = of_sentence[id]
            size = SIZES[IMAGE_OF[ann]]
            assert query.mask.dtype == np.bool_
            assert np.array_equal(query.mask, box_mask(PARTS[ann], size) > 0)
            if ann < 106:
                assert np.array_equal(
                    query.mask, coder.decode(coder.merge(coder.frPyObjects(segmentation[ann], *size)))
                )
            compared += 1
    assert compared == 9


def test_crowds_are_drawn(tmp_path: Path) -> None:
    root = write_refer(tmp_path, references=[ref(0, 107, "val", "people")])
    assert np.array_equal(read(f"refcoco:{root}", "val")[0].queries[0].mask, box_mask(PARTS[107], SIZES[7]) > 0)


def test_faithful_masks_count_as_the_originals(tmp_path: Path) -> None:
    root = write_refer(tmp_path)
    covered = box_mask(PARTS[103], SIZES[12])
    assert covered.max() == 2
    mask = queries(read(f"refcoco:{root}", "val", faithful=True))["30"].mask
    united = queries(read(f"refcoco:{root}", "val"))["30"].mask
    rng = np.random.default_rng(0)
    predictions = [np.ones(covered.shape, bool), np.zeros(covered.shape, bool), covered > 0, covered == 2]
    predictions += [rng.random(covered.shape) < share for share in (0.1, 0.5, 0.9)]
    for prediction in predictions:
        assert metrics.overlap(prediction, mask) == original_counts(prediction, covered)
    assert metrics.overlap(covered > 0, united) == ((covered > 0).sum(),) * 2
    assert metrics.overlap(covered > 0, united) != metrics.overlap(covered > 0, mask)


@given(
    hnp.arrays(bool, (12, 12)),
    st.lists(st.tuples(*[st.integers(0, 5)] * 2, *[st.integers(6, 12)] * 2), min_size=1, max_size=6),
)
def test_faithful_masks_of_any_parts(prediction: np.ndarray, boxes: list[tuple[int, int, int, int]]) -> None:
    from tokenprune.datasets.files.refer.dataset import _one

    covered = box_mask(boxes, (12, 12))
    segmentation = [polygon(box) for box in boxes]
    assert metrics.overlap(prediction, _one(segmentation, True, 12, 12).mask) == original_counts(prediction, covered)
    assert np.array_equal(_one(segmentation, False, 12, 12).mask, covered > 0)


def test_annotations_without_segmentation(tmp_path: Path) -> None:
    found = [*annotations()[1:], annotation(101, [])]
    root = write_refer(tmp_path, found=found)
    said = r"2 queries cannot be used: sentences about an annotation without segmentation: 2 \(sentence 0, sentence 1\)"
    with pytest.raises(InputError, match=said):
        read(f"refcoco:{root}", "val")
    with pytest.warns(DataWarning, match=said):
        assert list(queries(read(f"refcoco:{root}", "val", missing="skip"))) == ["10", "30"]
    empty = queries(read(f"refcoco:{root}", "val", faithful=True))["0"]
    assert not empty.mask.any()


# gRefCOCO ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["p", "json"])
def test_no_target_one_and_several(tmp_path: Path, form: str) -> None:
    root = write_refer(tmp_path, "grefcoco")
    if form == "json":
        (root / "grefcoco" / "grefs(unc).p").unlink()
        (root / "grefcoco" / "grefs(unc).json").write_text(json.dumps(grefs()))
    data = tp.dataset(f"grefcoco:{root}")
    found = {id: query for split in data.splits for id, query in queries(list(data.scenes(split))).items()}
    assert {id: (query.text, query.kind, len(query.targets)) for id, query in found.items()} == {
        "0": ("both people", "several targets", 2),
        "10": ("the elephant", "no target", 0),
        "20": ("two boxes", "one target", 1),
        "30": ("bar and crowd", "one target", 1),  # the crowd is left out
        "40": ("nobody", "no target", 0),
    }
    single = [box_mask(PARTS[id], SIZES[581857]) > 0 for id in (101, 102)]
    assert np.array_equal(np.array(found["0"].targets), np.array(single))
    assert np.array_equal(found["0"].mask, single[0] | single[1])
    assert found["10"].mask.shape == SIZES[581857]
    assert not found["10"].mask.any()
    assert np.array_equal(found["20"].mask, box_mask(PARTS[103], SIZES[12]) > 0)
    assert np.array_equal(found["30"].mask, box_mask(PARTS[105], SIZES[7]) > 0)


def test_it_has_no_options_of_the_others(tmp_path: Path) -> None:
    root = write_refer(tmp_path, "grefcoco")
    for option in ("faithful", "splitby"):
        with pytest.raises(OptionError, match=option):
            tp.dataset(f"grefcoco:{root}", **{option: "unc"})


@pytest.mark.parametrize(
    ("ann_id", "said"),
    [
        ([101, 999], r"refs whose annotation is not in instances.json: 1 \(ref 0\)"),
        ([101, -1], "refs whose annotation is not in instances.json: 1"),
        ([101, 103], "refs whose annotation belongs to another image: 1"),
    ],
)
def test_targets_that_are_not_there(tmp_path: Path, ann_id: list[int], said: str) -> None:
    asked = [ref(0, ann_id, "val", "a"), ref(1, None, "val", "no", image_id=7)]
    root = write_refer(tmp_path, "grefcoco", references=asked)
    with pytest.raises(InputError, match=said):
        read(f"grefcoco:{root}", "val")
    with pytest.warns(DataWarning, match=said):
        assert list(queries(read(f"grefcoco:{root}", "val", missing="skip"))) == ["10"]


def test_crowds_alone(tmp_path: Path) -> None:
    root = write_refer(tmp_path, "grefcoco", references=[ref(0, [107], "val", "people")])
    with pytest.raises(InputError, match=r"refs to crowds alone: 1 \(ref 0\)"):
        read(f"grefcoco:{root}", "val")


# what is missing or damaged ------------------------------------------------------------------------------------------


def test_all_that_is_wrong_is_told_at_once(tmp_path: Path) -> None:
    asked = [
        ref(0, 101, "val", "fine", "  "),
        *(ref(number, 900 + number, "val", "gone", "away", image_id=7) for number in range(1, 13)),
        ref(20, 101, "val", "of another image", image_id=7),
        ref(21, 101, "val", "unknown image", image_id=99),
        ref(22, 101, "val"),
        ref(23, 102, "testA", "all is well"),
    ]
    root = write_refer(tmp_path, references=asked)
    with pytest.raises(InputError) as told:
        read(f"refcoco:{root}", "val")
    message = str(told.value)
    assert "\n" not in message
    for part in (
        "dataset 'refcoco', split 'val': 27 queries cannot be used: ",
        "empty sentences: 1 (sentence 1 of ref 0)",
        "refs whose annotation is not in instances.json: 12 (ref 1, ref 2, ref 3, ref 4, ref 5, ref 6, ref 7, ref 8, "
        "ref 9, ref 10, … and 2 more)",
        "refs whose annotation belongs to another image: 1 (ref 20)",
        "refs whose image is not in instances.json: 1 (ref 21)",
        "refs without sentences: 1 (ref 22)",
        "; use files that belong together, or leave them out with the option missing=skip",
    ):
        assert part in message
    with pytest.warns(DataWarning) as warned:
        assert list(queries(read(f"refcoco:{root},missing=skip", "val"))) == ["0"]
    (warning,) = (warning for warning in warned if warning.category is DataWarning)
    assert str(warning.message) == message.replace(
        "; use files that belong together, or leave them out with the option missing=skip", "; they are left out"
    )
    assert Path(warning.filename).name == Path(__file__).name
    assert list(queries(read(f"refcoco:{root}", "testA"))) == ["230"]


def test_nothing_left_is_refused(tmp_path: Path) -> None:
    root = write_refer(tmp_path, references=[ref(0, 999, "val", "gone", image_id=7)])
    with pytest.raises(InputError, match="1 queries cannot be used"):
        read(f"refcoco:{root},missing=skip", "val")


def changed(**fields: Any) -> bytes:
    one = ref(0, 101, "val", "a") | fields
    return python2_pickle([{key: value for key, value in one.items() if value != "nothing"}])


def instances(*others: dict[str, Any], twice: Sequence[int] = (), **fields: Any) -> bytes:
    """instances.json with an image, others that differ from it so, and annotations of one id, about these images."""
    image = {"id": 5, "file_name": "a.jpg", "height": 40, "width": 60} | fields
    images = [image, *({**image, "file_name": "b.jpg"} | other for other in others)]
    return json.dumps({"images": images, "annotations": [{"id": 7, "image_id": one} for one in twice]}).encode()


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("refs(unc).p", None, r"no 'refs\(unc\).p' in '.*refcoco'; complete the folder"),
        ("instances.json", None, r"'.*instances.json': no such file; check the path"),
        ("refs(unc).p", python2_pickle({"a": 1}), r"holds \{'a': 1\}, expected a list of references"),
        ("refs(unc).p", python2_pickle([]), r"holds \[\], expected a list of references"),
        ("refs(unc).p", python2_pickle([5]), "reference 0 is 5, expected an object with ref_id, image_id, split"),
        ("refs(unc).p", changed(split="nothing"), "reference 0: 'split' is missing"),
        ("refs(unc).p", changed(ann_id=[101]), r"reference 0: 'ann_id' is \[101\]"),
        ("refs(unc).p", changed(sentences=[{"sent_id": 3}]), "reference 0: 'sent' is missing"),
        ("refs(unc).p", changed(sentences=[{"sent_id": True, "sent": "a"}]), "'sent_id' is True"),
        (
            "refs(unc).p",
            changed(sentences=[{"sent_id": 3, "sent": "a\ud800"}]),
            "'a.ud800' holds .ud800 at character 1",
        ),
        ("instances.json", b"[]", "has no list 'images'; expected images and annotations in COCO's form"),
        ("instances.json", b'{"images": [{"id": 5}], "annotations": []}', "images 0: 'file_name' is missing"),
        *(
            ("instances.json", instances(height=value), f"image 5 has 'height' {value!r}, expected a whole number of")
            for value in ("40", 40.5, 0, -3, True, float("inf"))
        ),
        ("instances.json", instances(height=None), "image 5 has 'height' None, expected a whole number of pixels"),
        ("instances.json", instances({"id": 5}), "images 1 has the id 5 of another entry; give an intact file"),
        ("instances.json", instances({"id": "5"}), "images 1 has the id '5' of another entry; give an intact file"),
        ("instances.json", instances(twice=[101, 102]), "annotations 1 has the id 7 of another entry; give an intact"),
        ("instances.json", b'{"images": [], "annotations": [[]]}', r"annotations 0 is \[\], expected an object"),
        ("instances.json", b'{"images": [', "instances.json', line 1: not JSON"),
        ("instances.json", b'{"images": "\xff"', "instances.json', line 1: no text in utf-8"),
        ("instances.json", b"[" * 200000, "instances.json': not annotations"),
    ],
)
def test_files_of_another_form_are_refused(tmp_path: Path, file: str, content: bytes | None, message: str) -> None:
    path = write_refer(tmp_path) / "refcoco" / file
    path.unlink()
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError, match=message) as told:
        tp.dataset(f"refcoco:{tmp_path}")
    assert "\n" not in str(told.value)


def test_entries_that_are_there_twice_are_one(tmp_path: Path) -> None:
    expected = queries(read(f"refcoco:{write_refer(tmp_path)}", "val"))
    file = tmp_path / "refcoco" / "instances.json"
    found = json.loads(file.read_text())
    for one in found["images"]:
        one["height"] = float(one["height"])
    file.write_text(json.dumps({key: value * 2 if key != "info" else value for key, value in found.items()}))
    assert queries(read(f"refcoco:{tmp_path}", "val")).keys() == expected.keys()


def test_mistakes_in_names(tmp_path: Path) -> None:
    root = write_refer(tmp_path, splitby="google")
    with pytest.raises(
        InputError, match=r"no 'refs\(unc\).p' in .* has 'refs\(google\).p'; choose with the option spl"
    ):
        tp.dataset(f"refcoco:{root}")
    with pytest.raises(InputError, match=r"dataset 'refcocog': neither .* nor .* has .*; give the folder that holds"):
        tp.dataset(f"refcocog:{root}")
    with pytest.raises(InputError, match=r"dataset 'refcoco': '.*' is the folder of 'refcoco\+'; name that dataset"):
        tp.dataset(f"refcoco:{write_refer(tmp_path, 'refcoco+') / 'refcoco+'}")
    with pytest.raises(OptionError, match="splitby"):
        tp.dataset(f"refcoco:{root},splitby=umd")
    with pytest.raises(UnknownNameError, match="unknown split of dataset 'refcoco' 'testC'; did you mean 'testA'"):
        read(f"refcoco:{root},splitby=google", "testC")


def test_a_missing_image_is_told(tmp_path: Path) -> None:
    root = write_refer(tmp_path)
    (root / "images/mscoco/images/train2014" / file_name(12)).unlink()
    data = tp.dataset(f"refcoco:{root}")
    with pytest.raises(InputError, match=r"1 of 2 images, of 1 queries, are missing: .*000000000012.jpg"):
        list(data.scenes("val"))


def test_listing_imports_no_torch(tmp_path: Path) -> None:
    write_refer(tmp_path)
    code = (
        "import sys, tokenprune as tp; data = tp.dataset(sys.argv[1]); "
        "print(data.splits, len(data.listed('val')), {'torch', 'pycocotools', 'cv2'} & set(sys.modules))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, f"refcoco:{tmp_path}"], capture_output=True, text=True, env=dict(os.environ)
    )
    assert done.stdout == "('train', 'val', 'testA') 2 set()\n", done.stderr


# real photographs ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("part", ["val2017", "train2017"])
def test_masks_of_real_annotations(tmp_path: Path, part: str, shared_data: Callable[[str], Path]) -> None:
    coder = pytest.importorskip("pycocotools.mask")
    folder = shared_data("coco")
    held = json.loads((folder / f"instances_{part}.json").read_text())
    asked = [
        ref(number, one["id"], "val", f"thing {number}", image_id=one["image_id"])
        for number, one in enumerate(held["annotations"])
    ]
    (tmp_path / "refcoco").mkdir()
    (tmp_path / "refcoco" / "refs(unc).p").write_bytes(python2_pickle(asked))
    (tmp_path / "refcoco" / "instances.json").write_text(json.dumps(held))
    scenes = read(f"refcoco:{tmp_path}", "val", images=str(folder / part))
    found = queries(scenes)
    sizes = {str(one["id"]): (one["height"], one["width"]) for one in held["images"]}
    assert {scene.id: scene.image.shape[:2] for scene in scenes} == {scene.id: sizes[scene.id] for scene in scenes}
    for number, one in enumerate(held["annotations"]):
        runs = coder.frPyObjects(one["segmentation"], *sizes[str(one["image_id"])])
        assert np.array_equal(found[str(10 * number)].mask, coder.decode(coder.merge(runs)))
    assert len(found) == len(held["annotations"]) > 600


# the kit -------------------------------------------------------------------------------------------------------------


class OverFiles(DatasetConformance):
    """The kit for a dataset that is written first."""

    @pytest.fixture(autouse=True)
    def _files(self, tmp_path: Path) -> None:
        name = type(self).__doc__ or ""
        images_at = CLEF if name == "refclef" else "train2014"
        write_refer(tmp_path, name, "umd" if name == "refcocog" else "unc", images_at=images_at)
        self.dataset = f"{name}:{tmp_path}"  # type: ignore[misc]


class TestRefCOCO(OverFiles):
    """refcoco"""


class TestRefCOCOPlus(OverFiles):
    """refcoco+"""


class TestRefCOCOg(OverFiles):
    """refcocog"""


class TestRefCLEF(OverFiles):
    """refclef"""


class TestGRefCOCO(OverFiles):
    """grefcoco"""
