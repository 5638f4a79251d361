"""Sweeps: what is stored, how they go on, and what they refuse."""

from __future__ import annotations

import json
import sqlite3
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import tokenprune as tp
from tokenprune.errors import InputError, OptionError
from tokenprune.evaluation import metrics
from tokenprune.sweeps import fingerprint
from tokenprune.sweeps.config import read_config
from tokenprune.sweeps.merge import merge
from tokenprune.sweeps.plan import groups_of
from tokenprune.sweeps.results import stored_masks
from tokenprune.sweeps.store import FILE, Store, reading, writing

CONFIG: dict[str, Any] = {
    "models": "lisa-tiny",
    "datasets": "shapes",
    "strategies": ["none", "random", "fastv"],
    "budgets": [0.5, 0.25],
    "limit": 9,
}
TIMES = ["milliseconds"]


def table_of(folder: Path) -> Any:
    """What must be equal in any run."""
    return tp.read_results(folder).drop(columns=[*TIMES, "environment"])


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    tp.sweep(CONFIG, folder)
    return folder


class Stopped(Exception):
    """Raised by a test in the middle of a sweep."""


def stopping(after: int) -> Any:
    calls = iter(range(after))

    def progress(now: Any) -> None:
        if next(calls, None) is None:
            raise Stopped

    return progress


def test_rows_are_those_of_compare(whole: Path) -> None:
    found = tp.read_results(whole)
    rows = tp.compare("lisa-tiny", "shapes", CONFIG["strategies"], CONFIG["budgets"], limit=9, timing_samples=0).rows
    assert len(found) == 9 * len(rows)
    for row, (label, part) in zip(rows, found.groupby("label", sort=False), strict=True):
        overlaps = list(zip(part.intersection, part["union"], strict=True))
        assert str(label).startswith(row.label)
        assert metrics.giou(overlaps) == pytest.approx(row.giou)
        assert metrics.ciou(overlaps) == pytest.approx(row.ciou)
        assert part.equivalent_tokens.mean() == pytest.approx(row.equivalent_tokens)
        assert part.kv_bytes.mean() == pytest.approx(row.kv_bytes)
        assert part.coverage.mean() == pytest.approx(row.target_coverage)
        assert part.flops.mean() == pytest.approx(row.flops, rel=1e-3)  # compare measures on several queries
        assert json.loads(part.options.iloc[0]) == row.options
    assert {"iou", "kind", "seed", "split", "sample", "model", "dataset", "strategy"} <= {*found.columns}


def test_masks_and_stages_are_stored(whole: Path) -> None:
    found = tp.read_results(whole)
    shapes = next(iter(tp.dataset("shapes").scenes("val", 9)))
    with reading(whole) as store:
        masks = stored_masks(store, 0, 1, found.configuration.unique().tolist())
    assert len(masks) == found.configuration.nunique()
    for hashed, (mask, stages) in masks.items():
        row = found[(found.configuration == hashed) & (found.scene == 0) & (found["query"] == 1)].iloc[0]
        assert metrics.overlap(mask, np.asarray(shapes.queries[1].mask)) == (row.intersection, row["union"])
        if row.strategy == "fastv":
            assert len(stages[-1]["kept"]) == row.layers[-1]


@pytest.mark.parametrize("after", [0, 1, 2])
def test_it_goes_on(tmp_path: Path, whole: Path, after: int) -> None:
    with pytest.raises(Stopped):
        tp.sweep(CONFIG, tmp_path, progress=stopping(after))
    stored = len(tp.read_results(tmp_path))
    assert 0 < stored < 45 or after == 2
    assert tp.sweep(CONFIG, tmp_path).added == 45 - stored
    assert table_of(tmp_path).equals(table_of(whole))


