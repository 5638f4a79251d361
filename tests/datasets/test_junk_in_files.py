"""Junk in every place of every annotation file: an error of ours in one line, or it works; never another exception."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import dataset_files as files
import pytest
from junk_in_json import REMOVED, changed, coco, coco_texts, muse, places, reasonseg

import tokenprune as tp
from tokenprune.datasets.inspection import inspected
from tokenprune.errors import TokenPruneError

pytest.importorskip("pycocotools")

FAR = [[-1e9, 0, 1e9, 5, 3, 1e9]]
JUNK = [None, 3, -1, 2.5, float("inf"), True, "x", "", [], {}, [None], [[1, 2]], {"a": 1}, "\ud800", FAR, REMOVED]
TRIALS = 150  # of each file; all of them take minutes


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
