"""none, blind, random, uniform, FastV: numbers, budgets, batches."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from strategy_bench import Bench

import tokenprune
from tokenprune.core.apportion import apportion
from tokenprune.core.options import tokens_of
from tokenprune.core.stage import Shape, equivalent_tokens
from tokenprune.errors import BudgetError, OptionError
from tokenprune_strategies.baselines import Blind, NoPruning, Random, Uniform
from tokenprune_strategies.fastv import FastV
from tokenprune_strategies.ops.even_and_random import even_cells, evenly

QUICK = settings(max_examples=40, deadline=None)
IMAGES = st.lists(st.integers(1, 40), min_size=1, max_size=3)
BATCH = st.lists(IMAGES, min_size=1, max_size=3)
AMOUNTS = st.one_of(st.integers(1, 60), st.floats(0.01, 1))


@QUICK
@given(st.integers(0, 80), st.lists(st.integers(0, 30), max_size=6), st.integers(0, 2))
def test_apportion_gives_everything_and_no_part_more_than_it_has(total: int, sizes: list[int], least: int) -> None:
    shares = apportion(total, sizes, least)
    assert sum(shares) == min(total, sum(sizes))
    assert all(0 <= share <= size for share, size in zip(shares, sizes, strict=True))
    filled = [size for size in sizes if size]
    if least == 1 and min(total, sum(sizes)) >= len(filled):
        assert all(share >= 1 for share, size in zip(shares, sizes, strict=True) if size)


@QUICK
@given(st.integers(1, 30), st.integers(1, 30), st.data())
def test_even_cells_are_exact_distinct_and_spread(rows: int, columns: int, data: st.DataObject) -> None:
    count = data.draw(st.integers(0, rows * columns))
    cells = even_cells(count, rows, columns)
    assert cells == sorted(set(cells))
    assert len(cells) == count
    assert all(0 <= cell < rows * columns for cell in cells)
    assert len(evenly(count, rows * columns)) == count


def test_a_quarter_of_a_grid_is_every_other_row_and_column() -> None:
    cells = torch.tensor(even_cells(64, 16, 16))
    assert (cells // 16).unique().tolist() == list(range(1, 16, 2))
    assert (cells % 16).unique().tolist() == list(range(1, 16, 2))


@QUICK
@given(BATCH, AMOUNTS, st.sampled_from([Random, Uniform]))
def test_baselines_keep_what_they_say_and_a_row_is_itself_in_a_batch(
    rows: list[list[int]], keep: int | float, kind: type[Random] | type[Uniform]
) -> None:
    strategy = kind(keep=keep)
    together = Bench(strategy, rows).run().trace
    for row, images in enumerate(rows):
        alone = Bench(strategy, [images], seeds=[row]).run().trace
        assert len(together.stages[0].kept[row]) == tokens_of(keep, sum(images))
        assert together.stages[0].kept[row] == alone.stages[0].kept[0]


def test_random_depends_on_its_seed_only() -> None:
    first, again, other = (Bench(Random(keep=8, seed=s), [[64]]).run().trace.stages[0].kept for s in (1, 1, 2))
    assert first == again != other


def test_uniform_serves_every_image_of_a_row() -> None:
    kept = Bench(Uniform(keep=0.25), [[64, 16]]).run().trace.stages[0].kept[0]
    assert sum(token < 64 for token in kept) == 16
    assert sum(token >= 64 for token in kept) == 4


def test_none_and_blind() -> None:
    untouched = Bench(NoPruning(), [[9], [4]]).run()
    assert untouched.trace.stages == []
    assert untouched.trace.ledger.equivalent_tokens_ratio == 1
    blind = Bench(Blind(), [[9], [4]]).run()
    assert not blind.state.active.any()
    assert blind.trace.ledger.equivalent_tokens == 0


@pytest.mark.parametrize("name", ["none", "blind"])
@pytest.mark.parametrize("budget", [0.35, 1.0])
def test_a_budget_that_moves_nothing_is_refused(name: str, budget: float) -> None:
    with pytest.raises(BudgetError, match=rf"'{name}' has nothing that a budget could move; leave budget= out"):
        tokenprune.strategy(name, budget=budget)
    with pytest.raises(BudgetError, match=rf"'{name}\+blind' has nothing that a budget could move"):
        tokenprune.strategy(f"{name}+blind", budget=budget)
    with pytest.raises(BudgetError, match=rf"'{name}\+fastv': option 'budgets': '{name}' has nothing"):
        tokenprune.strategy(f"{name}+fastv", budgets=(budget, None))
    assert tokenprune.strategy(name).budget is None
    assert tokenprune.strategy(f"{name}+fastv", budgets=(None, budget)).budget is None


@QUICK
@given(BATCH, st.integers(0, 11), AMOUNTS)
def test_fastv_keeps_the_most_attended(rows: list[list[int]], layer: int, keep: int | float) -> None:
    bench = Bench(FastV(layer=layer, keep=keep), rows)
    seen = bench.drawn("attention")
    trace = bench.run().trace
    for row, images in enumerate(rows):
        number = tokens_of(keep, sum(images))
        kept = trace.stages[0].kept[row]
        assert len(kept) == number
        if layer:
            assert kept == seen[row, : sum(images)].topk(number).indices.sort().values.tolist()
        alone = Bench(FastV(layer=layer, keep=keep), [images], seeds=[row]).run().trace
        assert kept == alone.stages[0].kept[0]


@QUICK
@given(st.sampled_from([Random, Uniform, FastV]), st.integers(3, 40), st.integers(4, 700), st.floats(0.01, 1))
def test_budgets_are_met_closely(kind: type[FastV], layers: int, total: int, budget: float) -> None:
    shape = Shape(layers, total)
    try:
        bound = kind(budget=budget).bind(shape)
    except BudgetError:
        least = kind(keep=1, **({"layer": 1} if kind is FastV else {}))
        assert equivalent_tokens(list(least.stages(shape)), shape) > budget * total
        return
    spent = equivalent_tokens(list(bound.stages(shape)), shape)
    assert spent <= budget * total + 1e-6
    assert spent > budget * total - 1 - 1e-6


@QUICK
@given(st.floats(0.1, 1), st.floats(0.1, 1))
def test_fastv_spends_more_on_a_larger_budget(one: float, other: float) -> None:
    shape, spent = Shape(32, 576), []
    for budget in sorted((one, other)):
        spent.append(equivalent_tokens(list(FastV(budget=budget).bind(shape).stages(shape)), shape))
    assert spent[0] <= spent[1]


def test_fastv_lowers_its_layer_only_when_it_must_and_may() -> None:
    shape = Shape(12, 256)
    assert FastV(budget=0.35).bind(shape).options.layer == 2
    assert FastV(budget=0.15).bind(shape).options.layer == 1
    with pytest.raises(BudgetError, match=r"'fastv' cannot meet budget 0\.15 on 12 layers and 256 image tokens"):
        FastV(budget=0.15, layer=2).bind(shape)
    with pytest.raises(BudgetError):
        FastV(budget=0.2, keep=0.5).bind(shape)


@pytest.mark.parametrize("name", ["csp", "fastv", "prumerge", "random", "uniform"])
def test_a_row_without_images_follows_the_others(name: str) -> None:
    strategy = tokenprune.strategy(name, budget=0.15)
    together = Bench(strategy, [[64], []]).run().trace
    alone = Bench(strategy, [[64]]).run().trace
    assert [stage.kept[0] for stage in together.stages] == [stage.kept[0] for stage in alone.stages]
    assert [stage.kept[1] for stage in together.stages] == [[]] * len(alone.stages)


@pytest.mark.parametrize(
    ("name", "options", "found"),
    [
        ("fastv", {"layr": 2}, "did you mean 'layer'"),
        ("fastv", {"keep": 0}, "at least 1"),
        ("fastv", {"keep": 1.5}, r"share of the image tokens must be in \(0, 1\]"),
        ("fastv", {"layer": -1}, "layer"),
        ("random", {"keep": -0.5}, "keep"),
        ("uniform", {"seed": 1}, "unknown option 'seed'"),
        ("blind", {"keep": 0.5}, "unknown option 'keep'"),
    ],
)
def test_bad_options_are_named(name: str, options: dict[str, float], found: str) -> None:
    with pytest.raises(OptionError, match=found):
        tokenprune.strategy(name, **options)


def test_fastv_names_a_layer_that_the_model_does_not_have() -> None:
    with pytest.raises(OptionError, match=r"'layer': found 12, but the model has 12 layers"):
        Bench(FastV(layer=12), [[16]])
    with pytest.raises(BudgetError):
        tokenprune.strategy("random", budget=0.0)


def test_a_draw_is_the_same_whatever_the_default_type_of_torch_is() -> None:
    kept = Bench(Random(keep=40), [[200]]).run().trace.stages[0].kept
    torch.set_default_dtype(torch.bfloat16)
    try:
        assert Bench(Random(keep=40), [[200]]).run().trace.stages[0].kept == kept
    finally:
        torch.set_default_dtype(torch.float32)
