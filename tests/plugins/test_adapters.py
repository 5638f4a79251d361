"""An adapter that misbehaves where it is asked what it knows is named; answers that do not fit are refused."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import tokenprune as tp
from tokenprune import Adapter, Keep, Stage, Strategy, TowerFeatures, hookimpl
from tokenprune.engine import VisionSource
from tokenprune.errors import InputError, PluginError
from tokenprune.plugins import registry
from tokenprune.testing.tiny_decoders import tiny_llama


class Bad(Adapter):
    """Raises, or answers with junk."""

    answer: Any = None

    @classmethod
    def matches(cls, source, config):
        raise KeyError("architectures")

    @classmethod
    def load(cls, source, **options):
        raise AssertionError("nothing matches")

    @classmethod
    def bind(cls, model):
        if cls.answer is None:
            raise AttributeError("no config")
        return cls.answer


class Plugin:
    @hookimpl
    def tokenprune_register_adapters(self, register):
        register("bad", Bad)


@pytest.fixture(autouse=True)
def _bad_plugin() -> Iterator[None]:
    registry.register_plugin(Plugin(), name="bad-plugin")
    yield
    registry.unregister_plugin("bad-plugin")


def test_an_adapter_that_raises_in_bind_is_named() -> None:
    with (
        pytest.raises(PluginError, match=r"'bad-plugin'.*adapter 'bad' failed in bind\(\) with AttributeError"),
        tp.prune(tiny_llama(), tp.strategy("uniform")),
    ):
        pass


def test_an_adapter_that_binds_junk_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Bad, "answer", "a model")
    with (
        pytest.raises(
            PluginError, match=r"adapter 'bad' returned 'a model' from bind\(\), expected a BoundModel or None"
        ),
        tp.prune(tiny_llama(), tp.strategy("uniform")),
    ):
        pass


def test_an_adapter_that_raises_in_matches_is_named(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "unheard-of"}')
    with pytest.raises(PluginError, match=r"adapter 'bad' failed in matches\(\) with KeyError"):
        tp.load(tmp_path)


@pytest.mark.parametrize("answer", [torch.zeros(16, 8), torch.zeros(1, 15, 8), [0.0] * 16])
def test_an_answer_that_is_not_lined_up_is_refused(answer: Any) -> None:
    class Look(Strategy):
        name = "look"

        def stages(self, shape):
            yield Stage("look", 0, reads=TowerFeatures())

        def choose(self, stage, tokens):
            return Keep.top(tokens.features.norm(dim=-1), 4)

    prompt = torch.arange(20)[None]
    source = VisionSource({TowerFeatures: lambda read: answer})
    image = (prompt > 1) & (prompt < 18)
    model = tiny_llama()
    with (
        pytest.raises(InputError, match=r"the answer to TowerFeatures has .*expected \[1, 16\]"),
        tp.prune(model, Look(), image_tokens=image, vision=source),
    ):
        model(prompt)
