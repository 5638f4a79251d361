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
    first, second = (SweepConfig.model_validate(yaml.safe_load(text)) for text in found)
    assert [first.models[0].source, first.datasets[0].name] == ["lisa-tiny", "shapes"]  # which every installation has
    assert len(contenders(first.strategies, first.budgets)) == 1 + 2 * 2
    assert second.datasets[-1].options == {"splitby": "umd"}
    assert len(contenders(second.strategies, second.budgets)) == 2 + 3 * 3


def test_every_key_is_in_the_table() -> None:
    rows = re.findall(r"^\| `(\w+)` \|", PAGE, re.MULTILINE)
    assert rows[: len(SweepConfig.model_fields)] == list(SweepConfig.model_fields)
