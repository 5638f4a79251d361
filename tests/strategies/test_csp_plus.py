"""csp+: one layer with all tokens, its numbers under a budget, and what chooses representatives."""

from __future__ import annotations

from math import floor

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from strategy_bench import Bench

from tokenprune.core.reads import AttentionFrom, ClsAttention, Pixels
from tokenprune.core.stage import Shape
from tokenprune.errors import BudgetError, OptionError
from tokenprune_strategies.csp.csp import CSP
from tokenprune_strategies.csp.plus import CSPPlus


@settings(max_examples=60, deadline=None)
@given(st.integers(3, 60), st.integers(1, 700), st.floats(0.01, 1))
def test_one_layer_has_all_tokens_and_a_budget_is_spent_two_to_one(layers: int, total: int, budget: float) -> None:
    shape = Shape(layers, total)
    scatter_at = min(max(floor(layers / 4 + 0.5), 1), layers - 2)
    room = budget * total * layers + 1e-6
    try:
        stages = list(CSPPlus(budget=budget).bind(shape).stages(shape))
    except BudgetError:
        assert total + layers - 1 > room
        return
    (_, few), (scatter, everything), (prune, kept) = ((stage.layer, stage.tokens) for stage in stages)
    assert (scatter, prune, everything) == (scatter_at, scatter_at + 1, total)
    assert few is not None
    assert kept is not None

    def spent(few: int, kept: int) -> int:
        return scatter * few + total + (layers - prune) * kept

    assert spent(few, kept) <= room
    assert kept >= max(1, few // 2)
    assert few == total or spent(few + 1, max(1, (few + 1) // 2)) > room
    assert kept == total or spent(few, kept + 1) > room


def test_a_window_of_one_layer_for_csp_too() -> None:
    assert CSP(prune_at=None).boundaries(12) == (3, 4)
    assert CSP(prune_at=None, scatter_at=7).boundaries(12) == (7, 8)
    assert CSP(prune_at=None, scatter_at=0.99).boundaries(12) == (10, 11)
    assert CSPPlus(prune_at=6).boundaries(12) == (3, 6)
    with pytest.raises(OptionError, match="expected 0 < scatter_at < prune_at < 12"):
        CSP(prune_at=None, scatter_at=11).boundaries(12)


@pytest.mark.parametrize("cls", [True, False])
def test_representatives_are_those_of_cls_or_a_grid(cls: bool) -> None:
    shape = Shape(12, 256, readable=frozenset({AttentionFrom, Pixels, *((ClsAttention,) if cls else ())}))
    first = next(iter(CSPPlus().stages(shape)))
    assert first.reads == ((ClsAttention(),) if cls else ())
    assert next(iter(CSPPlus(faithful=True).stages(Shape(12, 256)))).reads == (ClsAttention(heads="joint"),)


@pytest.mark.parametrize(("given", "same"), [({}, "cls_attention"), ({"clustering": "grid"}, "grid")])
def test_choices_are_those_of_the_named_module(given: dict[str, str], same: str) -> None:
    bench, other = (
        Bench(CSPPlus(representatives=4, **given), [[16]]),
        Bench(CSP(clustering=same, representatives=4, prune_at=None), [[16]]),
    )
    for one in (bench, other):
        one.enter(0)
    assert torch.equal(bench.state.active, other.state.active)
    assert int(bench.state.active.sum()) == 4
