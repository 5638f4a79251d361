"""`tokenprune.strategy` and `tokenprune.load`, and the strategy that the README shows."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fake_segmentation import FakeModel
from vlm_families import FAMILIES

import tokenprune as tp
from tokenprune.core.layout import SequenceLayout
from tokenprune.core.scheduling.state import TokenState
from tokenprune.core.stage import Shape
from tokenprune.core.tokens import Tokens
from tokenprune.engine import VisionSource
from tokenprune.errors import BudgetError, CheckpointError, InputError, OptionError, PluginError, UnknownNameError
from tokenprune.plugins import registry
from tokenprune.testing.tiny_decoders import tiny_llama

pytestmark = pytest.mark.usefixtures("fresh_registry")
ROOT = Path(__file__).resolve().parents[1]


class ToyAdapter(tp.Adapter):
    """Loads checkpoints whose model_type is "toy"."""

    @classmethod
    def matches(cls, source: str, config: Mapping[str, Any]) -> bool:
        return config.get("model_type") == "toy"

    @classmethod
    def load(cls, source: str, **options: Any) -> Any:
        return ("toy", source, options)


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
def _centre(fresh_registry: None) -> None:
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


REFUSED: dict[str, tuple[Any, str]] = {
    # what is called, and the whole message
    "no name": (lambda: tp.strategy(None), "name=None found, expected the name of a strategy, such as 'csp'"),
    "text for a budget": (
        lambda: tp.strategy("fastv", budget="0.5"),
        "strategy 'fastv': budget must be a share of the image tokens in (0, 1], got '0.5'",
    ),
    "list for a budget": (
        lambda: tp.strategy("fastv", budget=[0.5]),
        "strategy 'fastv': budget must be a share of the image tokens in (0, 1], got [0.5]",
    ),
    "True for a budget": (
        lambda: tp.strategy("fastv", budget=True),
        "strategy 'fastv': budget must be a share of the image tokens in (0, 1], got True",
    ),
    "no amount": (
        lambda: tp.strategy("fastv", keep=""),
        "strategy 'fastv': option 'keep': found '', but input should be a valid integer or a valid number",
    ),
    "no part": (
        lambda: tp.Sequence(3, "fastv"),
        "part of a Sequence=3 found, expected a strategy, or the name of one",
    ),
    "a device that is a number": (
        lambda: tp.load("lisa-tiny", device=3.5),
        "device=3.5 found, expected 'cpu', 'cuda', 'cuda:1' or a torch.device",
    ),
    "a tower that is a number": (
        lambda: tp.load("lisa-tiny", vision_tower=5),
        "vision_tower=5 found, expected the folder or hub id of the tower",
    ),
    "no checkpoint": (
        lambda: tp.load(3),
        "name_or_path=3 found, expected a bundled model's name, a checkpoint's folder, or a hub id",
    ),
    "a model's name": (
        lambda: opened("llava"),
        "model='llava' found, expected a torch.nn.Module or the result of tokenprune.load(), such as "
        "tokenprune.load('llava')",
    ),
    "no model": (
        lambda: opened(None),
        "model=None found, expected a torch.nn.Module or the result of tokenprune.load()",
    ),
    "a model's class": (
        lambda: opened(torch.nn.Linear),
        "model=<class 'torch.nn.modules.linear.Linear'> found, expected a torch.nn.Module or the result of "
        "tokenprune.load()",
    ),
    "a model of masks": (
        lambda: opened(FakeModel()),
        "FakeModel is pruned through its own methods; call its segment(image, query, strategy=…), or pass its decoder "
        "to tokenprune.prune(), with image_tokens=",
    ),
    "a strategy's name": (
        lambda: opened(tiny_llama(), strategy="csp"),
        "strategy='csp' found, expected an instance, such as tokenprune.strategy('fastv')",
    ),
    "no strategy to tell of": (
        lambda: tp.compatible(None, tiny_llama()),
        "strategy=None found, expected an instance, such as tokenprune.strategy('fastv')",
    ),
    "no model to tell of": (
        lambda: tp.compatible("fastv", None),
        "model=None found, expected a torch.nn.Module or the result of tokenprune.load()",
    ),
    "a query row of numpy": (
        lambda: opened(tiny_llama(), image_tokens=MARKS, query=np.zeros((1, 80))),
        "query=a ndarray found, expected 'last' or a bool [batch, sequence] mask",
    ),
    "query rows without names": (
        lambda: opened(tiny_llama(), image_tokens=MARKS, queries=[MARKS]),
        "queries=a list found, expected masks by name, bool [batch, sequence] each",
    ),
    "no vision": (
        lambda: opened(tiny_llama(), image_tokens=MARKS, vision=5),
        "vision=5 found, expected a tokenprune.engine.VisionSource",
    ),
    "a name for a strategy of segment": (
        lambda: tp.load("lisa-tiny").segment(PICTURE, "red", "csp"),
        "strategy='csp' found, expected an instance, such as tokenprune.strategy('fastv')",
    ),
    "bytes for a query": (
        lambda: tp.load("lisa-tiny").segment(PICTURE, b"red"),
        "query is a bytes, expected a string or a list of strings",
    ),
    "no Unicode for a query": (
        lambda: tp.load("lisa-tiny").segment(PICTURE, "a \ud800 b"),
        r"query 'a \ud800 b' holds \ud800 at character 2, half of a character or a byte that is not text; give it as "
        "proper Unicode (on a command line: in the terminal's encoding, such as UTF-8)",
    ),
    "no inputs": (
        lambda: tp.load("lisa-tiny").run_decoder(5, tp.strategy("fastv")),
        "inputs=5 found, expected the result of build_inputs(image, queries)",
    ),
    "no number of tokens": (
        lambda: tp.load("lisa-tiny").segment(PICTURE, "red", answer="generate", max_new_tokens="5"),
        "max_new_tokens: '5' found, expected a whole number of at least 1",
    ),
    "no model to compare on": (
        lambda: tp.compare(None, "shapes", ["none"]),
        "model=None found, expected a segmentation model, as tokenprune.load('lisa-tiny') gives, or its name; it has "
        "no name, no decoder, no encode_image, no build_inputs, no run_decoder, no segment, no grid_box",
    ),
    "no dataset": (
        lambda: tp.compare("lisa-tiny", None, ["none"]),
        "dataset=None found, expected a dataset, or the name of one, such as 'shapes'",
    ),
    "no strategies": (
        lambda: tp.compare("lisa-tiny", "shapes", [None]),
        "strategies=None found, expected names, texts such as 'csp:query=seg', or instances",
    ),
}
MARKS = (torch.arange(8) > 2)[None]
PICTURE = np.zeros((24, 32, 3), np.uint8)


def opened(model: Any, strategy: Any = None, **options: Any) -> None:
    with tp.prune(model, strategy or tp.strategy("fastv", layer=1, keep=2), **options):
        pytest.fail("the context was opened")


@pytest.mark.parametrize("case", REFUSED)
def test_an_argument_of_a_wrong_kind_is_told_by_its_name(case: str) -> None:
    call, message = REFUSED[case]
    with pytest.raises(tp.TokenPruneError) as told:
        call()
    assert str(told.value) == message


@pytest.mark.parametrize("seed", ["x", 1.5, None, True])
def test_seeds_are_whole_numbers(seed: Any) -> None:
    with pytest.raises(OptionError, match=r"seed: .* found, expected a whole number$"):
        opened(tiny_llama(), image_tokens=MARKS, seed=seed)


IGNORED: dict[str, Any] = {
    "grid": torch.zeros(1, 8, 2, dtype=torch.long),
    "image_number": MARKS.long(),
    "vision": VisionSource(),
}


@pytest.mark.parametrize("name", IGNORED)
def test_what_would_be_ignored_without_marks_is_refused(name: str) -> None:
    with pytest.raises(InputError, match=f"^{name}= was passed without image_tokens="):
        opened(FAMILIES["llava"].build(), **{name: IGNORED[name]})


def test_target_that_is_no_class_is_a_plugin_error() -> None:
    class Plugin:
        @tp.hookimpl
        def tokenprune_register_strategies(self, register: Any) -> None:
            register("gone", "tokenprune.errors:NotThere")

    registry.register_plugin(Plugin(), name="mine")
    with pytest.raises(PluginError, match="NotThere"):
        tp.strategy("gone")
