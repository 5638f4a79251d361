"""ToMe against a slow merge of its own, masses, budgets, batches, on a bench and on a decoder."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from strategy_bench import WIDTH, Bench
from torch import Tensor

import tokenprune
from tokenprune.core.reads import HiddenStates
from tokenprune.core.stage import Shape, equivalent_tokens
from tokenprune.errors import BudgetError, IncompatibleError, OptionError
from tokenprune.testing.tiny_decoders import tiny_llama
from tokenprune_strategies.ops.bipartite_matching import bipartite_merge
from tokenprune_strategies.tome import ToMe

QUICK = settings(max_examples=40, deadline=None)
BATCH = st.lists(st.lists(st.integers(1, 24), min_size=1, max_size=3), min_size=1, max_size=3)
AMOUNTS = st.one_of(st.integers(1, 40), st.floats(0.02, 1))
KINDS: list[dict[str, Any]] = [
    {},
    {"layers": (0, 3, 7), "match": "states"},
    {"layers": (1, 2, 5)},
    {"where": "tower"},
    {"where": "tower", "match": "states", "positions": "renumber"},
]


def merged_slowly(metric: Tensor, mass: Tensor, count: int, share: float) -> list[set[int]]:
    """The groups, from the definition, with Python lists."""
    groups = [{number} for number in range(len(metric))]

    def mean(group: set[int]) -> Tensor:
        index = sorted(group)
        return (metric[index] * mass[index, None]).sum(0) / mass[index].sum()

    while len(groups) > count:
        ours, theirs = groups[::2], groups[1::2]
        edges = []
        for a in range(len(ours)):
            likeness = [torch.cosine_similarity(mean(ours[a]), mean(b), dim=0).item() for b in theirs]
            best = max(range(len(theirs)), key=lambda b: likeness[b])
            edges.append((-likeness[best], a, best))
        most = min(len(groups) - count, max(1, int(share * len(groups))))
        merged = {a: b for _, a, b in sorted(edges)[:most]}
        for a, b in merged.items():
            theirs[b] |= ours[a]
        pairs = [ours[i : i + 1] * (i not in merged) + theirs[i : i + 1] for i in range(len(ours))]
        groups = [group for pair in pairs for group in pair]
    return groups


@QUICK
@given(st.integers(0, 10**6), st.integers(1, 20), st.integers(1, 20), st.sampled_from([0.1, 0.25, 0.5]))
def test_matching_is_its_definition(seed: int, size: int, count: int, share: float) -> None:
    draw = torch.Generator().manual_seed(seed)
    metric, mass = torch.randn(size, 4, generator=draw).double(), torch.randint(1, 4, (size,), generator=draw)
    into = bipartite_merge(metric.float(), mass.float(), count, share)
    found = sorted(sorted(j for j in range(size) if into[j] == k) for k in set(into.tolist()))
    assert found == sorted(sorted(group) for group in merged_slowly(metric, mass.double(), count, share))
    assert len(found) == min(size, count)


@QUICK
@given(BATCH, AMOUNTS, st.sampled_from(KINDS))
def test_numbers_masses_and_a_row_in_a_batch(rows: list[list[int]], keep: int | float, kind: dict[str, Any]) -> None:
    strategy = ToMe(keep=keep, **kind)
    bench = Bench(strategy, rows).run()
    for row, images in enumerate(rows):
        stages = list(strategy.stages(Shape(12, sum(images))))
        alone = Bench(strategy, [images], seeds=[row]).run()
        for declared, together, apart in zip(stages, bench.trace.stages, alone.trace.stages, strict=True):
            assert len(together.kept[row]) == declared.tokens
            assert together.kept[row] == apart.kept[0]
            assert together.mass[row].sum() == sum(images)
        torch.testing.assert_close(bench.states[row, : sum(images)], alone.states[0])


def test_a_merged_token_is_the_mean_of_what_it_stands_for() -> None:
    bench = Bench(ToMe(keep=0.2, layers=(0, 4), match="states"), [[20]])
    before = bench.states.clone()
    bench.enter(0)
    lineage, mass = bench.trace.stages[0].lineage, bench.trace.stages[0].mass
    assert lineage is not None
    for token in bench.trace.stages[0].kept[0]:
        carried = lineage[0, token]
        torch.testing.assert_close(bench.states[0, token], before[0, carried].mean(0))
        assert mass[0, token] == carried.sum()
    for layer in range(1, 5):
        bench.enter(layer)
    again = bench.trace.stages[1]
    assert again.lineage is not None
    for token in again.kept[0]:  # nothing moved in between: means by mass of means are means over all
        torch.testing.assert_close(bench.states[0, token], before[0, again.lineage[0, token]].mean(0))
    assert len(again.kept[0]) == 4


def test_like_tokens_go_together_and_images_stay_apart() -> None:
    bench = Bench(ToMe(keep=4, layers=(0,), match="states"), [[8, 8]])
    four = torch.eye(WIDTH)[:4]
    bench.states = torch.cat((four[[0, 0, 0, 0, 1, 1, 1, 1]], four[[2, 2, 2, 3, 3, 3, 3, 3]]))[None].clone()
    bench.enter(0)
    (stage,) = bench.trace.stages
    assert stage.lineage is not None
    groups = [stage.lineage[0, token].nonzero().flatten().tolist() for token in stage.kept[0]]
    assert sorted(groups) == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10], [11, 12, 13, 14, 15]]


def test_the_tower_merges_features_before_the_projector() -> None:
    bench = Bench(ToMe(where="tower", keep=5), [[12]])
    features = bench.drawn("features", 8)
    bench.run()
    (stage,) = bench.trace.stages
    assert stage.lineage is not None
    trace = Bench(ToMe(where="tower", keep=5), [[12]])
    trace.enter(0)
    for token in stage.kept[0]:
        mean = features[0, stage.lineage[0, token]].mean(0)
        torch.testing.assert_close(trace.states[0, token], mean[:WIDTH] * 2)  # the bench's projector
    with pytest.raises(IncompatibleError, match="TowerKeys"):
        Bench(ToMe(where="tower"), [[12]], readable=[HiddenStates])


@pytest.mark.parametrize("positions", ["keep", "renumber"])
def test_on_a_decoder_with_grouped_queries_and_half_precision(positions: str) -> None:
    llama = tiny_llama(layers=5, kv_heads=2).bfloat16()
    mask = torch.zeros(2, 30, dtype=torch.bool)
    mask[0, 4:20], mask[1, 9:29] = True, True
    strategy = ToMe(layers=(1, 3), keep=0.3, positions=positions)
    with torch.no_grad(), tokenprune.prune(llama, strategy, image_tokens=mask) as run:
        output = llama(torch.arange(60).reshape(2, 30))
    assert torch.isfinite(output.logits).all()
    assert [entry.image for entry in run.trace.ledger.entries] == [(16, 20), (10, 13), (10, 13), (4, 6), (4, 6)]


@QUICK
@given(st.sampled_from(KINDS), st.integers(9, 40), st.integers(4, 300), st.floats(0.05, 1))
def test_budgets_are_met_closely(kind: dict[str, Any], layers: int, total: int, budget: float) -> None:
    shape = Shape(layers, total)
    try:
        bound = ToMe(budget=budget, **kind).bind(shape)
    except BudgetError:
        least = ToMe(keep=1, **{"layers": (1,), **kind})
        assert equivalent_tokens(list(least.stages(shape)), shape) > budget * total
        return
    spent = equivalent_tokens(list(bound.stages(shape)), shape)
    assert budget * total - 1 - 1e-6 < spent <= budget * total + 1e-6


@pytest.mark.parametrize(
    ("options", "found"),
    [
        ({"layers": ()}, "one or more layers"),
        ({"layers": (3, 2)}, "each later than the one before"),
        ({"keep": 0}, "at least 1"),
        ({"where": "projector"}, "where"),
    ],
)
def test_bad_options_are_named(options: dict[str, Any], found: str) -> None:
    with pytest.raises(OptionError, match=found):
        tokenprune.strategy("tome", **options)


def test_layers_that_a_model_does_not_have_are_refused() -> None:
    for options in ({"layers": (2, 12)}, {"layers": (0, 2)}, {"layers": (12,), "budget": 0.5}):
        with pytest.raises(OptionError, match=r"choose among 1 … 11"):
            Bench(ToMe(**options), [[16]])
    with pytest.raises(BudgetError, match="'tome' cannot meet budget"):
        ToMe(budget=0.3, layers=(6,)).bind(Shape(12, 100))
