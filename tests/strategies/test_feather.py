"""FEATHER against the reference run of the authors' decoder, and what holds for any input."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from golden_llama import Reference, run
from hypothesis import given, settings
from hypothesis import strategies as st
from strategy_bench import Bench, layout_of
from torch import Tensor

import tokenprune as tp
from tokenprune.core.scheduling.plan import declared_ledger
from tokenprune.core.stage import Shape, equivalent_tokens
from tokenprune.errors import BudgetError, IncompatibleError, OptionError
from tokenprune.testing.tiny_decoders import tiny_llama
from tokenprune_strategies.feather.counts import grid_size
from tokenprune_strategies.feather.feather import Feather

QUICK = settings(max_examples=40, deadline=None)
IMAGES = st.lists(st.integers(1, 60), min_size=1, max_size=3)
SQUARES = st.lists(st.sampled_from([1, 4, 9, 16, 25, 49, 64]), min_size=1, max_size=3)
BATCH = st.lists(IMAGES, min_size=1, max_size=3)
STRIDES = st.sampled_from([0, 2, 3, 4])
REMOVED = st.one_of(st.sampled_from([0.0, 0.5, 0.7]), st.floats(0, 0.99))


@pytest.fixture(scope="module")
def case(golden: Callable[[str], Path]) -> Reference:
    return Reference.read(golden("feather"))


@pytest.fixture(scope="module", params=["eager", "sdpa"])
def llama(request: pytest.FixtureRequest, case: Reference) -> Any:
    return case.llama(request.param)


def theirs(chosen: dict[str, Any]) -> Feather:
    """The options that a setting of the authors' means."""
    stride = chosen["stride"] or 0
    return Feather(layers=chosen["fastv_k"], removed=chosen["fastv_ratio_removed"], stride=stride, faithful=True)


@pytest.mark.parametrize("setting", [0, 1, 2])
def test_golden_scores_kept_tokens_logits_and_decoding(setting: int, llama: Any, case: Reference) -> None:
    chosen, tensors, name = case.about["settings"][setting], case.tensors, f"setting{setting}"
    fed = tensors[f"{name}.decode_token_ids"].tolist()
    found = run(llama, theirs(chosen), tensors["inputs_embeds"], case.image_tokens(), fed)
    before = torch.arange(case.about["IMG"])
    assert len(found.trace.stages) == len(chosen["fastv_k"])
    for number, stage in enumerate(found.trace.stages):
        assert stage.scores is not None
        scores = tensors[f"{name}.stage{number}.scores"]
        torch.testing.assert_close(stage.scores[0, before], scores, atol=1e-6, rtol=0)
        before = tensors[f"{name}.stage{number}.kept_image"]
        assert stage.kept[0] == before.tolist()
    assert found.rows() == tensors[f"{name}.kept_positions"].tolist()
    lengths = [entry.image[0] + entry.other[0] for entry in found.trace.ledger.entries]
    assert lengths == chosen["layer_input_lengths"]
    assert found.kv_lengths == chosen["kv_lengths_after_decode"]
    torch.testing.assert_close(found.logits[:, found.rows()], tensors[f"{name}.logits"], atol=1e-4, rtol=0)
    torch.testing.assert_close(found.hidden[:, found.rows()], tensors[f"{name}.last_hidden"], atol=1e-4, rtol=0)
    torch.testing.assert_close(found.decoded, tensors[f"{name}.decode_logits"], atol=1e-4, rtol=0)


@pytest.mark.parametrize("setting", [0, 1])
def test_golden_choice_is_part_of_the_default_one_which_has_a_known_number(setting: int, case: Reference) -> None:
    chosen = case.about["settings"][setting]
    removed, stride = chosen["fastv_ratio_removed"], chosen["stride"]
    strategy = Feather(layers=chosen["fastv_k"], removed=removed, stride=stride)
    first, second = run(case.llama(), strategy, case.tensors["inputs_embeds"], case.image_tokens()).trace.stages
    size = grid_size(144, stride)
    assert len(first.kept[0]) == chosen["top_counts"][0] + size
    assert set(case.tensors[f"setting{setting}.stage0.kept_image"].tolist()) <= set(first.kept[0])
    assert len(second.kept[0]) == round(len(first.kept[0]) * (1 - removed) ** 2)


