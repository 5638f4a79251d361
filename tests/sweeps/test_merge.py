"""Merging shards: of the same sweep alone, and nothing is lost."""

from __future__ import annotations

import sqlite3
from pathlib import Path
from typing import Any

import pytest
from fake_segmentation import FakeModel
from sweep_folders import START, config_of, folder_of, samples

import tokenprune as tp
from tokenprune.errors import InputError
from tokenprune.sweeps.merge import merge
from tokenprune.sweeps.store import FILE, reading

pytestmark = pytest.mark.usefixtures("fakes")


def halves(tmp_path: Path, first: dict[str, Any], second: dict[str, Any]) -> list[Path]:
    parts = [tmp_path / "one", tmp_path / "two"]
    for number, (part, config) in enumerate(zip(parts, (first, second), strict=True), 1):
        tp.sweep(config, part, shard=(number, 2))
    return parts


@pytest.mark.parametrize(
    "other",
    [
        {"a.png": START["a.png"], "x.png": START["b.png"], "c.png": START["c.png"]},  # the same first scene
        {"x.png": ["red", "a blue one"], "b.png": START["b.png"], "c.png": START["c.png"]},
        {"a.png": START["a.png"], "b.png": ["green", "another text"], "c.png": START["c.png"]},
    ],
)
def test_other_data(tmp_path: Path, other: dict[str, list[str]]) -> None:
    data = [folder_of(tmp_path / "data", START), folder_of(tmp_path / "other", other)]
    parts = halves(tmp_path, config_of(data[0]), config_of(data[1]))
    with pytest.raises(InputError, match=r"two'.*scene .* has another .*; run all shards on the same data"):
        merge(parts, tmp_path / "all")


def test_other_generated_data(tmp_path: Path) -> None:
    """Which lists nothing, and is told by its first scene."""
    config: dict[str, Any] = {"models": "fake", "datasets": "rectangles", "strategies": "whole", "limit": 8}
    parts = halves(tmp_path, config, {**config, "datasets": {"name": "rectangles", "split": "train", "title": "x"}})
    for part in parts:
        with sqlite3.connect(part / FILE) as connection:  # as if they were one dataset
            connection.execute("UPDATE scenes SET source = 'same'")
            connection.execute("UPDATE configurations SET source = 'same'")
    with pytest.raises(InputError, match="has another image, query or target than in the others"):
        merge(parts, tmp_path / "all")


def test_other_options_under_the_same_name(tmp_path: Path) -> None:
    data = folder_of(tmp_path / "data", START)
    parts = halves(tmp_path, config_of(data), config_of(data, entry={"white": "ignore"}))
    with pytest.raises(InputError, match=r"whole with fake on folder \(val\) has other options or"):
        merge(parts, tmp_path / "all")


def test_a_shard_that_ran_nothing(tmp_path: Path) -> None:
    """The third of three shards has no scene of the first two."""
    data = folder_of(tmp_path / "data", {"a.png": ["x"], "b.png": ["y"]})
    parts = [tmp_path / str(number) for number in (3, 1, 2)]
    for part in parts:
        tp.sweep(config_of(data), part, shard=(int(part.name), 3))
    assert tp.read_results(parts[0]).empty
    tp.sweep(config_of(data), tmp_path / "whole")
    merge(parts, tmp_path / "all")
    found = {}
    for name in ("all", "whole"):
        with reading(tmp_path / name) as store:
            found[name] = list(store.rows("SELECT hash, options, policies FROM configurations"))
    assert found["all"] == found["whole"]
    assert all(None not in row for row in found["all"])


def test_reasons(tmp_path: Path) -> None:
    """What could not run in a shard is told, until it runs there."""
    data = folder_of(tmp_path / "data", START)
    parts = halves(tmp_path, config_of(data), config_of(data))
    for reason, expected in (("no memory", ["front at 0.5, fake on folder (val, forced)"]), (None, [])):
        with sqlite3.connect(parts[1] / FILE) as connection:
            connection.execute("UPDATE configurations SET reason = ? WHERE strategy = 'front'", (reason,))
        assert list(merge(parts, tmp_path / "all").reasons) == expected


@pytest.mark.parametrize("protocol", ["forced", "glamm"])
def test_a_limit_that_rose_between(tmp_path: Path, protocol: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FakeModel, "one_conversation", protocol == "glamm", raising=False)
    data = folder_of(tmp_path / "data", {"a.png": [*"abcde"], "b.png": [*"fghij"], "c.png": [*"klmno"]})
    low, high = (config_of(data, limit=limit, entry={"protocol": protocol}) for limit in (8, 14))
    merge(halves(tmp_path, low, low), tmp_path / "all")
    merge(halves(tmp_path, high, high), tmp_path / "all")
    tp.sweep(high, tmp_path / "fresh")
    assert samples(tmp_path / "all") == samples(tmp_path / "fresh")


def test_no_shard_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="holds no results"):
        merge([tmp_path / "none"], tmp_path / "all")
    assert not (tmp_path / "all").exists()
