"""Texts of files that hold half of a character: refused by name, wherever an id, a kind, a name or a split is read."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import dataset_files as files
import numpy as np
import pytest
from junk_in_json import changed, coco, coco_texts, muse, places, reasonseg
from refer_files import ref, write_refer

import tokenprune as tp
from tokenprune.datasets.base import Dataset, Query, Scene
from tokenprune.datasets.files.dataset import FileDataset
from tokenprune.datasets.inspection import inspected
from tokenprune.datasets.validation import scenes_of
from tokenprune.errors import InputError, PluginError, TokenPruneError

pytest.importorskip("pycocotools")

HALF = "a\ud800"  # which JSON can write


def texts_of(dataset: str) -> list[str]:
    """What a dataset takes over from its files, and what it says."""
    try:
        data = tp.dataset(dataset)
    except TokenPruneError as error:
        return [str(error)]
    assert isinstance(data, FileDataset)
    found = [*data.splits, *data.kinds]
    for split in data.splits:
        walked = inspected(data, split)
        found += [*walked.kinds, *walked.warnings]
        found += [text for problem in walked.problems for text in (problem.scene, problem.message)]
        try:
            scenes = data.selected(split, None)
        except TokenPruneError as error:
            found.append(str(error))
            continue
        found += [text for scene in scenes for text in (scene.id, str(scene.image))]
        found += [text for scene in scenes for query in scene.queries for text in (query.id, query.text, query.kind)]
    return found


def check_all(dataset: str, file: Path, whole: Any, is_said: Callable[[Any], bool]) -> None:
    for place in places(whole):
        value = whole
        for key in place:
            value = value[key]
        if isinstance(value, str):
            file.write_text(json.dumps(changed(whole, place, HALF)))
            found = texts_of(dataset)
            for text in found:
                text.encode()
            if is_said(place):
                assert any("holds \\ud800 at character 1, half of a character" in text for text in found), place


@pytest.mark.parametrize(
    ("write", "read"),
    [
        (reasonseg, {"text", "label"}),
        (coco, {"file_name", "name"}),
        (coco_texts, {"file_name", "caption"}),
        (muse, {"file_name", "coco_url", "questions"}),
    ],
)
def test_halves_of_characters_in_json(tmp_path: Path, write: Any, read: set[str]) -> None:
    dataset, file = write(tmp_path)
    whole = json.loads(file.read_text())
    check_all(dataset, file, whole, lambda place: read & {*place} and "ann_list" not in place)


def test_halves_of_characters_in_ids(tmp_path: Path) -> None:
    for key in ("images", "annotations"):
        _, file = coco(tmp_path)
        found = json.loads(file.read_text())
        found[key][0]["id"] = HALF
        file.write_text(json.dumps(found))
        said = texts_of(f"coco:{file}")
        assert any("has 'id' 'a\\ud800', which holds \\ud800 at character 1" in text for text in said)
        for text in said:
            text.encode()


@pytest.mark.parametrize("column", ["image", "mask", "query", "kind", "id", "split"])
def test_halves_of_characters_in_a_table(tmp_path: Path, column: str) -> None:
    row = {"image": "images/a.jpg", "mask": "masks/left.png", "query": "left", "kind": "k", "id": "1", "split": "val"}
    table = files.folder(tmp_path, "queries.jsonl") / "queries.jsonl"
    table.write_text(json.dumps(row) + "\n" + json.dumps(row | {"id": "2"} | {column: HALF}) + "\n")
    with pytest.raises(InputError, match=rf"line 2: {column} 'a.ud800' holds .ud800 at character 1"):
        tp.dataset(f"folder:{tmp_path}")


@pytest.mark.parametrize("field", ["ref_id", "split", "image_id", "ann_id"])
def test_halves_of_characters_in_references(tmp_path: Path, field: str) -> None:
    write_refer(tmp_path)
    references = [ref(0, 101, "val", "a") | {field: HALF}]
    (tmp_path / "refcoco" / "refs(unc).p").write_bytes(pickle.dumps(references))
    with pytest.raises(InputError, match=rf"reference 0: '{field}' 'a.ud800' holds .ud800 at character 1"):
        list(tp.dataset(f"refcoco:{tmp_path}").scenes("val"))


def test_halves_of_characters_in_instances(tmp_path: Path) -> None:
    file = write_refer(tmp_path) / "refcoco" / "instances.json"
    found = json.loads(file.read_text())
    found["images"][0]["file_name"] = HALF
    file.write_text(json.dumps(found))
    with pytest.raises(InputError, match=r"images 0: 'file_name' 'a.ud800' holds .ud800 at character 1"):
        list(tp.dataset(f"refcoco:{tmp_path}").scenes("val"))


@pytest.mark.filterwarnings("ignore::tokenprune.errors.DataWarning")
def test_a_name_of_a_file_that_is_no_text(tmp_path: Path) -> None:
    root = files.reasonseg(tmp_path)
    try:
        (root / "val" / "a-plain.jpg").rename(root / "val" / "\udcff.jpg")
        (root / "val" / "a-plain.json").rename(root / "val" / "\udcff.json")
    except OSError:
        pytest.skip("this file system has names of Unicode alone")
    with pytest.raises(InputError, match=r"the name of '.*udcff.jpg' holds .udcff at character 0"):
        list(tp.dataset(f"reasonseg:{root}").scenes("val"))
    for text in texts_of(f"reasonseg:{root},missing=skip"):
        text.encode()


def test_a_dataset_of_a_plugin_with_halves_of_characters() -> None:
    class Data(Dataset):
        name, splits, kinds = "halves", ("val",), ("thing",)
        scene, query = "a", "b"

        def scenes(self, split: str, limit: int | None = None, seed: int = 0) -> Any:
            image, mask = np.zeros((4, 5, 3), dtype=np.uint8), np.ones((4, 5), dtype=np.bool_)
            yield Scene(self.scene, image, [Query("it", "thing", mask, id=self.query)])

    assert len(list(scenes_of(Data(), "val", 1, 0))) == 1
    for name, said in (("scene", "an id that holds"), ("query", "a query whose id 'a.ud800' holds")):
        data = Data()
        setattr(data, name, HALF)
        with pytest.raises(PluginError, match=said) as told:
            list(scenes_of(data, "val", 1, 0))
        str(told.value).encode()
