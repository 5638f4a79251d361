"""Junk in every place of every annotation file: an error of ours in one line, or it works; never another exception."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import dataset_files as files
import pytest

import tokenprune as tp
from tokenprune.datasets.inspection import inspected
from tokenprune.errors import TokenPruneError

pytest.importorskip("pycocotools")

REMOVED = object()
FAR = [[-1e9, 0, 1e9, 5, 3, 1e9]]
JUNK = [None, 3, -1, 2.5, float("inf"), True, "x", "", [], {}, [None], [[1, 2]], {"a": 1}, "\ud800", FAR, REMOVED]
TRIALS = 150  # of each file; all of them take minutes


def places(value: Any, place: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Every place in a JSON value, as the keys and numbers that lead there."""
    yield place
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, one in inside:
        yield from places(one, (*place, key))


def changed(value: Any, place: tuple[Any, ...], junk: Any) -> Any:
    if not place:
        return None if junk is REMOVED else junk
    whole = copy.deepcopy(value)
    inside = whole
    for key in place[:-1]:
        inside = inside[key]
    if junk is REMOVED:
        del inside[place[-1]]
    else:
        inside[place[-1]] = junk
    return whole


def attempt(dataset: str) -> None:
    said: list[str] = []
    try:
        data = tp.dataset(dataset)
        for split in data.splits:
            found = inspected(data, split)
            said += [problem.message for problem in found.problems]
            json.dumps(found.to_dict())
    except TokenPruneError as error:
        said.append(str(error))
    assert not [message for message in said if "\n" in message or "failed with" in message]


def reasonseg(root: Path) -> tuple[str, Path]:
    shapes = [files.shape("target", files.BIG), files.shape("ignore", files.SMALL)]
    return f"reasonseg:{root},texts=all", files.reasonseg_entry(root / "val", "a", shapes, ["x", "y"])


def coco(root: Path) -> tuple[str, Path]:
    file = files.coco(root)
    return f"coco:{file}", file


def coco_texts(root: Path) -> tuple[str, Path]:
    left = files.coco_annotation(1, 1, 17, [files.polygon(files.LEFT)], caption=["a", "b"], is_sentence=True)
    right = files.coco_annotation(2, 1, 18, files.compressed(files.filled(files.RIGHT)), caption="c")
    file = files.coco(root, [left, right])
    return f"coco:{file}", file


def muse(root: Path) -> tuple[str, Path]:
    return f"muse:{files.muse(root)}", root / "muse_val.json"


@pytest.mark.parametrize("write", [reasonseg, coco, coco_texts, muse])
def test_junk_in_json(tmp_path: Path, write: Any) -> None:
    dataset, file = write(tmp_path)
    whole = json.loads(file.read_text())
    trials = [(place, junk) for place in places(whole) for junk in JUNK]
    for place, junk in random.Random(0).sample(trials, TRIALS):
        file.write_text(json.dumps(changed(whole, place, junk)))
        attempt(dataset)


@pytest.mark.parametrize("table", ["queries.csv", "queries.jsonl"])
def test_junk_in_tables(tmp_path: Path, table: str) -> None:
    file = files.folder(tmp_path, table) / table
    whole, chance = file.read_bytes(), random.Random(0)
    for _ in range(TRIALS):
        found = bytearray(whole)
        for _ in range(chance.randint(1, 3)):
            place = chance.randrange(len(found))
            found[place : place + 1] = chance.choice([b"", b"\0", b"\n", b"\r", b'"', b",", b"\xff", b"{", b"x"])
        file.write_bytes(found)
        attempt(f"folder:{tmp_path}")
