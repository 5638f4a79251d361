"""Extras that messages name: each is one of pyproject.toml, and all messages have one wording."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tokenprune.utils.extras import install_extra

tomllib = pytest.importorskip("tomllib")  # from Python 3.11
ROOT = Path(__file__).parents[2]
SOURCES = [file for folder in ("tokenprune", "strategies", "adapters") for file in (ROOT / folder).rglob("*.py")]


def test_messages_name_extras_that_are_there() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    named = [
        name for file in SOURCES for name in re.findall(r"install_extra\(['\"](\w+)['\"]\)", file.read_text("utf-8"))
    ]
    assert len(named) >= 6
    assert {*named} <= {*extras}
    assert install_extra("tune") == 'install the extra: pip install "tokenprune-vlm[tune]"'


def test_no_message_has_a_wording_of_its_own() -> None:
    worded = [file.name for file in SOURCES if "pip install" in (text := file.read_text("utf-8")) and "vlm[" in text]
    assert worded == ["extras.py"]
