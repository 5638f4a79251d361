"""Datasets by the place of their class, `module:Class`: from the current folder and from packages, errors by name."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from cli_fixtures import Runner, assert_one_line, run
from fake_segmentation import FakeData, FakeModel

import tokenprune as tp
from tokenprune.errors import PluginError, UnknownNameError

__all__ = ["run"]
ROOT = Path(__file__).resolve().parents[2]
SOURCE = '''
from __future__ import annotations

import numpy as np

from tokenprune.datasets.base import Dataset, Query, Scene

NUMBER = 3


class MyData(Dataset):
    """One bright half."""

    name = "halves"
    splits = ("val",)
    kinds = ("half",)

    def scenes(self, split, limit=None, seed=0):
        for number in range(4 if limit is None else limit):
            image = np.zeros((24, 24, 3), dtype=np.uint8)
            image[:, 12:] = 200 + number
            yield Scene(str(number), image, [Query("the bright half", "half", image[..., 0] > 0)])


class Needy(MyData):
    def __init__(self, folder):
        self.folder = folder


class Nameless(Dataset):
    splits = ("val",)

    def scenes(self, split, limit=None, seed=0):
        return iter(())


class Splitless(MyData):
    splits = "val"


class Unfinished(Dataset):
    name = "unfinished"
'''
OPTIONS = {"strategies": ["none"], "limit": 2, "timing_samples": 0}


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The current folder, with modules in it that nothing else finds."""
    here = tmp_path / "here"
    (here / "nested_halves").mkdir(parents=True)
    (here / "my_halves.py").write_text(SOURCE)
    (here / "nested_halves" / "__init__.py").write_text("")
    (here / "nested_halves" / "data.py").write_text("from my_halves import MyData\n")
    (here / "broken_halves.py").write_text("import json\n\n1 / 0\n")
    (here / "lacking_halves.py").write_text("import no_such_module_at_all\n")
    (here / "leaving_halves.py").write_text("import sys\n\nsys.exit('away')\n")
    (here / "argparse.py").write_text("raise RuntimeError('hides the standard library')\n")
    monkeypatch.chdir(here)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry not in ("", ".")])
    before = set(sys.modules)
    yield here
    for name in set(sys.modules) - before:
        if "halves" in name:
            del sys.modules[name]


@pytest.mark.parametrize("place", ["my_halves:MyData", "nested_halves.data:MyData"])
def test_a_class_of_the_current_folder(place: str) -> None:
    path = list(sys.path)
    found = tp.compare(FakeModel(), place, **OPTIONS)  # type: ignore[arg-type]
    assert (found.dataset, found.samples) == ("halves", 2)
    assert sys.path == path


def test_a_class_of_an_installed_module() -> None:
    by_place = tp.compare(FakeModel(), "tokenprune.datasets.shapes:Shapes", **OPTIONS)  # type: ignore[arg-type]
    by_name = tp.compare(FakeModel(), "shapes", **OPTIONS)  # type: ignore[arg-type]
    assert by_place.dataset == "shapes"
    assert by_place.rows == by_name.rows


def test_a_file_that_was_just_written(folder: Path) -> None:
    with pytest.raises(UnknownNameError):
        tp.compare(FakeModel(), "new_halves:MyData", **OPTIONS)  # type: ignore[arg-type]
    (folder / "new_halves.py").write_text(SOURCE)
    assert tp.compare(FakeModel(), "new_halves:MyData", **OPTIONS).samples == 2  # type: ignore[arg-type]


def test_nothing_installed_is_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "argparse", raising=False)
    with pytest.raises(UnknownNameError, match="unknown dataset of module 'argparse'"):
        tp.compare(FakeModel(), "argparse:MyData", **OPTIONS)  # type: ignore[arg-type]


def test_commands_take_it(run: Runner, tmp_path: Path) -> None:
    words = ("--model", "fake", "--dataset", "my_halves:MyData")
    ran = run("compare", *words, "--strategies", "front", "--limit", 2, "--timing-samples", 0, "--format", "json")
    assert ran.code == 0, ran.err
    assert json.loads(ran.out)["dataset"] == "halves"
    ran = run("inspect", *words, "--index", 1, "--strategy", "front", "--out", tmp_path / "sheet.png")
    assert ran.code == 0, ran.err
    assert "the bright half" in ran.out


