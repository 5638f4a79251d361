"""The page for those who come from other code: the strategies that it names for the authors' options are valid."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tokenprune import Shape
from tokenprune.evaluation.contenders import contenders
from tokenprune.plugins import registry

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "coming-from.md").read_text(encoding="utf-8")
TABLE = PAGE.split("## The authors' repositories")[1].split("**Their numbers")[0]
OURS = [row.rsplit(" | ", 1)[1] for row in re.findall(r"^\| (.+ \| .+) \|$", TABLE, re.MULTILINE)]
STRATEGIES = [
    text
    for cell in OURS
    for text in re.findall(r"`([^`]+)`", cell)
    if re.split(r"[: ]", text)[0] in registry.strategies()
]


def test_every_method_of_the_table_is_found() -> None:
    assert {text.split(":")[0] for text in STRATEGIES} == {
        *("fastv", "visionzip", "prumerge+", "sparsevlm", "sparsevlm+", "divprune", "pyramiddrop")
    }


@pytest.mark.parametrize("text", STRATEGIES)
def test_its_options_are_valid_and_need_no_budget(text: str) -> None:
    (contender,) = contenders(text + (",budget=none" if ":" in text else ":budget=none"), 0.35)
    assert contender.strategy.budget is None
    assert list(contender.strategy.bind(Shape(layers=32, image_tokens=576)).stages(Shape(layers=32, image_tokens=576)))
