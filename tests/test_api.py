"""`tokenprune.strategy` and `tokenprune.load`, and the strategy that the README shows."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

import tokenprune as tp
from tokenprune.core.layout import SequenceLayout
from tokenprune.core.stage import Shape
from tokenprune.core.state import TokenState
from tokenprune.core.tokens import Tokens
from tokenprune.errors import BudgetError, CheckpointError, OptionError, PluginError, UnknownNameError
from tokenprune.plugins import registry

ROOT = Path(__file__).resolve().parents[1]


class ToyAdapter(tp.Adapter):
    """Loads checkpoints whose model_type is "toy"."""

    @classmethod
    def matches(cls, source: str, config: Mapping[str, Any]) -> bool:
        return config.get("model_type") == "toy"

    @classmethod
    def load(cls, source: str, **options: Any) -> Any:
        return ("toy", source, options)


@pytest.fixture(autouse=True)
def _fresh_registry() -> Iterator[None]:
    registry.reset()
    yield
    registry.reset()


@pytest.fixture
def toy(tmp_path: Path) -> Path:
    """A toy checkpoint, bundled under the name "toy-model" as well."""
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "toy", "architectures": ["Toy"]}))

    class Plugin:
        @tp.hookimpl
        def tokenprune_register_adapters(self, register: Any) -> None:
            register("toy", ToyAdapter)

        @tp.hookimpl
        def tokenprune_register_models(self, register: Any) -> None:
            register("toy-model", lambda: tmp_path)

    registry.register_plugin(Plugin(), name="toys")
    return tmp_path


def test_load_by_bundled_name_and_by_folder(toy: Path) -> None:
    assert tp.load("toy-model", dtype="x") == ("toy", str(toy), {"dtype": "x"})
    assert tp.load(toy) == ("toy", str(toy), {})


@pytest.mark.parametrize(
    ("make", "problem"),
    [
        (lambda folder: folder / "nowhere", "found no such folder.*toy-model"),
        (lambda folder: "toy-modle", "found no such folder.*bundled models:.*toy-model"),
        (lambda folder: folder / "config.json", "found a file, expected a checkpoint's folder"),
        (lambda folder: _write(folder, None), "no config.json"),
        (lambda folder: _write(folder, '{"model_type": "to'), "cannot be read as JSON"),
        (lambda folder: _write(folder, "[1]"), "found list, expected a JSON object"),
        (lambda folder: _write(folder, '{"model_type": "car"}'), "no adapter knows.*'car'.*installed adapters:.*toy"),
    ],
)
def test_load_says_what_it_found(toy: Path, make: Any, problem: str) -> None:
    with pytest.raises(CheckpointError, match=problem):
        tp.load(make(toy))


def _write(folder: Path, config: str | None) -> Path:
    (folder / "config.json").unlink()
    if config is not None:
        (folder / "config.json").write_text(config)
    return folder


def readme_strategy() -> type[tp.Strategy]:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"start:strategy.*?```python\n(.*?)```", text, flags=re.DOTALL)
    names: dict[str, Any] = {}
    exec(code, names)
    return names["Centre"]


@pytest.fixture
def _centre() -> None:
    class Plugin:
        @tp.hookimpl
        def tokenprune_register_strategies(self, register: Any) -> None:
            register("centre", readme_strategy())

    registry.register_plugin(Plugin(), name="readme")


@pytest.mark.usefixtures("_centre")
def test_strategy_of_the_readme_keeps_the_centre_within_budget() -> None:
    shape = Shape(layers=4, image_tokens=25)
    strategy = tp.strategy("centre", budget=0.36).bind(shape)
    (stage,) = strategy.stages(shape)
    assert stage.tokens == 9
    layout = SequenceLayout.from_mask(torch.ones(1, 25, dtype=torch.bool))
    tokens = Tokens(
        stage="crop",
        layout=layout,
        state=TokenState.start(layout.slots >= 0),
        target=torch.tensor([9]),
        memory={},
        seed=0,
        reads=(),
        provide=lambda read: None,
        mark=lambda name, rows: None,
    )
    assert strategy.choose(stage, tokens).index.tolist() == [[6, 7, 8, 11, 12, 13, 16, 17, 18]]


@pytest.mark.usefixtures("_centre")
def test_strategy_says_what_is_wrong() -> None:
    with pytest.raises(OptionError, match=r"'centre': unknown option 'kep'; did you mean 'keep'"):
        tp.strategy("centre", kep=0.5)
    with pytest.raises(OptionError, match=r"'keep': found 0, but"):
        tp.strategy("centre", keep=0)
    for budget in (0, -1, 1.5, float("nan")):
        with pytest.raises(BudgetError, match="budget"):
            tp.strategy("centre", budget=budget)
    with pytest.raises(UnknownNameError, match="did you mean 'centre'"):
        tp.strategy("center")


def test_target_that_is_no_class_is_a_plugin_error() -> None:
    class Plugin:
        @tp.hookimpl
        def tokenprune_register_strategies(self, register: Any) -> None:
            register("gone", "tokenprune.errors:NotThere")

    registry.register_plugin(Plugin(), name="mine")
    with pytest.raises(PluginError, match="NotThere"):
        tp.strategy("gone")
