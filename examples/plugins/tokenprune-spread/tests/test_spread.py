"""The strategy `spread`: the conformance kit for strategies, and tests of this one."""

from __future__ import annotations

import pytest
import torch
from tokenprune_spread.strategy import taken

import tokenprune as tp
from tokenprune.testing.strategy_conformance import StrategyConformance


class TestSpread(StrategyConformance):
    """Keep-all is the untouched model, a batch is its rows, budgets are met, nothing stays on the model, and more."""

    strategy = "spread"


def test_it_is_installed() -> None:
    assert tp.strategies()["spread"].distribution == "tokenprune-spread"


def test_of_equal_tokens_one_is_taken_first() -> None:
    """Three groups of tokens that look alike: the first three taken are one of each."""
    group = torch.tensor([[0, 0, 0, 0, 1, 2, 2, 0]])
    states = torch.eye(8)[group]
    order = taken(states, torch.ones(1, 8, dtype=torch.bool), 3)
    assert sorted(group[order.isfinite()].tolist()) == [0, 1, 2]


def test_each_token_taken_is_the_farthest_from_those_before() -> None:
    torch.manual_seed(0)
    states = torch.nn.functional.normalize(torch.randn(1, 12, 4), dim=-1)
    order = taken(states, torch.ones(1, 12, dtype=torch.bool), 6)[0]
    sequence = order.argsort()[:6].tolist()
    for step in range(1, 6):
        distances = torch.cdist(states[0], states[0, sequence[:step]]).min(1).values
        assert distances.argmax() == sequence[step]


def test_padding_is_never_taken() -> None:
    states, active = torch.ones(2, 5, 8), torch.ones(2, 5, dtype=torch.bool)
    active[1, 2:] = False
    order = taken(states, active, 5)
    assert order.isfinite().sum(1).tolist() == [5, 2]
    assert order[1, :2].tolist() == [0, 1]
    assert not order[1, 2:].isfinite().any()


def test_a_bad_option_is_refused() -> None:
    with pytest.raises(tp.TokenPruneError, match="keep"):
        tp.strategy("spread", keep=2.0)
