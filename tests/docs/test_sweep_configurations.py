"""Configurations of sweeps on the pages are such, and name every key."""

from __future__ import annotations

import re
from pathlib import Path

import yaml

from tokenprune.evaluation.contenders import contenders
from tokenprune.sweeps.config import SweepConfig

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "sweeps.md").read_text(encoding="utf-8")


def test_they_are_read() -> None:
    found = re.findall(r"^```yaml\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
    assert found
    for text in found:
        config = SweepConfig.model_validate(yaml.safe_load(text))
        assert config.datasets[-1].options == {"splitby": "umd"}
        assert len(contenders(config.strategies, config.budgets)) == 2 + 3 * 3


def test_every_key_is_in_the_table() -> None:
    rows = re.findall(r"^\| `(\w+)` \|", PAGE, re.MULTILINE)
    assert rows[: len(SweepConfig.model_fields)] == list(SweepConfig.model_fields)
