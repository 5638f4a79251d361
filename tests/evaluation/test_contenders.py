"""Which strategies compete: names, texts with options, instances, budgets."""

from __future__ import annotations

import json
from typing import Any

import pytest
from cli_fixtures import Runner, run
from fake_segmentation import Front, Whole
from hypothesis import given
from hypothesis import strategies as st

import tokenprune
from tokenprune.core.by_name import parse_text, split_list
from tokenprune.core.stage import Shape, declared_stages, equivalent_tokens
from tokenprune.errors import BudgetError, OptionError
from tokenprune.evaluation.contenders import contenders

__all__ = ["run"]  # the fixture, with which `front` is registered

WORD = st.from_regex(r"[a-z][a-z0-9+\-]{0,8}", fullmatch=True)
VALUES = st.recursive(
    st.integers(0, 99) | st.booleans() | st.none() | st.text('ab,=[]{}"\\\\', max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(WORD, inner, max_size=2),
    max_leaves=5,
)
OPTIONS = st.dictionaries(st.from_regex(r"[a-z][a-z_]{0,8}", fullmatch=True), VALUES, max_size=3)


@given(st.lists(st.tuples(WORD, OPTIONS), min_size=1, max_size=4))
def test_lists_split_into_what_they_were_joined_from(items: list[tuple[str, dict[str, Any]]]) -> None:
    texts = [
        name + (":" + ",".join(f"{key}={json.dumps(value)}" for key, value in options.items()) if options else "")
        for name, options in items
    ]
    assert split_list(",".join(texts)) == texts
    assert [parse_text(text) for text in texts] == items


@pytest.mark.parametrize("text", ["", "a,,b", "a,", "keep=1,a"])
def test_lists_that_cannot_be_read(text: str) -> None:
    with pytest.raises(OptionError, match="strategies"):
        split_list(text)


@pytest.mark.parametrize("text", ["fastv:keep", "fastv:keep=1,keep=2", "fastv:=1"])
def test_options_that_cannot_be_read_name_the_strategy(text: str) -> None:
    with pytest.raises(OptionError, match="'fastv'"):
        parse_text(text)


def test_lists_as_values() -> None:
    texts = split_list("none,pyramiddrop:layers=[1,2,3],positions=keep,fastv")
    assert texts == ["none", "pyramiddrop:layers=[1,2,3],positions=keep", "fastv"]
    assert parse_text(texts[1]) == ("pyramiddrop", {"layers": [1, 2, 3], "positions": "keep"})


def test_budgets_multiply_only_strategies_that_take_one() -> None:
    found = contenders(["none", "fastv:layer=3", "random"], [0.5, 0.25])
    assert [(c.strategy.name, c.budget) for c in found] == [
        ("none", None),
        ("fastv", 0.5),
        ("fastv", 0.25),
        ("random", 0.5),
        ("random", 0.25),
    ]
    assert found[1].strategy.options.layer == 3  # type: ignore[attr-defined]
    assert found[1].label == "fastv (layer=3) at 0.5"


def test_an_own_budget_goes_before_the_comparisons() -> None:
    found = contenders(["random:budget=0.4", "random:keep=7,budget=none"], [0.5, 0.25])
    assert [(c.budget, c.given) for c in found] == [(0.4, {}), (None, {"keep": 7})]


def test_presets_keep_the_budget_that_they_bring() -> None:
    found = contenders(["csp-65", "csp-70"], [0.9, 0.8])
    assert [c.budget for c in found] == [0.35, 0.3]


@pytest.mark.parametrize("name", ["front", "fastv", "divprune"])
def test_a_budget_beside_the_option_that_it_moves_is_a_ceiling(name: str, run: Runner) -> None:
    found = contenders([f"{name}:keep=0.25", f"{name}:keep=0.9"], [0.5, 0.4])
    assert [(c.budget, c.strategy.budget) for c in found] == [(0.5, 0.5), (0.4, 0.4)] * 2
    assert found[0].label == f"{name} (keep=0.25) at most 0.5"
    shape = Shape(layers=64, image_tokens=64)  # a late start weighs little
    within = equivalent_tokens(declared_stages(found[0].strategy.bind(shape), shape), shape) / 64
    assert 0.25 <= within <= 0.3
    with pytest.raises(BudgetError, match=r"cannot meet budget 0\.5 .* with options {'keep': 0\.9}"):
        found[2].strategy.bind(shape)


def test_instances_run_as_they_are() -> None:
    strategy = Front(keep=0.3)
    (found,) = contenders([strategy], [0.5, 0.25])
    assert found.strategy is strategy
    assert (found.budget, found.given) == (None, {"keep": 0.3})


def test_who_takes_a_budget() -> None:
    assert Front.takes_budget()
    assert not Whole.takes_budget()


@pytest.mark.parametrize("budget", ["x", "true", "2", "0", "-0.5"])
def test_own_budgets_are_checked(budget: str) -> None:
    with pytest.raises(BudgetError, match="budget"):
        contenders([f"random:budget={budget}"], 0.5)


def test_blanks_around_the_plus_of_a_composition() -> None:
    for text in ("visionzip + fastv", " visionzip+ fastv "):
        assert tokenprune.strategy(text).name == "visionzip+fastv"
    assert tokenprune.strategy("prumerge+ + fastv", budgets=(0.5, 0.5)).name == "prumerge++fastv"


def test_a_single_text_or_instance_stands_for_a_list() -> None:
    assert [c.strategy.name for c in contenders("none", 0.5)] == ["none"]
    (found,) = contenders("csp:query=seg,reentry=delta", 0.5)
    assert found.given == {"query": "seg", "reentry": "delta"}
    assert [c.strategy.name for c in contenders("none,fastv", 0.5)] == ["none", "fastv"]
    assert [c.strategy.name for c in contenders(Whole(), 0.5)] == ["whole"]


@pytest.mark.parametrize(
    ("strategies", "budget"),
    [
        ("none,none", 0.5),
        ("fastv:layer=3,csp,fastv:layer=3", 0.5),
        ("fastv,fastv:budget=0.5", 0.5),
        ("fastv", [0.5, 0.5]),
        ("visionzip+fastv,visionzip+fastv", 0.5),
    ],
)
def test_one_strategy_twice_is_refused(strategies: str, budget: object) -> None:
    with pytest.raises(OptionError, match="is asked for twice; leave one out"):
        contenders(strategies, budget)  # type: ignore[arg-type]


def test_what_differs_is_not_there_twice() -> None:
    assert len(contenders("fastv,fastv:layer=3,fastv:budget=0.25,csp-65,csp-70", 0.5)) == 5
    one, other = Front(), Front()
    one.held, other.held = 1, 2  # type: ignore[attr-defined]  # more than its options tell
    assert len(contenders([one, other], 0.5)) == 2
    with pytest.raises(OptionError, match="twice"):
        contenders([one, one], 0.5)


@pytest.mark.parametrize("budget", ["0.5", True, None, float("nan"), [0.5, "0.25"], b"x", {}, object()])
def test_budgets_that_are_no_shares(budget: object) -> None:
    with pytest.raises(BudgetError, match=r"budget.* in \(0, 1\]"):
        contenders("fastv", budget)  # type: ignore[arg-type]