ERRORS = [
    ("my_halves.MyData", UnknownNameError, "did you mean 'my_halves:MyData'"),
    ("nested_halves.data.MyData", UnknownNameError, "did you mean 'nested_halves.data:MyData'"),
    ("my_halves.py:MyData", UnknownNameError, "drop .py: my_halves:MyData"),
    ("./nested_halves/data.py:MyData", UnknownNameError, "drop .py: nested_halves.data:MyData"),
    ("my_halves.py", UnknownNameError, "is a file; name its class, as in my_halves:MyData"),
    (
        "my_halves:MyDate",
        UnknownNameError,
        r"unknown dataset of module 'my_halves' \(.*my_halves\.py\) 'MyDate'; .*'MyData'",
    ),
    ("my_halfs:MyData", UnknownNameError, "no module 'my_halfs' is there, neither installed nor in the current folder"),
    ("nested_halves.date:MyData", UnknownNameError, "no module 'nested_halves.date' is there"),
    ("my_halves:", UnknownNameError, "expected a registered name or module:Class"),
    (":MyData", UnknownNameError, "expected a registered name or module:Class"),
    ("my-halves:MyData", UnknownNameError, "expected a registered name or module:Class"),
    ("./my_halves.py:MyData", UnknownNameError, "expected a registered name or module:Class"),
    ("my_halves:MyData:x", UnknownNameError, "expected a registered name or module:Class"),
    ("broken_halves:MyData", PluginError, "its module cannot be imported: ZeroDivisionError: division by zero"),
    (
        "lacking_halves:MyData",
        PluginError,
        "cannot be imported: ModuleNotFoundError: No module named 'no_such_module_at",
    ),
    ("leaving_halves:MyData", PluginError, "its module cannot be imported: SystemExit: away"),
    ("my_halves:NUMBER", PluginError, r"is 3, expected a subclass of tokenprune\.datasets\.base\.Dataset"),
    ("my_halves:Needy", PluginError, "cannot be made without arguments: TypeError: .*folder"),
    ("my_halves:Unfinished", PluginError, "cannot be made without arguments: TypeError: .*scenes"),
    ("my_halves:Nameless", PluginError, "has no name; give the class a name"),
    ("my_halves:Splitless", PluginError, r"has splits 'val', expected a tuple of names such as \('val',\)"),
]


@pytest.mark.parametrize(("place", "kind", "problem"), ERRORS)
def test_errors_name_the_place(place: str, kind: type[Exception], problem: str, run: Runner) -> None:
    path = list(sys.path)
    with pytest.raises(kind, match=problem) as caught:
        tp.compare(FakeModel(), place, **OPTIONS)  # type: ignore[arg-type]
    assert place in str(caught.value) or place.split(":")[0] in str(caught.value)
    assert sys.path == path
    assert_one_line(run("compare", "--model", "fake", "--dataset", place), str(caught.value)[:60])


def test_a_registered_name_wins(run: Runner) -> None:
    from tokenprune.plugins import registry

    class Plugin:
        @tp.hookimpl
        def tokenprune_register_datasets(self, register):  # type: ignore[no-untyped-def]
            register("my_halves:MyData", FakeData)

    registry.register_plugin(Plugin(), "colon")
    try:
        assert tp.compare(FakeModel(), "my_halves:MyData", **OPTIONS).dataset == "rectangles"  # type: ignore[arg-type]
    finally:
        registry.unregister_plugin("colon")


def test_the_installed_program_finds_the_current_folder(folder: Path) -> None:
    """Whose own folder, not the current one, is what Python looks in first."""
    program = folder.parent / "bin" / "tokenprune"
    program.parent.mkdir()
    program.write_text("from tokenprune.cli.app import main\nmain()\n")
    (folder / "argparse.py").unlink()
    words = (
        "compare",
        "--dataset",
        "my_halves:MyData",
        "--strategies",
        "none",
        "--limit",
        "1",
        "--timing-samples",
        "0",
    )
    path = os.pathsep.join(str(ROOT / part) for part in ("", "strategies", "adapters"))
    done = subprocess.run(
        [sys.executable, str(program), *words, "--format", "json"],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["dataset"] == "halves"
