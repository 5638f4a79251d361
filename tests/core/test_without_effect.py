"""Options that would change nothing are refused by `tokenprune.strategy`, and only those."""

from __future__ import annotations

from typing import Any

import pytest
from strategy_bench import Bench

import tokenprune as tp
from tokenprune.core.strategy import Strategy
from tokenprune.errors import OptionError
from tokenprune.evaluation.contenders import contenders

# a strategy, what is set beside, and an option with two values that then make no difference
IDLE: list[tuple[str, dict[str, Any], str, tuple[Any, Any]]] = [
    ("fastv", {}, "seed", (1, 2)),
    ("fastv", {"layer": 0}, "query", ("mask_query", "last")),
    ("fastv", {"layer": 0}, "query_reduce", ("mean", "max")),
    ("csp", {}, "seed", (1, 2)),
    ("csp", {"clustering": "uniform"}, "seed", (1, 2)),
    ("csp", {"clustering": "cls_attention"}, "seed", (1, 2)),
    ("csp", {}, "regions", (2, 9)),
    ("csp", {"clustering": "kmeans"}, "regions", (2, 9)),
    ("csp", {"clustering": "random"}, "segmenter", ("a", "b")),
    ("sparsevlm", {}, "seed", (1, 2)),
    ("sparsevlm", {"keep": (9, 5, 3)}, "table", (192, 64)),
    ("sparsevlm+", {"keep": (9, 5, 3)}, "table", (192, 64)),
    ("prumerge", {"keep": 7}, "ratio", (0.125, 0.5)),
    ("prumerge+", {"keep": 7}, "ratio", (0.125, 0.5)),
    ("prumerge", {"budget": 0.5}, "ratio", (0.125, 0.5)),
    ("prumerge+", {"budget": 0.5}, "ratio", (0.125, 0.5)),
    ("tome", {"where": "tower"}, "layers", ((1,), (3, 4))),
    ("litelvlm", {"positions": "keep"}, "order", ("chosen", "image")),
]
# the same options where they do make one
BUSY: list[tuple[str, dict[str, Any], str, tuple[Any, Any]]] = [
    ("fastv", {"layer": 0}, "seed", (1, 2)),
    ("csp", {"clustering": "random"}, "seed", (1, 2)),
    ("csp", {"clustering": "seg_first"}, "regions", (2, 9)),
    ("sparsevlm", {}, "table", (192, 64)),
    ("prumerge", {}, "ratio", (0.125, 0.5)),
    ("tome", {}, "layers", ((1,), (3, 4))),
    ("random", {}, "seed", (1, 2)),
]


def ran(name: str, options: dict[str, Any]) -> list[Any]:
    """What the class itself, which refuses nothing, keeps and merges of two rows."""
    kind: type[Strategy] = tp.strategies()[name].load()
    trace = Bench(kind(**options), [[36], [16, 9]]).run().trace
    return [(stage.layer, stage.kept, stage.active.tolist(), stage.parked.tolist()) for stage in trace.stages]


@pytest.mark.parametrize(("name", "beside", "option", "values"), IDLE)
def test_an_option_without_effect_is_refused(
    name: str, beside: dict[str, Any], option: str, values: tuple[Any, Any]
) -> None:
    assert ran(name, {**beside, option: values[0]}) == ran(name, {**beside, option: values[1]})
    for value in values:
        with pytest.raises(OptionError, match=rf"'{name.replace('+', '.')}': option '{option}' has no effect"):
            tp.strategy(name, **beside, **{option: value})
    tp.strategy(name, **beside)


@pytest.mark.parametrize(("name", "beside", "option", "values"), BUSY)
def test_an_option_with_an_effect_is_not(
    name: str, beside: dict[str, Any], option: str, values: tuple[Any, Any]
) -> None:
    first, second = (ran(name, {**beside, option: value}) for value in values)
    assert first != second
    for value in values:
        tp.strategy(name, **beside, **{option: value})


@pytest.mark.parametrize(
    ("name", "options", "option"),
    [
        ("pyramiddrop", {"faithful": True, "query": "seg"}, "query"),
        ("sparsevlm+", {"faithful": True, "heads": 3}, "heads"),
        ("csp", {"clustering": "seg_first", "segmenter": len, "seed": 3}, "seed"),
        ("csp", {"clustering": "seg_first", "segmenter": len, "regions": 3}, "regions"),
    ],
)
def test_more_options_without_effect(name: str, options: dict[str, Any], option: str) -> None:
    with pytest.raises(OptionError, match=f"option '{option}' has no effect"):
        tp.strategy(name, **options)


def test_parts_of_a_composition_are_held_to_it_too() -> None:
    with pytest.raises(OptionError, match="'fastv': option 'seed' has no effect"):
        tp.strategy("visionzip+fastv", parts=({}, {"seed": 3}))


def test_a_ratio_in_a_comparison_is_never_replaced_by_the_budget() -> None:
    with pytest.raises(OptionError, match="'ratio' has no effect with a budget"):
        contenders(["prumerge:ratio=0.125"], 0.35)
    (found,) = contenders(["prumerge:ratio=0.125,budget=none"], 0.35)
    assert found.strategy.budget is None


@pytest.mark.parametrize("name", ["fastv", "csp", "random", "sparsevlm"])
def test_what_moves_seeds_and_budgets_from_inside_is_not_refused(name: str) -> None:
    strategy = tp.strategy(name, budget=0.7).reseeded(3)
    assert strategy.options.seed == 3  # type: ignore[attr-defined]
    assert Bench(strategy, [[64]]).run().trace.stages