def grid_of(tokens: list[int], stride: int) -> set[int]:
    """A square is laid out row by row; of other images, which have no cells here, it is every stride²-th token."""
    if not stride:
        return set()
    side = round(len(tokens) ** 0.5)
    if side * side != len(tokens):
        return set(tokens[:: stride**2])
    return {token for place, token in enumerate(tokens) if not place // side % stride and not place % side % stride}


@QUICK
@given(BATCH, REMOVED, STRIDES)
def test_every_image_of_every_row_is_as_the_slow_reference(rows: list[list[int]], removed: float, stride: int) -> None:
    strategy = Feather(removed=removed, stride=stride)
    bench = Bench(strategy, rows)
    scores = bench.drawn("attention")
    planned = bench.planned[0]
    images_of = bench._view(planned, bench.state, planned.target).images()
    quotas = {(image.row, image.image): image.quota for image in images_of}
    trace = bench.run().trace
    for row, images in enumerate(rows):
        first, second = (stage.kept[row] for stage in trace.stages)
        alone = Bench(strategy, [images], seeds=[row]).run().trace
        assert [first, second] == [stage.kept[0] for stage in alone.stages]
        assert [len(first), len(second)] == [stage.tokens for stage in strategy.stages(Shape(12, sum(images)))]
        start, expected = 0, []
        for number, size in enumerate(images):
            own = list(range(start, start + size))
            ranked, grid = sorted(own, key=lambda token: -scores[row, token]), grid_of(own, stride)
            order = [token for token in ranked if token in grid] + [token for token in ranked if token not in grid]
            expected += sorted(order[: quotas[row, number]])
            start += size
        assert first == expected
        assert set(second) <= set(first)


@QUICK
@given(st.lists(SQUARES, min_size=1, max_size=3), REMOVED, STRIDES)
def test_faithful_joins_the_truncated_best_and_the_grid(rows: list[list[int]], removed: float, stride: int) -> None:
    bench = Bench(Feather(removed=removed, stride=stride, faithful=True), rows)
    scores, trace = bench.drawn("attention"), bench.run().trace
    share = 1 - removed
    for row, images in enumerate(rows):
        start, first, second = 0, [], []
        for size in images:
            own = list(range(start, start + size))
            ranked = sorted(own, key=lambda token: -scores[row, token])
            kept = {*ranked[: int(size * share)]} | grid_of(own, stride)
            factor = share * share if stride else share
            first += sorted(kept)
            second += sorted([token for token in ranked if token in kept][: int(len(kept) * factor)])
            start += size
        assert [first, second] == [stage.kept[row] for stage in trace.stages]


def on_grid(rows: int, columns: int, stride: int, **options: Any) -> set[tuple[int, int]]:
    """The cells of an image of rows × columns that stay at the first stage."""
    marks = torch.zeros(1, rows * columns + 6, dtype=torch.bool)
    marks[0, 3:-3] = True
    grid = torch.full((1, rows * columns + 6, 2), -1)
    cells = torch.cartesian_prod(torch.arange(rows), torch.arange(columns))
    grid[0, 3:-3] = cells
    strategy, model = Feather(layers=(1, 2), stride=stride, **options), tiny_llama(4)
    with torch.no_grad(), tp.prune(model, strategy, image_tokens=marks, grid=grid) as found:
        model(torch.arange(rows * columns + 6)[None] % 60)
    return {(cells[token, 0].item(), cells[token, 1].item()) for token in found.trace.stages[0].kept[0]}


@pytest.mark.parametrize(("rows", "columns"), [(4, 9), (9, 4), (6, 6), (5, 8)])
def test_the_grid_is_that_of_the_image_whatever_its_sides(rows: int, columns: int) -> None:
    expected = {(y, x) for y in range(0, rows, 3) for x in range(0, columns, 3)}
    kept = on_grid(rows, columns, 3)
    assert expected <= kept
    assert len(kept) == int(rows * columns * 0.3 + 1e-6) + grid_size(rows * columns, 3)
    assert on_grid(rows, columns, 3, keep=(len(expected), 1)) == expected
    few = on_grid(rows, columns, 3, keep=(2, 1))
    assert len(few) == 2
    assert few <= expected


def test_only_square_images_are_the_authors() -> None:
    with pytest.raises(OptionError, match=r"'faithful': found an image of 12 tokens.*square"):
        Bench(Feather(faithful=True), [[16, 12]]).run()
    assert Bench(Feather(faithful=True, stride=0), [[12]]).run().trace.stages[0].kept


def test_attention_is_without_rotation_and_over_image_tokens_alone() -> None:
    """A text token more or less between image and query row changes rotary distances, but not these scores."""
    model = tiny_llama(4)
    embeds = torch.randn(1, 30, model.config.hidden_size, generator=torch.Generator().manual_seed(0))
    scores: list[Tensor] = []
    for gap in (0, 3):
        given = torch.cat((embeds[:, :20], embeds[:, 20 : 20 + gap], embeds[:, 25:]), 1)
        marks = torch.zeros(given.shape[:2], dtype=torch.bool)
        marks[0, 4:20] = True
        with torch.no_grad(), tp.prune(model, Feather(layers=(1, 2)), image_tokens=marks) as found:
            model(inputs_embeds=given)
        assert found.trace.stages[0].scores is not None
        scores.append(found.trace.stages[0].scores)
    torch.testing.assert_close(scores[0].sum(), torch.tensor(1.0))
    torch.testing.assert_close(*scores)


@QUICK
@given(st.integers(4, 40), st.integers(1, 700), st.floats(0.01, 1), STRIDES)
def test_budgets_are_met_within_a_token(layers: int, total: int, budget: float, stride: int) -> None:
    shape = Shape(layers, total)
    try:
        bound = Feather(budget=budget, stride=stride).bind(shape)
    except BudgetError:
        least = Feather(layers=(1, 2), keep=(1, 1))
        assert equivalent_tokens(list(least.stages(shape)), shape) > budget * total
        return
    spent = equivalent_tokens(list(bound.stages(shape)), shape)
    assert budget * total - 1 - 1e-6 < spent <= budget * total + 1e-6


def test_published_numbers_are_the_most_that_the_authors_keep() -> None:
    for total, counts in ((576, (236, 21)), (256, (112, 10))):
        stages = list(Feather().stages(Shape(32, total)))
        assert [(stage.layer, stage.tokens) for stage in stages] == [(8, counts[0]), (16, counts[1])]


def test_what_the_user_set_stays() -> None:
    shape = Shape(32, 576)
    assert Feather(budget=0.3, layers=(4, 12)).bind(shape).options.layers == (4, 12)
    keep = Feather(budget=0.3, keep=(300, 20)).bind(shape).options
    assert keep.keep == (300, 20)
    assert keep.layers[0] < 8
    with pytest.raises(BudgetError, match=r"'feather' cannot meet budget 0\.2 on 32 layers"):
        Feather(budget=0.2, layers=(8, 16)).bind(shape)
    assert Feather(budget=0.35).bind(shape).options.layers == (8, 16)


def test_what_options_cannot_mean() -> None:
    with pytest.raises(OptionError, match="'layers' and 'keep': found 2 and 3 values"):
        Feather(keep=(9, 6, 3))
    with pytest.raises(OptionError, match="found 3 with faithful=True"):
        Feather(layers=(1, 2, 3), faithful=True)
    with pytest.raises(BudgetError, match="faithful=True the number of tokens depends on the image"):
        Feather(budget=0.5, faithful=True)
    with pytest.raises(OptionError, match=r"would keep \[4, 8\] image tokens, expected no more in a stage"):
        list(Feather(keep=(4, 8)).stages(Shape(12, 16)))
    with pytest.raises(IncompatibleError, match="'feather' has 2 stages after the first layer, and the model has 2"):
        list(Feather().stages(Shape(2, 16)))
    for options, beside in (
        ({"removed": 0.5}, {"keep": (8, 4)}),
        ({"removed": 0.5}, {"budget": 0.5}),
        ({"query": "seg"}, {"faithful": True}),
        ({"keep": (8, 4)}, {"faithful": True}),
    ):
        with pytest.raises(OptionError, match=f"'feather': option '{next(iter(options))}' has no effect"):
            tp.strategy("feather", **options, **beside)
    for bad in ({"removed": 1.0}, {"stride": -1}, {"layers": ()}, {"positions": "move"}):
        with pytest.raises(OptionError, match=next(iter(bad))):
            tp.strategy("feather", **bad)


def test_a_grid_of_all_tokens_is_refused() -> None:
    with pytest.raises(
        OptionError, match=r"'stride': found 1, with which the grid has every token .* use 2 or more, or 0"
    ):
        tp.strategy("feather", stride=1)


def test_rows_without_images_and_the_declared_ledger() -> None:
    layout = layout_of([[16], []])
    assert layout.counts.tolist() == [16, 0]
    kept = Bench(Feather(), [[16], []]).run().trace.stages[0].kept
    assert len(kept[0]) == 4 + 4
    assert kept[1] == []
    ledger = declared_ledger(Feather(layers=(2, 4)), Shape(6, 36, 8))
    assert [len(entry.ahead) for entry in ledger.entries] == [0, 1, 0, 1, 0, 0]
