"""`tokenprune new`: packages that are complete, import, and do what their texts say; names that are refused."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import itertools
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import yaml
from cli_fixtures import Runner, assert_one_line, run
from fake_segmentation import FakeData, FakeModel
from PIL import Image

import tokenprune as tp
from tokenprune.datasets.base import Scene
from tokenprune.engine import prune
from tokenprune.plugins import registry
from tokenprune.scaffold.package import LONGEST
from tokenprune.testing.dataset_conformance import DatasetConformance
from tokenprune.testing.tiny_decoders import tiny_llama

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

__all__ = ["run"]
ROOT = Path(__file__).resolve().parents[2]
KINDS = {"strategy": "strategies", "adapter": "adapters", "dataset": "datasets"}
LICENCES = {"Apache-2.0": "Apache License", "MIT": "MIT License", "BSD-3-Clause": "BSD 3-Clause License", "none": None}


@pytest.fixture
def forgotten() -> Iterator[None]:
    """Plugins and modules of the test are not there afterwards."""
    modules = set(sys.modules)
    yield
    registry.reset()
    for name in set(sys.modules) - modules:
        if name.startswith("tokenprune_"):
            del sys.modules[name]


def plugin_of(folder: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The plugin module of a written package, registered as if the package were installed."""
    monkeypatch.syspath_prepend(str(folder / "src"))
    module = importlib.import_module(f"{folder.name.replace('-', '_')}.plugin")
    registry.register_plugin(module, folder.name)
    return module


@pytest.mark.parametrize("licence", LICENCES)
@pytest.mark.parametrize("noun", KINDS)
def test_packages_are_complete(run: Runner, tmp_path: Path, noun: str, licence: str) -> None:
    ran = run("new", noun, "my-own", "--into", tmp_path / "new", "--licence", licence)
    assert (ran.code, ran.err) == (0, "")
    folder = tmp_path / "new" / "tokenprune-my-own"
    assert str(folder) in ran.out
    texts = {
        path.relative_to(folder).as_posix(): path.read_text(encoding="utf-8")
        for path in folder.rglob("*")
        if path.is_file()
    }
    package = {f"src/tokenprune_my_own/{name}" for name in ("__init__.py", "plugin.py", "py.typed", f"{noun}.py")}
    around = {"pyproject.toml", "README.md", ".gitignore", ".github/workflows/test.yml", "tests/test_my_own.py"}
    assert package | around <= set(texts)
    for path, text in texts.items():
        assert "@{" not in text, path
        assert text == "" or text.endswith("\n")
        if path.endswith(".py"):
            compile(text, path, "exec")
            assert max(map(len, text.splitlines())) <= 120
    project = tomllib.loads(texts["pyproject.toml"])["project"]
    assert project["name"] == "tokenprune-my-own"
    assert project["entry-points"] == {"tokenprune": {"my-own": "tokenprune_my_own.plugin"}}
    assert yaml.safe_load(texts[".github/workflows/test.yml"])["jobs"]["test"]["steps"]
    if licence == "none":
        assert "LICENSE" not in texts
        assert "license" not in project
    else:
        assert LICENCES[licence] in texts["LICENSE"]
        assert (project["license"], project["license-files"]) == (licence, ["LICENSE"])
    if licence in ("MIT", "BSD-3-Clause"):
        assert "the authors of tokenprune-my-own" in texts["LICENSE"]


