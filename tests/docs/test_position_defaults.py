"""What pages say about the position policy that is the default of a strategy."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import tokenprune as tp
from tokenprune.plugins import registry

DOCS = Path(__file__).resolve().parents[2] / "docs"
OWN = [name for name, entry in registry.strategies().items() if entry.distribution == "tokenprune-vlm"]
DEFAULTS = {name: tp.strategy(name).positions for name in OWN}


def named(page: str, sentence: str) -> set[str]:
    """The strategies in the part of a page that `sentence` describes; its group is what counts."""
    text = " ".join((DOCS / page).read_text(encoding="utf-8").split())
    found = re.search(sentence, text)
    assert found, f"{page} has no sentence like {sentence}"
    return set(re.findall(r"`([^`]+)`", found[1])) & set(DEFAULTS)


def test_the_page_on_compatibility_names_all_that_renumber() -> None:
    said = named("compatibility.md", r"It is the default of (.*?)\. ")
    assert said == {name for name, policy in DEFAULTS.items() if policy == "renumber"}


@pytest.mark.parametrize(
    ("policy", "sentence"),
    [
        ("renumber", r"methods made for question answering, such as (.*?), renumber"),
        ("keep", r"others, such as (.*?), keep them"),
    ],
)
def test_the_answer_on_masks_names_methods_of_each_default(policy: str, sentence: str) -> None:
    said = named("faq.md", sentence)
    assert len(said) > 1
    assert {DEFAULTS[name] for name in said} == {policy}


def test_the_table_of_positions_has_each_default() -> None:
    rows = re.findall(r"^\| `([^`]+)` \| (keep|renumber) \|", (DOCS / "positions.md").read_text("utf-8"), re.MULTILINE)
    assert len(rows) > 20
    assert {name: DEFAULTS[name] for name, _ in rows} == dict(rows)