def test_a_scene_is_stored_whole_or_not(tmp_path: Path, whole: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = Store.add_scene
    monkeypatch.setattr(Store, "add_scene", lambda *args: _second_fails(original, *args))
    with pytest.raises(Stopped):
        tp.sweep(CONFIG, tmp_path)
    monkeypatch.undo()
    assert tp.read_results(tmp_path).scene.unique().tolist() == [0]
    tp.sweep(CONFIG, tmp_path)
    assert table_of(tmp_path).equals(table_of(whole))


def _second_fails(original: Any, store: Any, source: str, number: int, *rest: Any) -> None:
    """The records of the second scene are in the transaction already."""
    original(store, source, number, *rest)
    if number == 1:
        raise Stopped


def test_it_grows(tmp_path: Path, whole: Path) -> None:
    small = {**CONFIG, "strategies": ["none", "fastv"], "budgets": [0.5], "limit": 6}
    assert tp.sweep(small, tmp_path).added == 12
    assert tp.sweep({**small, "limit": 9}, tmp_path).added == 2 * (9 - 4)  # the scene that was cut runs anew
    assert tp.sweep(CONFIG, tmp_path).added == 27
    assert table_of(tmp_path).equals(table_of(whole))
    assert tp.sweep({**CONFIG, "limit": 6}, tmp_path).added == 0


def test_configurations_that_are_gone_are_not_shown(tmp_path: Path) -> None:
    tp.sweep({**CONFIG, "limit": 2}, tmp_path)
    tp.sweep({**CONFIG, "limit": 2, "strategies": "fastv", "budgets": 0.5}, tmp_path)
    assert tp.read_results(tmp_path).label.unique().tolist() == ["fastv at 0.5"]
    assert tp.read_results(tmp_path, every=True).label.nunique() == 5


def test_seeds_draw_anew(tmp_path: Path) -> None:
    tp.sweep({**CONFIG, "seeds": [0, 7], "limit": 4, "strategies": "random"}, tmp_path)
    found = tp.read_results(tmp_path)
    assert sorted(found.seed.unique()) == [0, 7]
    assert len(found) == 2 * 2 * 4


def test_shards_are_merged(tmp_path: Path, whole: Path) -> None:
    parts = [tmp_path / name for name in "ab"]
    counts = [tp.sweep(CONFIG, part, shard=(number, 2)).added for number, part in enumerate(parts, 1)]
    assert sum(counts) == 45
    assert min(counts) > 0
    merged = merge(parts, tmp_path / "all")
    assert (merged.records, merged.added) == (45, 45)
    assert table_of(tmp_path / "all").equals(table_of(whole))
    assert merge(parts, tmp_path / "all").added == 0
    assert tp.sweep(CONFIG, tmp_path / "all").added == 0
    with pytest.raises(InputError, match="holds shard 1/2; give each shard a folder of its own"):
        tp.sweep(CONFIG, parts[0], shard=(2, 2))


def test_two_writers(tmp_path: Path) -> None:
    with writing(tmp_path), pytest.raises(InputError, match="is being written by another process"):
        tp.sweep(CONFIG, tmp_path)


def test_a_damaged_store_is_refused(tmp_path: Path) -> None:
    tp.sweep({**CONFIG, "limit": 2}, tmp_path)
    path = tmp_path / FILE
    content = bytearray(path.read_bytes())
    content[4096:12000] = b"\x07" * (12000 - 4096)
    path.write_bytes(content)
    for use in (lambda: tp.sweep(CONFIG, tmp_path), lambda: tp.read_results(tmp_path)):
        with pytest.raises(InputError, match=r"results.sqlite' is damaged \(.*\); keep a copy"):
            use()


def test_another_version_is_refused(tmp_path: Path) -> None:
    with writing(tmp_path):
        pass
    with sqlite3.connect(tmp_path / FILE) as connection:
        connection.execute("PRAGMA user_version = 99")
    with pytest.raises(InputError, match="is of version 99, expected 3"):
        tp.sweep(CONFIG, tmp_path)


def test_no_store(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="holds no results of a sweep"):
        tp.read_results(tmp_path)


@pytest.mark.parametrize("what", ["of_code", "of_weights"])
def test_changes_since_are_noticed(tmp_path: Path, what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    small = {**CONFIG, "limit": 4}  # the first scene
    tp.sweep(small, tmp_path)
    monkeypatch.setattr(fingerprint, what, lambda thing: "other")
    assert tp.sweep(small, tmp_path).added == 0  # there is nothing to add, so nothing to mix
    with pytest.raises(InputError, match=r"the (code|weights) changed since the records of 'lisa-tiny' were made"):
        tp.sweep({**small, "limit": 9}, tmp_path)
    tp.sweep({**small, "limit": 9}, tmp_path, accept_changes=True)
    assert tp.read_results(tmp_path).environment.nunique() == 2


# data that changes ---------------------------------------------------------------------------------------------------

DATA = """
import numpy as np
from tokenprune.datasets.base import Dataset, Query, Scene


class Flat(Dataset):
    name, splits, kinds = "flat", ("val",), ("half",)

    def scenes(self, split, limit=None, seed=0):
        for number in range(4)[:limit]:
            image = np.zeros((64, 64, 3), dtype=np.uint8)
            image[:, 32:] = {shade}
            yield Scene(str(number), image, [Query("the bright half", "half", image[..., 0] > 0)])
"""


def test_changed_data_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    module = tmp_path / "flat_data_of_a_sweep.py"
    module.write_text(DATA.format(shade=180))
    config = {**CONFIG, "datasets": f"{module.stem}:Flat", "strategies": "none", "limit": 2}
    tp.sweep(config, tmp_path / "run")
    sys.modules.pop(module.stem)
    module.write_text(DATA.format(shade=90) + "\n# a file of another size\n")
    with pytest.raises(InputError, match=r"scene '0' of .*:Flat is not the one that was run before"):
        tp.sweep({**config, "limit": 4}, tmp_path / "run")
    sys.modules.pop(module.stem)


# the configuration ---------------------------------------------------------------------------------------------------


def test_all_mistakes_at_once(tmp_path: Path) -> None:
    with pytest.raises(OptionError) as told:
        read_config(
            {
                "models": ["lisa-tiny", "no-model", "lisa-tiny"],
                "datasets": [{"name": "shapes", "split": "nope"}, "reasonseg-of-nobody"],
                "strategies": ["none", "fastv:layers=3", "cspp"],
                "budgets": [0.5, 0.5],
            }
        )
    message = str(told.value)
    assert message.startswith("7 problems in the configuration: ")
    for part in ("no-model", "nope", "reasonseg-of-nobody", "'layers'", "cspp", "lisa-tiny occurs twice", "0.5 occurs"):
        assert part in message


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"modls": "lisa-tiny"}, "modls"),
        ({"models": []}, "models"),
        ({"budgets": "half"}, "budgets"),
        ({"budgets": [1.5]}, "must be a share of the image tokens"),
        ({"seeds": [-1]}, "a seed must be 0 or more, got -1"),
        ({"limit": 0}, "limit"),
        ({"datasets": [{"split": "val"}]}, "name"),
        ({"datasets": [{"name": "shapes", "protocol": "guess"}]}, "protocol"),
        ({"datasets": [{"name": "shapes", "splitby": "umd"}]}, "takes no path and no options"),
        ({"models": [{"source": "lisa-tiny", "dtype": "float3"}]}, "float3"),
        ({"models": [{"source": "lisa-tiny"}, {"source": "lisa-tiny", "dtype": "bfloat16"}]}, "a name of its own"),
        ({"strategies": ["fastv", "fastv"]}, "asked for twice"),
        ({"datasets": ["folder:HERE/a", "folder:HERE/b"]}, "datasets: two have the same name and split in the results"),
    ],
)
def test_mistakes(tmp_path: Path, given: dict[str, Any], message: str) -> None:
    for name in "ab":
        (tmp_path / name).mkdir()
        (tmp_path / name / "queries.csv").write_text("image,mask,query\na.png,b.png,the cat\n")
    given = {
        key: [one.replace("HERE", str(tmp_path)) if isinstance(one, str) else one for one in value]
        if isinstance(value, list)
        else value
        for key, value in given.items()
    }
    with pytest.raises(OptionError, match=message):
        read_config({**CONFIG, **given})


