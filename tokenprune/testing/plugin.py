"""pytest plugin: `pytest --tokenprune-strategy NAME` runs the conformance kit on any installed strategy.

pytest imports this module whenever tokenprune is installed: it must not have heavy imports.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tokenprune.core.by_name import parse_options
from tokenprune.errors import TokenPruneError
from tokenprune.plugins import registry

_KIT = Path(__file__).with_name("installed.py")


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the options."""
    group = parser.getgroup("tokenprune", "conformance of tokenprune strategies")
    group.addoption(
        "--tokenprune-strategy",
        action="append",
        default=[],
        metavar="NAME",
        help="run the conformance kit on this installed strategy instead of the project's tests (repeatable); paths "
        "that are named run as well",
    )
    group.addoption(
        "--tokenprune-options",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="an option of that strategy (repeatable)",
    )


def pytest_configure(config: pytest.Config) -> None:
    """Collect the kit if a strategy is named.

    Raises:
        UsageError: a strategy that is not installed, or options that are not KEY=VALUE.
    """
    names = config.getoption("--tokenprune-strategy")
    if config.getoption("--tokenprune-options") and not names:
        raise pytest.UsageError("--tokenprune-options: give --tokenprune-strategy NAME too")
    if not names:
        return
    options_of(config)
    for name in names:
        try:
            if "+" not in name:  # compositions are checked when they are made
                registry.get("strategies", name)
        except TokenPruneError as error:
            raise pytest.UsageError(f"--tokenprune-strategy: {error}") from error
    named = config.args if config.args_source == pytest.Config.ArgsSource.ARGS else []
    config.args = [*named, str(_KIT)]


def options_of(config: pytest.Config) -> dict[str, Any]:
    """The options, parsed as on tokenprune's command line."""
    try:
        return parse_options(config.getoption("--tokenprune-options"))
    except TokenPruneError as error:
        raise pytest.UsageError(f"--tokenprune-options: {error}") from error
