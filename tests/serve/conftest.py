"""Skips the tests of servers, with a reason, where the extra is not installed."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from tokenprune.serve.limits import NEEDED

LACKING = [name for name in (*NEEDED, "httpx") if importlib.util.find_spec(name) is None]


class Lacking(pytest.File):
    """A test file that cannot be imported."""

    def collect(self) -> list[pytest.Item]:
        """None of its tests."""
        pytest.skip(f"servers need {', '.join(LACKING)}: pip install -e '.[test]'", allow_module_level=True)


def pytest_pycollect_makemodule(module_path: Path, parent: pytest.Collector) -> pytest.File | None:
    """Skip the file instead of importing it."""
    return Lacking.from_parent(parent, path=module_path) if LACKING else None
