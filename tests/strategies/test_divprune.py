"""DivPrune and `similarity`: the reference run's picks, copies, budgets, batches."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from strategy_bench import WIDTH, Bench
from torch import Tensor

import tokenprune
from tokenprune.core.stage import Shape, equivalent_tokens
from tokenprune.errors import BudgetError, OptionError
from tokenprune_strategies.divprune import DivPrune
from tokenprune_strategies.ops.farthest_point import farthest_first
from tokenprune_strategies.similarity import Similarity

QUICK = settings(max_examples=40, deadline=None)
BATCH = st.lists(st.lists(st.integers(1, 30), min_size=1, max_size=3), min_size=1, max_size=3)
AMOUNTS = st.one_of(st.integers(1, 40), st.floats(0.01, 1))
CASES = [(case, setting) for case in range(3) for setting in range(2)]


class States(Bench):
    """A bench on given states of one image."""

    def __init__(self, strategy: Any, states: Tensor) -> None:
        super().__init__(strategy, [[len(states)]])
        self.states = states[None].clone()

    def drawn(self, field: str, *shape: int) -> Tensor:
        return torch.zeros(1) if field.startswith("layer") else super().drawn(field, *shape)


@pytest.fixture(scope="module")
def reference(golden: Callable[[str], Path]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    folder = golden("divprune")
    return json.loads((folder / "case.json").read_text()), load_file(folder / "case.safetensors")


@pytest.mark.parametrize(("case", "setting"), CASES)
def test_picks_and_kept_tokens_are_those_of_the_reference_run(
    case: int, setting: int, reference: tuple[dict[str, Any], dict[str, Tensor]]
) -> None:
    about, tensors = reference
    (chosen,) = [s for s in about["settings"] if (s["case"], s["setting"]) == (case, setting)]
    rows, key = tensors[f"case{case}.visual_tokens"], f"case{case}.setting{setting}"
    for repeats in (False, True):
        order = farthest_first(
            rows[None],
            torch.ones(1, len(rows), dtype=torch.bool),
            torch.tensor([chosen["kept"]]),
            repeats=repeats,
        )
        assert order[0].tolist() == tensors[f"{key}.selection_order"].tolist()
    kept = tensors[f"{key}.kept_indices"].tolist()
    assert States(DivPrune(keep=chosen["ratio"]), rows).run().trace.stages[0].kept[0] == kept
    assert States(Similarity(layer=0, keep=chosen["kept"]), rows).run().trace.stages[0].kept[0] == kept
    copied = States(DivPrune(keep=chosen["ratio"], faithful=True), rows).run()
    assert copied.trace.stages[0].origin[0, : len(kept)].tolist() == kept
    torch.testing.assert_close(copied.states[0, : len(kept)], rows[kept], atol=0, rtol=0)


def nearest(distance: Tensor, picks: list[int]) -> Tensor:
    """For every row the distance to its nearest pick, before the first pick to its nearest other row."""
    others = distance + torch.eye(len(distance)) * 4
    near: Tensor = others[:, picks].amin(1) if picks else others.amin(1)
    near[picks] = -1
    return near


@QUICK
@given(st.integers(0, 10**6), st.integers(1, 25), st.integers(1, 25))
@example(131073, 22, 1)  # two rows that are each other's nearest: either may be the first pick
def test_farthest_first_is_its_definition(seed: int, size: int, count: int) -> None:
    states = torch.randn(size, 5, generator=torch.Generator().manual_seed(seed))
    padded = torch.cat((states, torch.full((3, 5), 7.0)))[None]
    exists = torch.arange(size + 3)[None] < size
    order = farthest_first(padded, exists, torch.tensor([min(count, size)]))[0].tolist()
    rows = torch.nn.functional.normalize(states.double(), dim=-1)
    distance = 1 - rows @ rows.T
    assert len(set(order)) == min(count, size)
    for step, pick in enumerate(order):
        near = nearest(distance, order[:step])
        assert near[pick] > near.max() - 1e-5


@QUICK
@given(BATCH, AMOUNTS, st.sampled_from([DivPrune, Similarity]))
def test_numbers_are_kept_and_a_row_is_itself_in_a_batch(
    rows: list[list[int]], keep: int | float, kind: type[DivPrune] | type[Similarity]
) -> None:
    strategy = kind(keep=keep)
    together = Bench(strategy, rows).run().trace
    for row, images in enumerate(rows):
        (stage,) = strategy.stages(Shape(12, sum(images)))
        alone = Bench(strategy, [images], seeds=[row]).run().trace
        assert len(together.stages[0].kept[row]) == stage.tokens
        assert together.stages[0].kept[row] == alone.stages[0].kept[0]


def test_every_image_of_a_row_chooses_for_itself() -> None:
    kept = Bench(DivPrune(keep=0.25), [[64, 16]]).run().trace.stages[0].kept[0]
    assert sum(token < 64 for token in kept) == 16
    assert sum(token >= 64 for token in kept) == 4


def test_copies_are_left_out_unless_the_reference_is_followed() -> None:
    distinct = torch.randn(4, WIDTH, generator=torch.Generator().manual_seed(3))
    rows = distinct[[0, 1, 0, 2, 2, 3, 1, 3, 0, 1, 2, 3]]
    once = States(DivPrune(keep=8), rows).run()
    assert len(set(once.trace.stages[0].kept[0])) == 8
    assert len(once.states[0, once.trace.stages[0].kept[0]].unique(dim=0)) == 4
    again = States(DivPrune(keep=8, faithful=True), rows).run().trace
    picks = farthest_first(rows[None], torch.ones(1, 12, dtype=torch.bool), torch.tensor([8]), repeats=True)
    assert len(set(picks[0].tolist())) < 8
    assert again.stages[0].origin[0, :8].tolist() == picks[0].sort().values.tolist()
    assert again.ledger.equivalent_tokens == 8
    with pytest.raises(OptionError, match="a token that is picked twice has only one position"):
        DivPrune(faithful=True, positions="keep")


def test_the_published_shares_give_the_published_numbers() -> None:
    def kept(share: float, total: int) -> int | None:
        return next(iter(DivPrune(keep=share).stages(Shape(4, total)))).tokens

    assert [kept(share, 576) for share in (0.098, 0.111, 0.222, 0.333)] == [56, 64, 128, 192]
    assert kept(0.5, 25) == 12  # half to even


@QUICK
@given(st.sampled_from([DivPrune, Similarity]), st.integers(3, 40), st.integers(4, 700), st.floats(0.01, 1))
def test_budgets_are_met_closely(
    kind: type[DivPrune] | type[Similarity], layers: int, total: int, budget: float
) -> None:
    shape = Shape(layers, total)
    if budget * total < 1:
        with pytest.raises(BudgetError):
            kind(budget=budget).bind(shape)
        return
    spent = equivalent_tokens(list(kind(budget=budget).bind(shape).stages(shape)), shape)
    assert budget * total - 1 - 1e-6 < spent <= budget * total + 1e-6


def test_what_cannot_be_met_is_refused() -> None:
    with pytest.raises(BudgetError, match=r"'divprune' cannot meet budget 0\.1 on 12 layers and 100"):
        DivPrune(budget=0.1, keep=20).bind(Shape(12, 100))
    with pytest.raises(BudgetError, match=r"'similarity' cannot meet budget 0\.1"):
        Similarity(budget=0.1, layer=6).bind(Shape(12, 100))
    for strategy in (Similarity(layer=12), Similarity(layer=12, budget=0.5)):
        with pytest.raises(OptionError, match=r"'layer': found 12, but the model has 12 layers"):
            Bench(strategy, [[16]])
    with pytest.raises(OptionError, match="unknown option 'layer'"):
        tokenprune.strategy("divprune", layer=2)
