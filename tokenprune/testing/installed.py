"""The tests that `pytest --tokenprune-strategy NAME` runs."""

from __future__ import annotations

from typing import Any

import pytest

from tokenprune.testing.plugin import options_of
from tokenprune.testing.strategy_conformance import StrategyConformance


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Every named strategy gets the whole kit."""
    names = metafunc.config.getoption("--tokenprune-strategy")
    metafunc.parametrize("_installed", names, indirect=True, scope="function")


class TestStrategy(StrategyConformance):
    """The kit on a strategy of the command line."""

    @pytest.fixture(autouse=True)
    def _installed(self, request: pytest.FixtureRequest) -> None:
        instance: Any = self
        instance.strategy, instance.options = request.param, options_of(request.config)
