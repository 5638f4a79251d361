"""The store: what is damaged, foreign or read-only, told in one line."""

from __future__ import annotations

import json
import shutil
import sqlite3
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fake_segmentation import FakeData

import tokenprune as tp
from tokenprune.datasets.base import Dataset, Query, Scene
from tokenprune.errors import InputError, OptionError, PluginError
from tokenprune.report.page.data import read_study
from tokenprune.sweeps import fingerprint
from tokenprune.sweeps.merge import merge
from tokenprune.sweeps.results import stored_masks
from tokenprune.sweeps.store import FILE, reading
from tokenprune.sweeps.tuning import tune

pytestmark = pytest.mark.usefixtures("fakes")

CONFIG: dict[str, Any] = {"models": "fake", "datasets": "rectangles", "strategies": ["whole", "front"], "limit": 4}
DAMAGED = r"results.sqlite' is damaged \(.*\); keep a copy"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    tp.sweep(CONFIG, folder)
    return folder


@pytest.fixture
def run(whole: Path, tmp_path: Path) -> Path:
    """A copy of a store."""
    return Path(shutil.copytree(whole, tmp_path / "run"))


def changed(run: Path, statement: str, *values: Any) -> None:
    with sqlite3.connect(run / FILE) as connection:
        connection.execute(statement, values)


def masks_of(run: Path) -> Any:
    hashes = tp.read_results(run, every=True).configuration.unique().tolist()
    with reading(run) as store:
        return stored_masks(store, 0, 0, hashes)


@pytest.mark.parametrize(
    ("statement", "value", "use"),
    [
        ("UPDATE records SET layers = ?", "[1, 2", tp.read_results),
        ("UPDATE records SET metrics = ?", "", tp.read_results),
        ("UPDATE meta SET value = ? WHERE key = 'planned'", "[", tp.read_results),
        ("UPDATE meta SET value = ? WHERE key = 'config'", "{'", lambda run: tp.sweep(CONFIG, run)),
        ("UPDATE meta SET value = ? WHERE key = 'shard'", "", lambda run: merge([run], run.parent / "all")),
        ("UPDATE environments SET value = ?", "nothing", read_study),
        ("UPDATE records SET mask = ?", b"no zlib", masks_of),
        ("UPDATE records SET mask = ?", zlib.compress(bytes(3))[:-2], masks_of),
        ("UPDATE records SET stages = ?", zlib.compress(b"[1"), masks_of),
        ("UPDATE records SET text = CAST(? AS TEXT)", b"\xff\xfe", tp.read_results),
    ],
)
def test_values_that_are_damaged(run: Path, statement: str, value: Any, use: Callable[[Path], Any]) -> None:
    changed(run, statement, value)
    with pytest.raises(InputError, match=DAMAGED):
        use(run)


@pytest.mark.parametrize("version", [3, 2, 0])
def test_a_foreign_database(tmp_path: Path, version: int) -> None:
    with sqlite3.connect(tmp_path / FILE) as connection:
        connection.execute("CREATE TABLE records (a, b)")
        connection.execute(f"PRAGMA user_version = {version}")
    content = (tmp_path / FILE).read_bytes()
    wanted = "is not the store of a sweep: it has .* table" if version else "is of version 0, expected 3"
    for use in (lambda: tp.read_results(tmp_path), lambda: tp.sweep(CONFIG, tmp_path)):
        with pytest.raises(InputError, match=wanted):
            use()
    assert (tmp_path / FILE).read_bytes() == content


