"""The registry: lazy, isolating, and clear about what is wrong."""

from __future__ import annotations

import importlib
import subprocess
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import tokenprune
from tokenprune import Strategy, hookimpl
from tokenprune.core import reads
from tokenprune.errors import OptionError, PluginError, UnknownNameError
from tokenprune.plugins import observers, registry

pytestmark = pytest.mark.usefixtures("fresh_registry")
STRATEGIES = {"none", "blind", "random", "uniform", "csp", "csp+", "csp-65", "csp-70", "fastv", "prumerge", "prumerge+"}


class Widget(Strategy):
    """Stands for any registered class."""


class Plugin:
    """Registers one strategy; both name and target can be chosen."""

    def __init__(self, name: Any = "widget", target: Any = Widget) -> None:
        self.name, self.target = name, target

    @hookimpl
    def tokenprune_register_strategies(self, register: Any) -> None:
        register(self.name, self.target, summary="a widget")


def install(folder: Path, distribution: str, source: str) -> None:
    """Put a package with one entry point on `folder`, as pip would."""
    module = distribution.replace("-", "_")
    (folder / f"{module}.py").write_text(source)
    info = folder / f"{module}-1.2.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 1.2\n")
    (info / "entry_points.txt").write_text(f"[tokenprune]\nplug = {module}\n")


