"""The budget solver: by what ladders it goes, against a scan of all settings; once for each shape."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import Field

import tokenprune
from tokenprune import Keep, Shape, Stage, Strategy, StrategyOptions
from tokenprune.core.budget import equivalent_tokens_with
from tokenprune.core.options import Amount, tokens_of
from tokenprune.core.scheduling.plan import plan
from tokenprune.core.trace import Trace
from tokenprune.errors import BudgetError, OptionError, PluginError
from tokenprune.testing.tiny_decoders import tiny_llama


class Late(Strategy):
    """Keeps the first tokens from a layer on; a setting below `least` tokens is not allowed."""

    name = "late"
    budget_option = "keep"
    budget_layer = ("layer", 1)

    class Options(StrategyOptions):
        layer: int = 3
        keep: Amount = 0.5
        least: int = 1

    options: Options

    def stages(self, shape: Shape) -> Iterator[Stage]:
        count = tokens_of(self.options.keep, shape.image_tokens)
        if count < min(self.options.least, shape.image_tokens) or self.options.layer >= shape.layers:
            raise OptionError(f"strategy 'late': {count} tokens at layer {self.options.layer}")
        yield Stage("prune", self.options.layer, count)

    def choose(self, stage, tokens):
        return Keep.top(-torch.arange(tokens.exists.shape[1]).expand_as(tokens.exists).float(), tokens.target)


def scanned(strategy: Strategy, budget: float, shape: Shape) -> dict[str, int] | None:
    """The first setting that fits, by trying all of them: most tokens first, then a layer sooner."""
    first = min(strategy.options.layer, shape.layers - 1)
    for layer in range(max(1, first), 0, -1):
        for keep in range(shape.image_tokens, 0, -1):
            spent = equivalent_tokens_with(strategy, {"layer": layer, "keep": keep}, shape)
            if spent * shape.layers <= budget * shape.image_tokens * shape.layers + 1e-6:
                return {"layer": layer, "keep": keep}
    return None


@given(layers=st.integers(2, 9), total=st.integers(1, 40), budget=st.floats(0.01, 1), least=st.integers(1, 12))
def test_the_first_setting_that_fits(layers: int, total: int, budget: float, least: int) -> None:
    strategy, shape = Late(budget=budget, least=least), Shape(layers, total)
    wanted = scanned(strategy, budget, shape)
    if wanted is None:
        with pytest.raises(BudgetError, match="the smallest possible budget is"):
            strategy.bind(shape)
        return
    found = strategy.bind(shape).options
    assert {"layer": found.layer, "keep": found.keep} == wanted


def test_what_the_user_set_stays() -> None:
    shape = Shape(8, 20)
    assert Late(budget=0.9, keep=5).bind(shape).options.keep == 5
    assert Late(budget=0.5, layer=2).bind(shape).options.layer == 2
    with pytest.raises(BudgetError, match=r"cannot meet budget 0.2 .* with options \{'layer': 2\}"):
        Late(budget=0.2, layer=2).bind(shape)
    with pytest.raises(OptionError, match="20 tokens at layer 8"):
        Late(budget=0.5, layer=8).bind(shape)


class Shares(Late):
    """The same by shares."""

    name = "shares"
    budget_layer = None

    class Options(StrategyOptions):
        keep: float = Field(0.5, gt=0, le=1)
        layer: int = 0
        least: int = 1


def test_shares_where_the_option_takes_no_numbers() -> None:
    assert Shares(budget=0.36).bind(Shape(4, 25)).options.keep == 9 / 25


def test_a_budget_is_solved_once_for_each_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    model, strategy = tiny_llama(6), tokenprune.strategy("fastv", budget=0.5)
    made: list[type] = []
    plain = StrategyOptions.__init__
    monkeypatch.setattr(StrategyOptions, "__init__", lambda self, **kw: (made.append(type(self)), plain(self, **kw))[1])

    def prefill(image: int) -> Trace:
        marks = torch.zeros(1, 40, dtype=torch.bool)
        marks[:, 1 : 1 + image] = True
        with torch.no_grad(), tokenprune.prune(model, strategy, image_tokens=marks) as run:
            model(input_ids=torch.arange(40)[None])
        return run.trace

    first = prefill(20)
    assert made
    made.clear()
    assert prefill(20).strategy == first.strategy
    assert not made
    assert prefill(30).strategy != first.strategy
    assert made


@pytest.mark.parametrize("budget", [0.35, None])
def test_a_stage_of_more_tokens_than_there_are_is_the_reason_told(budget: float | None) -> None:
    class Many(Strategy):
        name = "many"
        budget_option = "keep"

        class Options(StrategyOptions):
            keep: float = 0.5

        def stages(self, shape: Shape) -> Iterable[Stage]:
            yield Stage("most", 0, 4 * shape.image_tokens)

        def choose(self, stage: Stage, tokens: Any) -> Any: ...

    with pytest.raises(PluginError, match=r"'many', stage 'most': declares 256 tokens of 64; expected 0 … 64"):
        plan(Many(budget=budget), [Shape(layers=4, image_tokens=64)])


class Unknown(Late):
    """Does not say how many tokens it keeps."""

    name = "unknown"

    def stages(self, shape: Shape) -> Iterator[Stage]:
        yield Stage("prune", self.options.layer)


def test_a_stage_without_a_number_of_tokens_is_the_reason_told() -> None:
    with pytest.raises(BudgetError) as told:
        Unknown(budget=0.5).bind(Shape(4, 16, 0))
    assert str(told.value) == (
        "strategy 'unknown' cannot meet budget 0.5: stage 'prune' keeps a number of tokens that depends on the image; "
        "use fixed numbers for budgets"
    )