@pytest.mark.usefixtures("forgotten")
def test_the_strategy_works(run: Runner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run("new", "strategy", "my-own", "--into", tmp_path)
    plugin_of(tmp_path / "tokenprune-my-own", monkeypatch)
    kind = registry.get("strategies", "my-own").load()
    assert kind.__name__ == "MyOwn"
    readme = (tmp_path / "tokenprune-my-own" / "README.md").read_text(encoding="utf-8")
    for name, field in kind.Options.model_fields.items():
        assert f"| `{name}` | `{field.default!r}` | {field.description} |" in readme
    images = torch.zeros(2, 20, dtype=torch.bool)
    images[0, 2:18], images[1, 2:14] = True, True
    model = tiny_llama().model
    states = torch.randn(2, 20, 32, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode(), prune(model, tp.strategy("my-own", budget=0.25), image_tokens=images) as pruned:
        model(inputs_embeds=states)
    assert [entry.image for entry in pruned.trace.ledger.entries] == [(4, 3)] * 4


@pytest.mark.usefixtures("forgotten")
@pytest.mark.parametrize("name", ["keep", "field", "tensor", "true", "stage", "tokens", "exception", "x"])
def test_no_name_hides_another(run: Runner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    run("new", "strategy", name, "--into", tmp_path)
    plugin_of(tmp_path / f"tokenprune-{name}", monkeypatch)
    kind = registry.get("strategies", name).load()
    assert kind.__name__ in ("X", f"{name.title()}Strategy")
    shape = tp.Shape(layers=4, image_tokens=16)
    assert [stage.tokens for stage in tp.strategy(name, keep=0.25).stages(shape)] == [4]


@pytest.mark.usefixtures("forgotten")
def test_the_adapter_works(run: Runner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run("new", "adapter", "my-own", "--into", tmp_path)
    plugin_of(tmp_path / "tokenprune-my-own", monkeypatch)
    kind = registry.get("adapters", "my-own").load()
    assert kind.matches("anywhere", {"model_type": "my_own"})
    assert kind.bind(tiny_llama()) is None


def test_the_dataset_passes_its_own_tests(run: Runner, tmp_path: Path) -> None:
    """As if it were installed: the package and its metadata are where Python looks."""
    run("new", "dataset", "my-own", "--into", tmp_path)
    folder = tmp_path / "tokenprune-my-own"
    known = folder / "src" / "tokenprune_my_own-0.1.0.dist-info"
    known.mkdir()
    (known / "METADATA").write_text("Metadata-Version: 2.1\nName: tokenprune-my-own\nVersion: 0.1.0\n")
    (known / "entry_points.txt").write_text("[tokenprune]\nmy-own = tokenprune_my_own.plugin\n")
    path = os.pathsep.join(map(str, (folder / "src", ROOT, ROOT / "strategies", ROOT / "adapters")))
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout
    assert "8 passed" in done.stdout


@pytest.mark.usefixtures("forgotten")
def test_the_dataset_is_compared_on(run: Runner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run("new", "dataset", "my-own", "--into", tmp_path)
    plugin_of(tmp_path / "tokenprune-my-own", monkeypatch)
    words = ("compare", "--model", "fake", "--dataset", "my-own", "--strategies", "front", "--timing-samples", 0)
    assert_one_line(run(*words), "no NAME.json found; set MY_OWN_FOLDER to the folder with the splits")
    scene = next(FakeData().scenes("val", 2))
    files = tmp_path / "files" / "val"
    files.mkdir(parents=True)
    Image.fromarray(scene.image).save(files / "one.png")
    Image.fromarray(scene.queries[0].mask).save(files / "mask.png")
    (files / "one.json").write_text('[{"text": "red thing", "kind": "phrase", "mask": "mask.png"}]')
    monkeypatch.setenv("MY_OWN_FOLDER", str(tmp_path / "files"))
    ran = run(*words, "--limit", 5, "--format", "json")
    assert ran.code == 0, ran.err
    found, expected = json.loads(ran.out), tp.compare(FakeModel(), FakeData(), ["front"], limit=1, timing_samples=0)
    assert (found["dataset"], found["samples"]) == ("my-own", 1)
    assert found["rows"][0]["giou"] == expected.rows[0].giou  # the first query of the same scene


class Sound(FakeData):
    """Whose kinds are those of its queries; each breach of a promise is a subclass."""

    name = "sound"

    def scenes(self, split: str, limit: int | None = None, seed: int = 0) -> Iterator[Scene]:
        if split not in self.splits:
            raise tp.TokenPruneError(f"no split {split!r}")
        return super().scenes(split, limit, seed)


class OtherKinds(Sound):
    kinds = ("short",)


class Endless(Sound):
    def scenes(self, split: str, limit: int | None = None, seed: int = 0) -> Iterator[Scene]:
        return super().scenes(split, None if limit is None else max(limit - 1, 1), seed)


class Drawn(Sound):
    draws = itertools.count()

    def scenes(self, split: str, limit: int | None = None, seed: int = 0) -> Iterator[Scene]:
        return super().scenes(split, limit, next(self.draws))


class AnySplit(Sound):
    def scenes(self, split: str, limit: int | None = None, seed: int = 0) -> Iterator[Scene]:
        return super().scenes("val", limit, seed)


class Empty(Sound):
    def scenes(self, split: str, limit: int | None = None, seed: int = 0) -> Iterator[Scene]:
        return iter(())


@pytest.mark.parametrize(
    ("kind", "failing"),
    [
        (Sound, ""),
        (OtherKinds, "test_kinds_are_declared"),
        (Endless, "test_limit_counts_queries"),
        (Drawn, "test_the_same_seed_gives_the_same"),
        (AnySplit, "test_an_unknown_split_is_refused"),
        (Empty, "test_every_split_has_sound_scenes"),
    ],
)
def test_the_kit_for_data_sets_finds_each_breach(kind: type[FakeData], failing: str) -> None:
    class Kit(DatasetConformance):
        def data(self) -> FakeData:
            return kind()

    broken = []
    for name in [name for name in dir(Kit) if name.startswith("test_")]:
        try:
            getattr(Kit(), name)()
        except (AssertionError, pytest.fail.Exception):
            broken.append(name)
    assert (failing in broken) if failing else not broken


AWKWARD = ('She said "no" \\ and @{name} $name', "it's ’quoted’ é", "both ' and \"")


@pytest.mark.parametrize("text", AWKWARD)
def test_descriptions_and_authors_are_kept_letter_by_letter(run: Runner, tmp_path: Path, text: str) -> None:
    ran = run("new", "strategy", "x", "--into", tmp_path, "--description", text, "--author", text, "--licence", "mit")
    assert ran.code == 0, ran.err
    folder = tmp_path / "tokenprune-x"
    project = tomllib.loads((folder / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert project["description"] == text
    assert project["authors"] == [{"name": text}]
    assert text in (folder / "LICENSE").read_text(encoding="utf-8")
    tree = ast.parse((folder / "src" / "tokenprune_x" / "plugin.py").read_text(encoding="utf-8"))
    assert text in {node.value for node in ast.walk(tree) if isinstance(node, ast.Constant)}


def test_an_author_with_an_address(run: Runner, tmp_path: Path) -> None:
    run("new", "adapter", "x", "--into", tmp_path, "--author", "Ada Lovelace <ada@example.org>", "--license", "MIT")
    project = tomllib.loads((tmp_path / "tokenprune-x" / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert project["authors"] == [{"name": "Ada Lovelace", "email": "ada@example.org"}]
    assert "Ada Lovelace\n" in (tmp_path / "tokenprune-x" / "LICENSE").read_text(encoding="utf-8")


@pytest.mark.parametrize(("kind", "name"), [("strategy", "my-method"), ("adapter", "my-model"), ("dataset", "my-data")])
def test_help_names_an_example_of_the_kind(run: Runner, kind: str, name: str) -> None:
    assert f"as in {name}." in run("new", kind, "--help").out


BAD_NAMES = [
    ("My_Method", "'my-method'"),
    ("MyMethod", "'my-method'"),
    ("3d", "'my-method'"),
    ("a--b", "'a-b'"),
    ("a+b", "'a-b'"),
    ("été", "'t'"),
    ("a" * 41, f"'{'a' * 40}'"),
    ("../x", "'x'"),
    ("x\n", "'x'"),
    ("", "'my-method'"),
]


@pytest.mark.parametrize(("name", "better"), BAD_NAMES)
def test_bad_names_are_refused_with_a_good_one(run: Runner, tmp_path: Path, name: str, better: str) -> None:
    assert_one_line(run("new", "strategy", name, "--into", tmp_path), "lower-case letters", f"as in {better}")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["fake-model"]


@pytest.mark.parametrize(
    ("noun", "name", "parts"),
    [
        ("strategy", "fastv", ("strategy 'fastv' exists already", "package 'tokenprune-vlm'")),
        ("adapter", "lisa", ("adapter 'lisa' exists already", "package 'tokenprune-vlm'")),
        ("adapter", "qwen2-vl", ("'qwen2_vl'", "adapter 'transformers'")),
        ("dataset", "shapes", ("dataset 'shapes' exists already", "package 'tokenprune-vlm'")),
        ("strategy", "adapters", ("module 'tokenprune_adapters' is installed",)),
    ],
)
def test_taken_names_are_refused(run: Runner, tmp_path: Path, noun: str, name: str, parts: tuple[str, ...]) -> None:
    assert_one_line(run("new", noun, name, "--into", tmp_path), *parts, "choose another name")


def test_an_installed_package_is_not_written_anew(run: Runner, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    known = tmp_path / "tokenprune_x-2.0.dist-info"
    known.mkdir()
    (known / "METADATA").write_text("Metadata-Version: 2.1\nName: tokenprune-x\nVersion: 2.0\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert_one_line(run("new", "strategy", "x", "--into", tmp_path / "new"), "package 'tokenprune-x' is installed")


def test_nothing_is_written_over(run: Runner, tmp_path: Path) -> None:
    mine = tmp_path / "tokenprune-x" / "mine.txt"
    mine.parent.mkdir()
    mine.write_text("mine")
    assert_one_line(run("new", "strategy", "x", "--into", tmp_path), "tokenprune-x exists already", "--into")
    assert [path.name for path in mine.parent.iterdir()] == ["mine.txt"]
    assert_one_line(run("new", "strategy", "y", "--into", mine), "cannot be written", "--into")


def test_several_lines_are_refused(run: Runner, tmp_path: Path) -> None:
    for option in ("--author", "--description"):
        assert_one_line(run("new", "strategy", "x", "--into", tmp_path, option, "a\nb"), option[2:], "one line")


def test_long_descriptions_are_refused(run: Runner, tmp_path: Path) -> None:
    ran = run("new", "strategy", "x", "--into", tmp_path, "--description", "a" * (LONGEST + 1))
    assert_one_line(ran, "description of 101 characters found, expected at most 100")


RUFF = ("--isolated", "--line-length", "120", "--target-version", "py310")


@pytest.mark.skipif(importlib.util.find_spec("ruff") is None, reason="ruff is not installed here")
@pytest.mark.parametrize("noun", KINDS)
def test_packages_are_clean(run: Runner, tmp_path: Path, noun: str) -> None:
    run("new", noun, "my-own", "--into", tmp_path, "--description", "a " * (LONGEST // 2 - 1) + "bc")
    for command in (("check", "--select", "E,F,W,I,B,UP,C4,SIM,RUF", "--ignore", "RUF002"), ("format", "--check")):
        done = subprocess.run(
            [sys.executable, "-m", "ruff", *command, *RUFF, "."],
            cwd=tmp_path / "tokenprune-my-own",
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stdout


def test_a_new_strategy_needs_no_torch(tmp_path: Path) -> None:
    code = """
import sys
from tokenprune.cli.app import main
try:
    main(["new", "strategy", "x"])
finally:
    print("heavy:", sorted({"torch", "transformers", "numpy"} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert "heavy: []" in done.stdout, done.stderr


# installed -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def transcript() -> Any:
    """The tool that runs what a page shows."""
    spec = importlib.util.spec_from_file_location("transcript", ROOT / "tools" / "figures" / "transcript.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
@pytest.mark.parametrize("page", ["first-strategy", "adapter"])
def test_the_transcript_in_the_docs_is_the_real_one(transcript: Any, tmp_path: Path, page: str) -> None:
    shown = transcript.blocks((ROOT / "docs" / "extend" / f"{page}.md").read_text(encoding="utf-8"))
    assert sum(len(block) for block in shown) >= 5
    found = transcript.run(shown, tmp_path)
    for was, now in zip(shown, found, strict=True):
        for before, after in zip(was, now, strict=True):
            assert transcript.stable(after.output) == transcript.stable(before.output), (
                f"$ {after.command}\nprints something else; run tools/figures/transcript.py:\n{after.output}"
            )


@pytest.mark.slow
@pytest.mark.parametrize("name", ["my-own", "llama"])
def test_the_adapter_passes_its_own_tests(transcript: Any, tmp_path: Path, name: str) -> None:
    steps = (f"tokenprune new adapter {name}", f"cd tokenprune-{name}", 'python -m pip install -q -e ".[test]"')
    block = [transcript.Step(command, "") for command in (*steps, "python -m pytest -q", "tokenprune list")]
    (ran,) = transcript.run([block], tmp_path)
    assert " passed" in ran[-2].output
    assert f"tokenprune-{name} 0.1.0" in ran[-1].output


def test_stable_parts_tell_results_apart(transcript: Any) -> None:
    assert transcript.stable("..s.  [100%]\n4 passed in 1.2s\n") == transcript.stable("... [100%]\n3 passed in 9.1s")
    assert transcript.stable("1 failed, 3 passed in 1s") != transcript.stable("3 passed in 1s")
    assert transcript.stable("x  0.914  89.0 (0.348)") == transcript.stable("x   0.9  9.0 (0.1)")
    assert transcript.stable("csp 1") != transcript.stable("x 1")
