"""A model that is loaded in another thread changes settings of the process for a time: no strategy is blamed for it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from meetings import PATIENCE, Stop, started

import tokenprune as tp
from tokenprune.core.decisions import Keep
from tokenprune.core.stage import Stage
from tokenprune.core.strategy import Strategy
from tokenprune.engine import prune
from tokenprune.errors import PluginError
from tokenprune.loading.adapter import Adapter
from tokenprune.plugins import registry
from tokenprune.testing.tiny_decoders import tiny_llama

LOADS: list[Stop] = []


class Slow(Adapter):
    """Loads as transformers does: under another default type, for as long as it takes."""

    @classmethod
    def matches(cls, source: str, config: Any) -> bool:
        """By architecture."""
        return config.get("architectures") == ["Slow"]

    @classmethod
    def load(cls, source: str, **options: Any) -> Any:
        """A tensor of the default type."""
        before = torch.get_default_dtype()
        torch.set_default_dtype(torch.float64)
        try:
            LOADS[-1]()
            return torch.ones(1)
        finally:
            torch.set_default_dtype(before)


class Plugin:
    """Registers it."""

    @tp.hookimpl
    def tokenprune_register_adapters(self, register: Any) -> None:
        """`slow`."""
        register("slow", Slow)


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    (tmp_path / "config.json").write_text('{"architectures": ["Slow"]}')
    registry.register_plugin(Plugin(), name="slow-plugin")
    yield tmp_path
    registry.unregister_plugin("slow-plugin")


class Meeting(Strategy):
    """Calls `meet` while it chooses."""

    name = "meeting"
    meet: Any

    def stages(self, shape: Any) -> Any:
        """One."""
        return [Stage("only", 1)]

    def choose(self, stage: Any, tokens: Any) -> Any:
        """All."""
        self.meet()
        return Keep.where(tokens.exists)


def run(meet: Any) -> None:
    model, strategy = tiny_llama(2), Meeting()
    strategy.meet = meet
    with torch.no_grad(), prune(model, strategy, image_tokens=torch.ones(1, 4, dtype=torch.bool), strict=True):
        model(torch.arange(4)[None])


@pytest.mark.parametrize("case", ["begins", "ends", "both"])
def test_a_load_beside_a_choice(folder: Path, case: str) -> None:
    stop = Stop()
    LOADS.append(stop)
    others = []

    def begin() -> None:
        others.append(started(lambda: tp.load(folder)))
        stop.wait()

    def end() -> None:
        stop.go.set()
        assert others[0].result(PATIENCE).dtype == torch.float64

    if case == "ends":
        begin()
    try:
        run(lambda: [step() for step in {"begins": (begin,), "ends": (end,), "both": (begin, end)}[case]])
    finally:
        stop.go.set()
    assert others[0].result(PATIENCE).dtype == torch.float64
    assert torch.get_default_dtype() == torch.float32


def test_without_one_a_strategy_is_blamed_and_the_setting_put_back() -> None:
    with pytest.raises(PluginError, match=r"'meeting'.*changed the default type"):
        run(lambda: torch.set_default_dtype(torch.float64))
    assert torch.get_default_dtype() == torch.float32
