"""Fixtures shared by all tests."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

pytest.register_assert_rewrite("segmentation_golden")


@pytest.fixture(scope="session")
def golden() -> Callable[[str], Path]:
    """`golden("lisa")`: folder of that reference data, or a skip that says where it was looked for."""
    default = Path(__file__).resolve().parents[2] / "shared" / "golden"
    root = Path(os.environ.get("TOKENPRUNE_GOLDEN", default))

    def folder(name: str) -> Path:
        found = root / name
        if not found.is_dir():
            pytest.skip(f"no reference data at {found}; set TOKENPRUNE_GOLDEN to the folder that holds {name!r}")
        return found

    return folder
