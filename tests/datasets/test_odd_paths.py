"""Names that no file can have, and files that are none: refused before anything is opened."""

from __future__ import annotations

import csv
import json
import os
import re
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import dataset_files as files
import pytest
from refer_files import write_refer

import tokenprune as tp
from tokenprune.datasets.inspection import inspected
from tokenprune.errors import InputError, TokenPruneError

pytest.importorskip("pycocotools")

LONG = "x" * 300  # a name of a file has at most 255 bytes
IMPOSSIBLE = [LONG, "a\0b", "a" * 5000]
LIMIT = 60  # seconds: opening a pipe waits for ever


def in_csv(root: Path, **cells: str) -> str:
    row = {"image": "images/a.jpg", "mask": "masks/left.png", "query": "left"} | cells
    with (files.folder(root) / "queries.csv").open("w", newline="", encoding="utf-8") as table:
        csv.writer(table).writerows([row.keys(), row.values()])
    return f"folder:{root}"


def in_coco(root: Path, **fields: Any) -> str:
    file = files.coco(root)
    found = json.loads(file.read_text())
    for image in found["images"]:
        image.update(fields)
    file.write_text(json.dumps(found))
    return f"coco:{file}"


def in_muse(root: Path, **fields: Any) -> str:
    file = files.muse(root) / "muse_val.json"
    file.write_text(json.dumps([json.loads(file.read_text())[0] | fields]))
    return f"muse:{root}"


def in_refer(root: Path, **fields: Any) -> str:
    file = write_refer(root) / "refcoco" / "instances.json"
    found = json.loads(file.read_text())
    for image in found["images"]:
        image.update(fields)
    file.write_text(json.dumps(found))
    return f"refcoco:{root}"


@pytest.mark.parametrize("name", IMPOSSIBLE)
@pytest.mark.parametrize(
    "place",
    [
        lambda root, name: in_csv(root, image=name),
        lambda root, name: in_csv(root, mask=name),
        lambda root, name: in_coco(root, file_name=name),
        lambda root, name: in_muse(root, file_name=name),
        lambda root, name: in_refer(root, file_name=name),
    ],
    ids=["image", "mask", "coco", "muse", "refer"],
)
def test_names_that_no_file_can_have_are_missing(tmp_path: Path, place: Callable[[Path, str], str], name: str) -> None:
    data = tp.dataset(place(tmp_path, name))
    with pytest.raises(InputError, match=r"missing: .*; complete the folder") as told:
        list(data.scenes("val"))
    assert "\n" not in str(told.value)
    assert {problem.kind for problem in inspected(data, "val").problems} <= {"missing image", "missing file"}


@pytest.mark.parametrize("name", IMPOSSIBLE)
@pytest.mark.parametrize(
    "made",
    [
        lambda root, name: f"folder:{root / name}",
        lambda root, name: f"reasonseg:{root / name}",
        lambda root, name: f"muse:{root / name}",
        lambda root, name: f"coco:{root / name}",
        lambda root, name: f"refcoco:{root / name}",
        lambda root, name: f"coco:{files.coco(root)},images={name}",
        lambda root, name: f"muse:{files.muse(root)},images={name}",
        lambda root, name: f"refcoco:{write_refer(root)},images={name}",
    ],
    ids=["folder", "reasonseg", "muse", "coco", "refcoco", "coco-images", "muse-images", "refcoco-images"],
)
def test_nothing_is_at_an_impossible_path(tmp_path: Path, made: Callable[[Path, str], str], name: str) -> None:
    with pytest.raises(InputError, match=r"nothing is at|not a folder|no folder is; check"):
        list(tp.dataset(made(tmp_path, name)).scenes("val"))


# pipes ---------------------------------------------------------------------------------------------------------------


def walked(dataset: str, said: list[str]) -> None:
    """Writes down what is wrong with a dataset."""
    try:
        data = tp.dataset(dataset)
        said += [f"{problem.kind} {problem.message}" for problem in inspected(data, "val").problems]
        list(data.scenes("val"))
    except TokenPruneError as error:
        said.append(f"refused {error}")


def as_pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


@pytest.mark.parametrize(
    ("write", "file", "said"),
    [
        (files.folder, "images/a.jpg", "missing image .*images/a.jpg': no regular file"),
        (files.folder, "masks/left.png", "missing file .*masks/left.png': no regular file"),
        (files.folder, "queries.csv", "refused .*no table of queries is in"),
        (files.reasonseg, "val/a-plain.jpg", "missing image .*a-plain.jpg': no regular file"),
        (files.reasonseg, "val/a-plain.json", "missing file .*a-plain.json': no regular file"),
        (files.coco, "../instances_val.json", "refused .*is no regular file, expected a JSON file"),
        (files.coco, "../images/000000000001.jpg", "missing image .*1.jpg': no regular file"),
        (files.muse, "muse_val.json", "refused .*no file of MUSE is in"),
        (write_refer, "refcoco/instances.json", "instances.json' is no regular file, expected annotations"),
        (write_refer, "refcoco/refs(unc).p", r"refused .*no 'refs\(unc\).p' in"),
        (write_refer, "images/mscoco/images/train2014/COCO_train2014_000000000012.jpg", "missing image .*no regular"),
    ],
)
def test_pipes_are_not_opened(tmp_path: Path, write: Callable[[Path], Path], file: str, said: str) -> None:
    place = write(tmp_path)
    as_pipe(place / file if "../" not in file else tmp_path / file.removeprefix("../"))
    name = {files.folder: "folder", files.reasonseg: "reasonseg", files.coco: "coco", files.muse: "muse"}
    found: list[str] = []
    walk = threading.Thread(target=walked, args=(f"{name.get(write, 'refcoco')}:{place}", found), daemon=True)
    walk.start()
    walk.join(LIMIT)
    assert not walk.is_alive(), "a pipe was opened"
    assert [line for line in found if re.search(said, line)], found
    assert found[-1].startswith("refused")
