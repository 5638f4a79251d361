"""The strategy `second-look`: the conformance kit for strategies, and tests of this one."""

from __future__ import annotations

import pytest
import torch

import tokenprune as tp
from tokenprune.testing.strategy_conformance import StrategyConformance
from tokenprune.testing.tiny_decoders import tiny_llama


class TestSecondLook(StrategyConformance):
    """Keep-all is the untouched model, a batch is its rows, budgets are met, nothing stays on the model, and more."""

    strategy = "second-look"


def test_it_is_installed() -> None:
    assert tp.strategies()["second-look"].distribution == "tokenprune-second-look"


@pytest.mark.parametrize("aside", [0.0, 0.1, 0.5])
def test_the_longest_values_stay_and_the_next_ones_return(aside: float) -> None:
    model, ids = tiny_llama(4, seed=3), torch.arange(1, 31)[None]
    image = torch.zeros(1, 30, dtype=torch.bool)
    image[:, 5:25] = True
    with (
        torch.no_grad(),
        tp.prune(model, tp.strategy("second-look", keep=5, layer=1, aside=aside), image_tokens=image) as run,
    ):
        values = model(ids, use_cache=True).past_key_values.layers[0].values[0]
    order = values.norm(dim=-1).mean(0)[5:25].argsort(descending=True).tolist()
    merged, returned = run.trace.stages
    assert merged.kept == [sorted(order[:5])]
    assert returned.kept == [sorted(order[: 5 + round(aside * 20)])]
    assert int(merged.lineage[0, order[:5]].any(0).sum()) == 20 - round(aside * 20)  # the kept ones took in all others


def test_a_bad_option_is_refused() -> None:
    with pytest.raises(tp.TokenPruneError, match="aside"):
        tp.strategy("second-look", aside=1.0)