REGISTERING = """
from tokenprune import hookimpl

@hookimpl
def tokenprune_register_strategies(register):
    register({name!r}, "{module}:Thing", summary="found")

def __getattr__(name):
    if name != "Thing":
        raise AttributeError(name)
    from tokenprune import Strategy

    return type(name, (Strategy,), {{}})
"""


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder that is searched for installed packages."""
    monkeypatch.syspath_prepend(tmp_path)
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        if str(getattr(sys.modules[name], "__file__", "")).startswith(str(tmp_path)):
            del sys.modules[name]


def test_built_in_names_are_registered() -> None:
    assert set(registry.strategies()) >= STRATEGIES
    assert "lisa" in registry.adapters()
    assert "shapes" in registry.datasets()
    assert "lisa-tiny" in registry.models()
    assert registry.broken_plugins() == []
    entry = registry.strategies()["fastv"]
    assert (entry.distribution, entry.version) == ("tokenprune-vlm", tokenprune.__version__)
    assert entry.summary


def test_functions_are_public_and_survive_the_package_of_the_same_name() -> None:
    assert set(tokenprune.datasets()) == set(registry.datasets())
    base = importlib.import_module("tokenprune.datasets.base")
    assert set(tokenprune.datasets()) == set(registry.datasets())
    assert importlib.import_module("tokenprune.datasets").Dataset is base.Dataset


def test_every_public_name_of_the_module_exists() -> None:
    for name in tokenprune.__all__:
        assert getattr(tokenprune, name) is not None
    with pytest.raises(AttributeError, match="nonsense"):
        _ = tokenprune.nonsense  # type: ignore[attr-defined]


def test_every_kind_of_read_is_public() -> None:
    kinds = {kind.__name__ for kind in vars(reads).values() if isinstance(kind, type) and issubclass(kind, reads.Read)}
    assert len(kinds) > 9
    assert kinds <= {*tokenprune.__all__}


def test_listing_imports_neither_torch_nor_transformers() -> None:
    code = (
        "import sys, tokenprune as tp; tp.strategies(), tp.adapters(), tp.datasets(); from tokenprune.cli import app;"
        "print([m for m in ('torch', 'transformers', 'numpy') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_unknown_name_suggests_the_nearest() -> None:
    with pytest.raises(UnknownNameError, match=r"unknown strategy 'fastw'; did you mean 'fastv'\?.*prumerge\+"):
        registry.get("strategies", "fastw")
    with pytest.raises(UnknownNameError, match=r"unknown dataset 'Shape'; did you mean 'shapes'"):
        registry.get("datasets", "Shape")


def test_plugin_of_this_process() -> None:
    registry.register_plugin(Plugin(), name="mine")
    entry = registry.strategies()["widget"]
    assert entry.load() is Widget
    assert (entry.distribution, entry.version) == ("mine", "")
    registry.unregister_plugin("mine")
    assert "widget" not in registry.strategies()
    with pytest.raises(UnknownNameError, match="mine"):
        registry.unregister_plugin("mine")


def test_taken_name_is_refused_and_names_both_sides() -> None:
    with pytest.raises(PluginError, match="'fastv' is registered by two packages, 'tokenprune-vlm' and 'mine'"):
        registry.register_plugin(Plugin("fastv"), name="mine")
    assert registry.strategies()["fastv"].distribution == "tokenprune-vlm"
    registry.register_plugin(Plugin("free"), name="mine")
    with pytest.raises(PluginError, match="registered already"):
        registry.register_plugin(Plugin("other"), name="mine")


@pytest.mark.parametrize(
    ("name", "target", "problem"),
    [
        ("two words", Widget, "without white space"),
        ("", Widget, "without white space"),
        (3, Widget, "found 3 as the name"),
        ("widget", "no-colon", "no-colon"),
        ("widget", "a module:Thing", "a module:Thing"),
        ("widget", 3, "found 3 as the target"),
    ],
)
def test_invalid_registration_is_refused(name: Any, target: Any, problem: str) -> None:
    with pytest.raises(PluginError, match=problem):
        registry.register_plugin(Plugin(name, target), name="mine")
    assert set(registry.strategies()) >= STRATEGIES
    assert "widget" not in registry.strategies()


def test_name_registered_twice_by_one_plugin_is_refused() -> None:
    class Twice:
        @hookimpl
        def tokenprune_register_models(self, register: Any) -> None:
            register("same", Widget)
            register("same", Widget)

    with pytest.raises(PluginError, match="registers the model 'same' twice"):
        registry.register_plugin(Twice(), name="mine")
    assert "same" not in registry.models()


def test_target_that_cannot_be_imported_names_plugin_and_cause() -> None:
    registry.register_plugin(Plugin("widget", "not_there_at_all:Thing"), name="mine")
    with pytest.raises(PluginError, match=r"'mine'.*'widget'.*not_there_at_all"):
        registry.strategies()["widget"].load()


def test_installed_package_is_found(site: Path) -> None:
    install(site, "good-pack", REGISTERING.format(name="found", module="good_pack"))
    registry.reset()
    entry = registry.strategies()["found"]
    assert (entry.distribution, entry.version, entry.load().__name__) == ("good-pack", "1.2", "Thing")


@pytest.mark.parametrize(
    ("source", "problem"),
    [
        ("raise ValueError('no luck')", "ValueError: no luck"),
        ("import surely_not_installed", "surely_not_installed"),
        ("raise SystemExit(3)", "SystemExit"),
        ("def broken(:", "SyntaxError"),
        (REGISTERING.format(name="half", module="bad_pack") + "\n    register", None),
        (REGISTERING.format(name="half", module="bad_pack").replace('summary="found"', "nonsense=1"), "nonsense"),
    ],
)
def test_broken_package_is_set_aside(site: Path, source: str, problem: str | None) -> None:
    install(
        site, "bad-pack", source if problem else source.replace("def __getattr__", "raise OSError\ndef __getattr__")
    )
    install(site, "good-pack", REGISTERING.format(name="found", module="good_pack"))
    registry.reset()
    assert {"found", *STRATEGIES} <= set(registry.strategies())
    assert "half" not in registry.strategies()
    (broken,) = registry.broken_plugins()
    assert (broken.name, broken.distribution, broken.version) == ("plug", "bad-pack", "1.2")
    assert (problem or "OSError") in broken.error


def test_two_packages_with_one_name_are_both_named(site: Path) -> None:
    install(site, "pack-a", REGISTERING.format(name="same", module="pack_a"))
    install(site, "pack-b", REGISTERING.format(name="same", module="pack_b"))
    registry.reset()
    with pytest.raises(PluginError, match="strategy 'same' is registered by two packages, 'pack-a' and 'pack-b'"):
        registry.get("strategies", "same")
    assert set(registry.strategies()) >= STRATEGIES
    assert "same" not in registry.strategies()
    (problem,) = registry.collisions()
    assert problem.endswith("uninstall one of them, or see TOKENPRUNE_PLUGINS")
    told = {p.distribution: (p.status, p.error) for p in registry.plugins()}
    assert told["pack-a"] == told["pack-b"] == ("collides", problem)
    assert told["tokenprune-vlm"] == ("works", "")


def test_observers_are_called_and_a_failing_one_is_named() -> None:
    seen: list[Any] = []

    class Observer:
        @hookimpl
        def tokenprune_prefill_done(self, run: Any) -> None:
            seen.append(run)

    class Failing:
        @hookimpl
        def tokenprune_prefill_done(self, run: Any) -> None:
            raise RuntimeError("lost")

    observers.notify("tokenprune_prefill_done", run=1)
    registry.register_plugin(Observer(), name="observer")
    observers.notify("tokenprune_prefill_done", run=2)
    assert seen == [2]
    registry.register_plugin(Failing(), name="failing")
    with pytest.raises(PluginError, match=r"'failing'.*tokenprune_prefill_done failed with RuntimeError: lost"):
        observers.notify("tokenprune_prefill_done", run=3)


def test_entry_points_of_the_distribution_are_the_documented_ones() -> None:
    points = {p.name for p in metadata.distribution("tokenprune-vlm").entry_points if p.group == "tokenprune"}
    assert points == {"strategies", "adapters", "datasets"}


def test_option_errors_are_one_line_and_suggest() -> None:
    problem = SimpleNamespace(
        errors=lambda: [
            {"type": "extra_forbidden", "loc": ("lyer",), "msg": "", "input": 1},
            {"type": "greater_than_equal", "loc": ("keep",), "msg": "Input should be greater than 0", "input": -1},
            {"type": "missing", "loc": ("rows",), "msg": "Field required", "input": {}},
        ]
    )
    text = str(OptionError.from_validation("strategy 'x'", problem, ["layer", "keep"]))  # type: ignore[arg-type]
    assert "unknown option 'lyer'; did you mean 'layer'? (options: layer, keep)" in text
    assert "option 'keep': found -1, but input should be greater than 0" in text
    assert "option 'rows' is missing" in text
    assert "\n" not in text
