"""Configurations of sweeps: what would be shown as one thing, or read as another, is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import dataset_files
import pytest
from sweep_folders import START, folder_of

from tokenprune.errors import InputError, OptionError
from tokenprune.sweeps.config import MAX_SEED, read_config
from tokenprune.sweeps.entries import DatasetEntry
from tokenprune.sweeps.plan import groups_of

CONFIG: dict[str, Any] = {"models": "lisa-tiny", "datasets": "shapes", "strategies": ["none", "fastv"]}


def refusal(given: dict[str, Any]) -> str:
    with pytest.raises(OptionError) as told:
        read_config({**CONFIG, **given})
    message = str(told.value)
    assert "\n" not in message
    message.encode()
    return message


def test_options_alone_do_not_tell_datasets_apart(tmp_path: Path) -> None:
    data = folder_of(tmp_path / "data", START)
    entry = {"name": "folder", "path": str(data)}
    told = refusal({"datasets": [entry, {**entry, "white": "ignore"}]})
    assert "datasets: two have the same name and split in the results; give each a title of its own" in told
    read_config({**CONFIG, "datasets": [entry, {**entry, "white": "ignore", "title": "ignored"}]})


@pytest.mark.parametrize("budgets", [[0.35, 0.3500001], [0.1, 0.5, 0.1 + 1e-9]])
def test_budgets_that_are_shown_alike(budgets: list[float]) -> None:
    label = f"fastv at {budgets[0]:g}"
    assert f"strategies: two are {label!r} in the results" in refusal({"budgets": budgets})


def test_options_in_a_text_are_options(tmp_path: Path) -> None:
    data = dataset_files.reasonseg(tmp_path)
    entries: list[Any] = [
        f"reasonseg:{data},texts=all",
        {"name": "reasonseg", "path": str(data), "texts": "all"},
        {"name": "reasonseg", "path": f"{data},texts=all"},
        {"name": f"reasonseg:{data}", "texts": "all"},
    ]
    found = [groups_of(read_config({**CONFIG, "datasets": entry}))[0] for entry in (*entries, f"reasonseg:{data}")]
    assert len({group.source for group in found[:-1]}) == 1
    assert found[-1].source != found[0].source
    assert len({group.configurations[0].hash for group in found}) == 2


@pytest.mark.parametrize(
    ("name", "label"),
    [
        ("reasonseg:ReasonSeg", "reasonseg"),
        ("reasonseg:ReasonSeg,texts=all", "reasonseg"),
        ("reasonseg:/data/a.b", "reasonseg"),
        ("refcocog:refer_seg,splitby=umd", "refcocog"),
        ("shapes", "shapes"),
        ("my_data:MyData", "my_data:MyData"),
        ("package.my_data:MyData", "package.my_data:MyData"),
    ],
)
def test_names_in_the_results_hold_no_path(name: str, label: str) -> None:
    assert DatasetEntry(name=name).label == label


@pytest.mark.parametrize(
    ("text", "key"),
    [
        ("models: a\nlimit: 3\nlimit: 4\n", "limit"),
        ("datasets:\n  - name: folder\n    path: x\n    path: y\n", "path"),
        ('{"models": "a", "models": "b"}', "models"),
        ("? budgets\n: 0.5\n'budgets': 0.2\n", "budgets"),
    ],
)
def test_a_key_that_occurs_twice(tmp_path: Path, text: str, key: str) -> None:
    (tmp_path / "sweep.yaml").write_text(text)
    with pytest.raises(InputError, match=f"sweep.yaml', line [1-4]: key '{key}' is there twice; leave one out"):
        read_config(tmp_path / "sweep.yaml")


@pytest.mark.parametrize(
    ("text", "line", "problem"),
    [
        ("models: lisa-tiny\ndatasets: [shapes\nseeds: 1\n", 3, "expected ',' or ']'"),
        ("models: lisa-tiny\n\n  datasets: shapes: val\n", 3, "mapping values are not allowed here"),
        ("models: lisa-tiny\nlimit: !!python/name:os\n", 2, "could not determine a constructor"),
        ("models: lisa-tiny\nlimit: \x07\n", 2, "special characters are not allowed: '\\x07'"),
        ("models: lisa-tiny\nlimit: *nowhere\n", 2, "found undefined alias 'nowhere'"),
        (b"models: lisa-tiny\n\ndatasets: \xff\n", 3, "not UTF-8"),
    ],
)
def test_what_is_not_yaml_is_told_with_its_line(tmp_path: Path, text: Any, line: int, problem: str) -> None:
    (tmp_path / "sweep.yaml").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(InputError) as told:
        read_config(tmp_path / "sweep.yaml")
    message = str(told.value)
    assert message.startswith(f"configuration '{tmp_path / 'sweep.yaml'}', line {line}: not ")
    assert problem in message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"budget": 0.5}, "unknown option 'budget'; did you mean 'budgets'?"),
        ({"seed": 1}, "unknown option 'seed'; did you mean 'seeds'?"),
        (
            {"models": {"source": "lisa-tiny", "devices": "cpu"}},
            "'models.0.devices'; did you mean 'device'? (options: source",
        ),
        (
            {"datasets": {"name": "shapes", "spilt": "test"}},
            "options spilt; give its name alone (did you mean 'split' by",
        ),
        ({"datasets": {"name": "shapes", "titles": "mine"}}, "(did you mean 'title' by 'titles'?)"),
        (
            {"datasets": {"name": "folder", "path": ".", "protocols": "lisa"}},
            "(did you mean 'protocol' by 'protocols'?)",
        ),
        ({"datasets": {"name": "folder", "path": ".", "whites": "target"}}, "did you mean 'white'?"),
        ({"budgets": ["35%"]}, "option 'budgets': found ['35%'], but value error, write 0.35 for 35%"),
        ({"budgets": "12.5 %"}, "write 0.125 for 12.5 %"),
    ],
)
def test_what_was_meant(given: dict[str, Any], told: str) -> None:
    assert told in refusal(given)


def test_a_folder_alone_is_no_dataset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = folder_of(tmp_path / "my.data", START)
    monkeypatch.chdir(tmp_path)
    for place in (str(folder), "my.data"):
        assert f"dataset {place!r} is a folder; say before it what reads it, as in folder:{place}" in refusal(
            {"datasets": place}
        )
        read_config({**CONFIG, "datasets": f"folder:{place}"})


def test_anchors_are_no_repetition(tmp_path: Path) -> None:
    (tmp_path / "sweep.yaml").write_text(
        "models: lisa-tiny\nstrategies: none\ndatasets:\n  - &first {name: shapes, split: val}\n"
        "  - {<<: *first, split: test}\n"
    )
    assert [entry.split for entry in read_config(tmp_path / "sweep.yaml").datasets] == ["val", "test"]


@pytest.mark.parametrize("key", ["limit", "seeds", "budgets"])
@pytest.mark.parametrize("value", [True, [True], [1, False]])
def test_truth_is_no_number(key: str, value: Any) -> None:
    assert f"option '{key}': found {value!r}, but value error, input should be a number" in refusal({key: value})


def test_seeds() -> None:
    assert f"at most {MAX_SEED}, got 99999999999999999999" in refusal({"seeds": 99999999999999999999})
    assert read_config({**CONFIG, "seeds": MAX_SEED}).seeds == (MAX_SEED,)


@pytest.mark.parametrize(
    "given",
    [
        {"models": {"source": "lisa-tiny", "name": "a\udc80"}},
        {"models": "\udc80"},
        {"datasets": {"name": "shapes", "title": "\ud800"}},
        {"strategies": "fastv\udfff"},
    ],
)
def test_texts_that_are_not_unicode(given: dict[str, Any]) -> None:
    assert "half of a character or a byte that is not text" in refusal(given)


def test_all_problems_at_once() -> None:
    told = refusal(
        {
            "models": ["lisa-tiny", "no-model", 3],
            "datasets": ["shapes", {"split": "x"}, "nowhere"],
            "strategies": ["none", "cspp"],
            "budgets": [0.5, "half", 1.5],
            "limit": 0,
            "seds": 1,
        }
    )
    assert told.startswith("9 problems in the configuration: ")
    for part in ("'models.2'", "'datasets.1.name'", "'budgets.1'", "'limit'", "'seds'", "no-model", "nowhere", "1.5"):
        assert part in told
    assert "cspp" in told


def test_a_bad_element_is_one_problem() -> None:
    for given in ({"models": [3]}, {"models": {}}, {"datasets": [{"split": "val"}]}, {"strategies": [3]}):
        told = refusal(given)
        assert "at least 1 item" not in told
        assert told.startswith("configuration: ")
    assert "at least 1 item" in refusal({"models": []})