def test_titles_tell_datasets_apart(tmp_path: Path) -> None:
    (tmp_path / "queries.csv").write_text("image,mask,query\na.png,b.png,the cat\n")
    data = [{"name": "folder", "path": str(tmp_path)}, {"name": f"folder:{tmp_path}", "title": "mine"}]
    config = read_config({**CONFIG, "datasets": data})
    assert [entry.label for entry in config.datasets] == ["folder", "mine"]
    assert len({one.hash for group in groups_of(config) for one in group.configurations}) == 10


def test_files(tmp_path: Path) -> None:
    path = tmp_path / "sweep.yaml"
    path.write_text("models: lisa-tiny\ndatasets: [shapes]\nstrategies: [none, 'csp:query=seg']\nbudgets: 0.5\n")
    config = read_config(path)
    assert [contender.label for contender in config.contenders()] == ["none", "csp (query=seg) at 0.5"]
    (tmp_path / "same.json").write_text(config.model_dump_json())
    assert read_config(tmp_path / "same.json") == config
    for text, message in (("- a\n- b", "holds list, expected keys"), ("a: [", "not YAML"), ("\xff", "not UTF-8")):
        path.write_bytes(text.encode("latin1"))
        with pytest.raises(InputError, match=message):
            read_config(path)
    with pytest.raises(InputError, match="no such file"):
        read_config(tmp_path / "none.yaml")
    with pytest.raises(OptionError, match=r"shard=\(3, 2\) found"):
        tp.sweep(CONFIG, tmp_path / "run", shard=(3, 2))


def test_what_cannot_run_is_told_and_the_others_run(tmp_path: Path) -> None:
    found = tp.sweep({**CONFIG, "strategies": ["none", "prumerge:keep=0.001"], "limit": 2, "budgets": 0.001}, tmp_path)
    assert found.added == 2
    assert list(found.reasons) != []
    assert tp.sweep({**CONFIG, "strategies": ["none"], "limit": 2}, tmp_path).reasons == {}


def test_generated_answers(tmp_path: Path) -> None:
    """A query's mask is the union of those that its answer makes."""
    data = [{"name": "shapes", "protocol": "generate"}]
    tp.sweep({**CONFIG, "datasets": data, "strategies": ["none", "fastv"], "budgets": 0.5, "limit": 3}, tmp_path)
    found = tp.read_results(tmp_path)
    model = tp.load("lisa-tiny")
    scene = next(iter(tp.dataset("shapes").scenes("val", 3)))
    for strategy, part in found.groupby("strategy"):
        chosen = None if strategy == "none" else tp.strategy("fastv", budget=0.5)
        for row, query in zip(part.itertuples(), scene.queries, strict=True):
            masks = model.segment(scene.image, query.text, chosen, answer="generate").masks
            mask = masks.any(0).numpy() if len(masks) else np.zeros(scene.image.shape[:2], dtype=bool)
            assert metrics.overlap(mask, np.asarray(query.mask))[0] == pytest.approx(row.intersection, abs=2)