def test_a_store_that_cannot_be_written(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a read-only file system SQLite cannot make its log, and opens only what is declared unchangeable."""
    expected, connect = tp.read_results(run), sqlite3.connect

    class ReadOnly(sqlite3.Connection):
        def execute(self, *arguments: Any) -> sqlite3.Cursor:
            raise sqlite3.OperationalError("unable to open database file")

    def refusing(place: Any, **options: Any) -> sqlite3.Connection:
        kind = {} if "immutable=1" in str(place) or place == ":memory:" else {"factory": ReadOnly}
        return connect(place, **options, **kind)

    monkeypatch.setattr(sqlite3, "connect", refusing)
    assert tp.read_results(run).equals(expected)
    (run / f"{FILE}-wal").write_bytes(b"not merged yet")
    with pytest.raises(InputError, match="cannot be used"):
        tp.read_results(run)


def test_a_search_is_not_a_sweep(tmp_path: Path) -> None:
    pytest.importorskip("optuna")
    search: dict[str, Any] = {"budget": 0.5, "model": "fake", "dataset": "rectangles"}
    tune("front", tmp_path / "tuned", **search, trials=1, limit=2, confirm_limit=2)
    before = tp.read_results(tmp_path / "tuned")
    uses: list[Callable[[], Any]] = [
        lambda: tp.sweep(CONFIG, tmp_path / "tuned"),
        lambda: merge([tmp_path / "tuned"], tmp_path / "all"),
    ]
    for use in uses:
        with pytest.raises(InputError, match="tuned' holds a search of `tune`, not a sweep; give another folder"):
            use()
    assert tp.read_results(tmp_path / "tuned").equals(before)
    with pytest.raises(OptionError, match="seed: 99999999999999999999 found, expected at most 4294967295"):
        tune("front", tmp_path / "x", **search, seed=99999999999999999999)


def test_another_number_format_is_not_another_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tp.sweep(CONFIG, tmp_path)
    before = fingerprint.of_weights
    monkeypatch.setattr(fingerprint, "of_weights", lambda model: "rounded")
    with pytest.raises(InputError, match="the weights changed"):
        tp.sweep({**CONFIG, "limit": 6}, tmp_path)
    other = {**CONFIG, "models": {"source": "fake", "dtype": "bfloat16"}}
    assert tp.sweep(other, tmp_path).added == 8
    monkeypatch.setattr(fingerprint, "of_weights", before)
    with pytest.raises(InputError, match="the weights changed"):
        tp.sweep({**other, "limit": 6}, tmp_path)


class Named(Dataset):
    """A scene, or none, with any name."""

    name, splits, kinds = "named", ("val", "empty"), ("half",)
    id = "a\udce9.png"

    def scenes(self, split: str, limit: int | None = None, seed: int = 0) -> Iterator[Scene]:
        """See `Dataset.scenes`."""
        if split == "val":
            image = np.zeros((8, 8, 3), dtype=np.uint8)
            yield Scene(self.id, image, [Query("the dark", "half", image[..., 0] == 0)])


def test_names_that_are_not_unicode(tmp_path: Path) -> None:
    with pytest.raises(PluginError, match=r"scene 'a\\udce9.png', an id that holds \\udce9 at character 1"):
        tp.sweep({**CONFIG, "datasets": f"{__name__}:Named"}, tmp_path)


def test_an_empty_dataset(tmp_path: Path) -> None:
    entry = {"name": f"{__name__}:Named", "split": "empty"}
    with pytest.raises(InputError, match=":Named', split 'empty': no query found; choose another split"):
        tp.sweep({**CONFIG, "datasets": entry}, tmp_path)


class Counted(FakeData):
    """How often it was made."""

    name, made = "counted", 0

    def __init__(self) -> None:
        type(self).made += 1


def test_a_dataset_is_made_once_for_all_groups(tmp_path: Path) -> None:
    Counted.made = 0
    config = {**CONFIG, "datasets": f"{__name__}:Counted", "seeds": [0, 1], "limit": 2}
    assert tp.sweep(config, tmp_path).added > 0
    assert Counted.made == 1
    assert tp.sweep({**config, "limit": 3}, tmp_path).added > 0
    assert Counted.made == 2  # files may have changed since


def test_reasons_tell_where(tmp_path: Path) -> None:
    """Of one strategy on two datasets both are told."""
    data = [{"name": "rectangles", "split": split} for split in ("train", "val")]
    found = tp.sweep({**CONFIG, "datasets": data, "strategies": ["whole", "fastv:layer=90"], "budgets": 0.5}, tmp_path)
    assert len(found.reasons) == 2
    for split, told in zip(("train", "val"), found.reasons, strict=True):
        assert told.startswith("fastv (layer=90) at 0.5, ")
        assert told.endswith(f"fake on rectangles ({split}, forced)")
    assert dict(read_study(tmp_path).reasons) == found.reasons
    assert json.loads(json.dumps(found.reasons))


def test_a_strategy_of_another_package_is_not_other_code(tmp_path: Path) -> None:
    """Its package joins those that are compared; only what both calls used can have changed."""
    tp.sweep({**CONFIG, "strategies": "none"}, tmp_path)
    assert tp.sweep({**CONFIG, "strategies": ["none", "whole"]}, tmp_path).added == 4
    with reading(tmp_path) as store:
        code = store.meta()["digests of fake"]["code"]
    changed(
        tmp_path,
        "UPDATE meta SET value = ? WHERE key = 'digests of fake'",
        json.dumps({"code": {**code, "fake_segmentation": ""}}),
    )
    with pytest.raises(InputError, match="the code changed"):
        tp.sweep({**CONFIG, "limit": 6}, tmp_path)
    assert tp.sweep({**CONFIG, "limit": 6, "strategies": "none"}, tmp_path).added == 2
