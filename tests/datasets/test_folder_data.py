"""A folder with queries.csv or queries.jsonl: rows, splits, masks, and every mistake with its line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from dataset_files import HEIGHT, LEFT, RIGHT, WIDTH, filled, folder, image
from PIL import Image

import tokenprune as tp
from tokenprune.datasets.base import Query, Scene
from tokenprune.errors import DataWarning, InputError, UnknownNameError
from tokenprune.testing.dataset_conformance import DatasetConformance
from tokenprune.utils.masks import foreground, ignored

TABLES = ["queries.csv", "queries.jsonl"]


class TestConformance(DatasetConformance):
    @pytest.fixture(autouse=True, params=TABLES)
    def _written(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
        monkeypatch.setattr(type(self), "dataset", f"folder:{folder(tmp_path, request.param)}")


def scenes(path: Path, split: str = "val", **options: Any) -> list[Scene]:
    return list(tp.dataset(f"folder:{path}", **options).scenes(split))


def queries(path: Path, split: str = "val", **options: Any) -> list[Query]:
    return [query for scene in scenes(path, split, **options) for query in scene.queries]


@pytest.mark.parametrize("table", TABLES)
def test_rows_are_queries(tmp_path: Path, table: str) -> None:
    data = tp.dataset(f"folder:{folder(tmp_path, table)}")
    assert (data.splits, data.kinds) == (("val", "test"), ("thing", "absent"))
    found = list(data.scenes("val"))
    assert [scene.id for scene in found] == ["images/a.jpg", "images/b.png"]
    assert {scene.image.shape for scene in found} == {(HEIGHT, WIDTH, 3)}
    assert [(query.id, query.text, query.kind, query.is_sentence) for scene in found for query in scene.queries] == [
        ("first", "the left, lower one", "thing", False),
        ("third", "Where would one\nsit?", "thing", True),
        ("second", 'a "red" dog', "absent", False),
    ]
    for query, rectangle in zip(queries(tmp_path), (LEFT, RIGHT, (0, 0, 0, 0)), strict=True):
        assert np.array_equal(query.mask, filled(rectangle))
    assert [query.text for query in queries(tmp_path, "test")] == ["der Stuhl, größer"]


def written(root: Path, text: str | bytes, name: str = "queries.csv") -> Path:
    folder(root)
    (root / "queries.csv").unlink()
    (root / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    return root


ROW = "images/a.jpg,masks/left.png,left\n"
HEAD = "image,mask,query\n"


def test_few_columns_are_enough(tmp_path: Path) -> None:
    root = written(tmp_path, f"query , mask,image\n\nleft,masks/left.png,images/a.jpg\n{','.join(['  '] * 3)}\n" * 1)
    data = tp.dataset(f"folder:{root}")
    assert (data.splits, data.kinds) == (("val",), ("query",))
    assert [(query.id, query.kind) for query in queries(root)] == [("images/a.jpg#1", "query")]
    lines = [json.dumps({"image": "images/a.jpg", "mask": "masks/left.png", "query": word, "id": 5}) for word in "x"]
    assert [query.id for query in queries(written(tmp_path / "other", "\n".join(lines), "queries.jsonl"))] == ["5"]


@pytest.mark.parametrize("table", TABLES)
def test_white_space_around_a_cell_means_nothing(tmp_path: Path, table: str) -> None:
    columns = ("image", "mask", "query", "kind", "split", "id", "is_sentence")
    rows = [
        ("images/a.jpg", "masks/left.png", "left", "thing", "val", "1", "true"),
        (" images/a.jpg\t", "masks/left.png ", " right", "thing ", "val\u00a0", " 2 ", " true "),
    ]
    lines = [",".join(columns), *(",".join(row) for row in rows)]
    if table.endswith("jsonl"):
        lines = [json.dumps({**dict(zip(columns, row, strict=True)), "is_sentence": True}) for row in rows]
    root = written(tmp_path, "\n".join(lines), table)
    data = tp.dataset(f"folder:{root}")
    assert (data.splits, data.kinds) == (("val",), ("thing",))
    (scene,) = data.scenes("val")
    assert scene.id == "images/a.jpg"
    found = [(query.id, query.text, query.kind, query.is_sentence) for query in scene.queries]
    assert found == [("1", "left", "thing", True), ("2", "right", "thing", True)]


def test_ids_that_differ_in_white_space_are_the_same(tmp_path: Path) -> None:
    text = "image,mask,query,id\n" + ROW.replace("\n", ",5\n") + ROW.replace("\n", ", 5\n")
    with pytest.raises(InputError, match="line 3: id '5' is that of line 2 too"):
        scenes(written(tmp_path, text))


@pytest.mark.parametrize("ending", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
def test_line_ends_and_marks(tmp_path: Path, ending: str, mark: bytes) -> None:
    root = written(tmp_path, mark + f"{HEAD}{ROW}{ROW}".replace("\n", ending).encode())
    assert [query.id for query in queries(root)] == ["images/a.jpg#1", "images/a.jpg#2"]


def test_white_may_mean_pixels_that_do_not_count(tmp_path: Path) -> None:
    root = written(tmp_path, HEAD + ROW)
    (query,) = queries(root, white="ignore")
    assert not foreground(query.mask).any()
    assert np.array_equal(ignored(query.mask), filled(LEFT))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"queries\.csv' has no queries; add a row for each"),
        (HEAD, "has no queries"),
        (ROW, "line 1: no column image, mask, query; found 'images/a.jpg', 'masks/left.png', 'left'; name image,"),
        ("image,mask\n" + ROW, "line 1: no column query; found 'image', 'mask'"),
        ("image;mask;query\n" + ROW, "line 1: ';' separates the columns, expected commas"),
        ("image,mask,query,splits\n", "line 1: unknown column 'splits'; did you mean 'split'[?] expected image, mask"),
        ("image,mask,query,query\n", "line 1: column 'query' is there 2 times; keep one"),
        (HEAD + ROW + "images/a.jpg,masks/left.png,left, lower\n", "line 3: 4 cells found, expected 3, .*in quotes"),
        (HEAD + ROW + 'images/a.jpg,masks/left.png,"left\n', r"line 3: not CSV \(.*\); close each quotation mark"),
        (HEAD + '"a\nb",c,"d" e\n', r"line 2: not CSV"),
        (HEAD.encode() + ROW.encode() + b"images/a.jpg,x,gr\xf6\xdfer\n", "line 3: no text in utf-8; save the file"),
        (HEAD.encode("utf-16"), "line 1: no text in utf-8, it is UTF-16; save the file as UTF-8"),
        (HEAD + "\n" + ROW.replace("left\n", " \n"), "line 3: query is '', expected words"),
        (HEAD + ROW.replace("images/a.jpg", ""), "line 2: image is empty, expected a path"),
        (HEAD + ROW.replace("masks/left.png", ""), "line 2: mask is empty, .*; a query without a target has a black"),
        (HEAD + ROW.replace("images/a.jpg", "../a.jpg"), "line 2: image '../a.jpg' leaves the folder; give a path in"),
        (HEAD + ROW.replace("masks/left.png", "/etc/x.png"), "line 2: mask '/etc/x.png' leaves the folder"),
        (HEAD + ROW.replace("images/a.jpg", "C:\\a.jpg"), "line 2: image .* leaves the folder"),
        ("image,mask,query,kind\n" + ROW.replace("\n", ",\n"), "line 2: kind is empty; give it in every row, or leave"),
        ("image,mask,query,split\n" + ROW.replace("\n", ", \n"), "line 2: split is empty"),
        ("image,mask,query,id\n" + ROW.replace("\n", ",5\n") * 2, "line 3: id '5' is that of line 2 too; give each"),
        ("image,mask,query,id\n" + ROW.replace("\n", ",\n"), "line 2: id '' is empty"),
        ("image,mask,query,is_sentence\n" + ROW.replace("\n", ",x\n"), "line 2: is_sentence is 'x', expected true or"),
        (
            HEAD + ROW.replace("masks/left.png", "images/a.jpg"),
            "'images/a.jpg', query 'images/a.jpg#1': mask .* colours",
        ),
    ],
)
def test_mistakes_in_csv_name_the_line(tmp_path: Path, text: str | bytes, message: str) -> None:
    with pytest.raises(InputError, match=message) as told:
        scenes(written(tmp_path, text))
    assert "\n" not in str(told.value)


GOOD = json.dumps({"image": "images/a.jpg", "mask": "masks/left.png", "query": "left"})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (GOOD + "\n{", r"queries\.jsonl', line 2: not JSON \("),
        (GOOD + "\n\n[1]", r"line 3: \[1\] found, expected an object with image, mask and query"),
        (GOOD.replace("}", ', "query": "right"}'), "line 1: column 'query' is there 2 times; keep one"),
        (GOOD.replace('"left"', '{"a": 1}'), r"line 1: query is .*, expected text"),
        (GOOD.replace('"left"', "5"), "line 1: query is 5, expected text"),
        (GOOD.replace('"masks/left.png"', "null"), "line 1: mask is None, expected text"),
        (GOOD.replace("query", "text"), "line 1: no column query; found 'image', 'mask', 'text'"),
        (
            GOOD + "\n" + GOOD.replace("}", ', "split": "test"}'),
            "line 2 has 'split', unlike the first row; give it in all",
        ),
        (GOOD.replace("}", ', "id": "x"}') + "\n" + GOOD, "line 2 has no 'id', unlike the first row"),
    ],
)
def test_mistakes_in_json_lines_name_the_line(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(InputError, match=message) as told:
        scenes(written(tmp_path, text, "queries.jsonl"))
    assert "\n" not in str(told.value)


def test_missing_files_are_told_before_anything_is_read(tmp_path: Path) -> None:
    folder(tmp_path)
    (tmp_path / "images" / "b.png").unlink()
    (tmp_path / "masks" / "left.png").unlink()
    with pytest.raises(InputError, match=r"1 of 2 images, of 1 queries, are missing: .*; 1 masks or annotations are"):
        scenes(tmp_path)
    assert len(scenes(tmp_path, "test")) == 1
    image(tmp_path / "images" / "b.png")
    with pytest.warns(DataWarning, match=r"1 masks or annotations are missing: .*left\.png"):
        assert [scene.id for scene in scenes(tmp_path, missing="skip")] == ["images/b.png"]


def test_a_line_break_in_a_path_is_told_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"missing: '.*ima\\nges/a\.jpg'") as told:
        scenes(written(tmp_path, f'{HEAD}"ima\nges/a.jpg",masks/left.png,left\n'))
    assert "\n" not in str(told.value)


def test_a_mask_of_another_size(tmp_path: Path) -> None:
    folder(tmp_path)
    Image.new("L", (4, 5)).save(tmp_path / "masks" / "left.png")
    with pytest.raises(InputError, match="is 4×5, expected 40×30, the size of its image; resize it with NEAREST"):
        scenes(tmp_path)


def test_other_mistakes(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no table of queries is in .*; expected a folder with queries\.csv or"):
        scenes(tmp_path)
    folder(tmp_path)
    with pytest.raises(UnknownNameError, match="known: val, test"):
        scenes(tmp_path, "train")
    folder(tmp_path, "queries.jsonl")
    with pytest.raises(InputError, match=r"both queries\.csv and queries\.jsonl are in .*; remove one"):
        scenes(tmp_path)


def test_a_link_may_lead_out_of_the_folder(tmp_path: Path) -> None:
    root = written(tmp_path / "data", HEAD + "pictures/x.jpg,masks/left.png,left\n")
    image(tmp_path / "pictures" / "x.jpg")
    (root / "pictures").symlink_to(tmp_path / "pictures")
    assert len(scenes(root)) == 1
