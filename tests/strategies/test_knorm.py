"""Key norms against the reference run of ViTCoP's decoder, and what holds for any keys."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from golden_llama import Ran, Reference, run, watched
from hypothesis import given, settings
from hypothesis import strategies as st
from strategy_bench import CHANNELS, Bench
from torch import Tensor

import tokenprune
from tokenprune.core.decisions import Decision, Merge
from tokenprune.core.stage import Shape, Stage, equivalent_tokens
from tokenprune.core.strategy import Strategy
from tokenprune.core.tokens import Tokens
from tokenprune.errors import BudgetError, OptionError
from tokenprune_strategies.knorm import KNorm

QUICK = settings(max_examples=40, deadline=None)
BATCH = st.lists(st.lists(st.integers(1, 40), min_size=1, max_size=3), min_size=1, max_size=3)


@pytest.fixture(scope="module")
def case(golden: Callable[[str], Path]) -> Reference:
    return Reference.read(golden("vitcop"))


@pytest.fixture(scope="module", params=["eager", "sdpa"])
def llama(request: pytest.FixtureRequest, case: Reference) -> Any:
    return case.llama(request.param)


class Merged(Strategy):
    """ViTCoP's first step in the decoder, as stored: which rows are kept, and what the merged ones are."""

    name = "merged"

    def __init__(self, layer: int, rows: Tensor, values: Tensor) -> None:
        super().__init__()
        self.layer, self.rows, self.values = layer, rows, values

    def stages(self, shape: Shape) -> Iterable[Stage]:
        yield Stage("merge", self.layer, len(self.rows))

    def choose(self, stage: Stage, tokens: Tokens) -> Decision:
        each = torch.nn.functional.one_hot(self.rows, tokens.exists.shape[1]).float()
        return Merge(self.rows[None], weights=each[None], values=self.values)


def inputs(case: Reference, number: int) -> tuple[Tensor, Tensor]:
    """Embeddings [1, L, width] of text and image, and where the image is."""
    first, text, images = case.about["PRE"], case.tensors["text_embeds"], case.tensors[f"llm{number}.image_rows"]
    mask = torch.zeros(1, text.shape[1] + images.shape[1], dtype=torch.bool)
    mask[:, first : first + images.shape[1]] = True
    return torch.cat((text[:, :first], images, text[:, first:]), 1), mask


def ran(case: Reference, llama: Any, number: int, *strategies: Strategy) -> Ran:
    strategy = strategies[0] if len(strategies) == 1 else tokenprune.Sequence(*strategies)
    return run(llama, strategy, *inputs(case, number))


@pytest.mark.parametrize("number", [0, 1, 2])
def test_golden_norms_of_all_rows(number: int, llama: Any, case: Reference) -> None:
    layer = case.about["llm"][number]["shallow_layer"]
    stage = ran(case, llama, number, KNorm(layer=layer, keep=12)).trace.stages[0]
    norms = case.tensors[f"llm{number}.key_norm_shallow"]
    torch.testing.assert_close(-stage.scores[0], norms, atol=1e-5, rtol=0)
    assert stage.kept[0] == sorted(norms.argsort()[:12].tolist())


@pytest.mark.parametrize("number", [0, 1, 2])
def test_golden_deep_layer(number: int, llama: Any, case: Reference) -> None:
    about, name, tensors = case.about["llm"][number], f"llm{number}", case.tensors
    rows = tensors[f"{name}.shallow_positions"] - case.about["PRE"]
    shallow = Merged(about["shallow_layer"], rows, tensors[f"{name}.hidden_after_shallow"])
    deep = KNorm(layer=about["deep_layer"], keep=about["deep_rows"])
    found = ran(case, llama, number, shallow, deep)
    stage = found.trace.stages[1]
    kept = rows[tensors[f"{name}.deep_kept"]]
    assert stage.kept[0] == kept.tolist()
    torch.testing.assert_close(-stage.scores[0, rows], tensors[f"{name}.key_norm_deep"], atol=1e-4, rtol=0)
    lengths = [entry.image[0] + entry.other[0] for entry in found.trace.ledger.entries]
    assert lengths == about["layer_input_lengths"]


def test_golden_positions_do_not_matter_for_norms(case: Reference) -> None:
    """A rotation does not change the length of the mean over heads."""
    embeddings, mask = inputs(case, 0)
    strategy = watched(KNorm)(layer=2, keep=12)
    llama = case.llama()
    found = []
    for offset in (0, 50):
        places = torch.arange(offset, offset + mask.shape[1])[None]
        with torch.no_grad(), tokenprune.prune(llama, strategy, image_tokens=mask):
            llama(inputs_embeds=embeddings.float(), position_ids=places, use_cache=False)
        found.append(-strategy.seen[-1][2].scores)
    torch.testing.assert_close(*found, atol=1e-5, rtol=0)


@QUICK
@given(BATCH, st.one_of(st.integers(1, 50), st.floats(0.01, 1)), st.integers(1, 11))
def test_every_image_keeps_its_smallest_keys(rows: list[list[int]], keep: int | float, layer: int) -> None:
    strategy = KNorm(keep=keep, layer=layer)
    bench = Bench(strategy, rows)
    norms = bench.drawn("layer_keys", CHANNELS).norm(dim=-1)
    trace = bench.run().trace
    for row, images in enumerate(rows):
        kept, first = trace.stages[0].kept[row], 0
        (stage,) = strategy.stages(Shape(12, sum(images)))
        assert len(kept) == stage.tokens
        assert kept == Bench(strategy, [images], seeds=[row]).run().trace.stages[0].kept[0]
        for size in images:
            own = [token - first for token in kept if first <= token < first + size]
            assert abs(len(own) - stage.tokens * size / sum(images)) < 1
            smallest = norms[row, first : first + size].argsort()[: len(own)]
            assert own == sorted(smallest.tolist())
            first += size


@QUICK
@given(st.integers(3, 40), st.integers(1, 700), st.floats(0.01, 1))
def test_budgets_are_met_within_a_token_a_layer(layers: int, total: int, budget: float) -> None:
    shape = Shape(layers, total)
    try:
        bound = KNorm(budget=budget).bind(shape)
    except BudgetError:
        assert (total + layers - 1) / layers > budget * total
        return
    spent = equivalent_tokens(list(bound.stages(shape)), shape)
    assert spent <= budget * total + 1e-6
    assert bound.options.keep == 1 or spent > budget * total - 1 - 1e-6


def test_a_layer_that_does_not_exist_is_named() -> None:
    with pytest.raises(OptionError, match=r"'layer': found 12, but the model has 12 layers; choose one of 1 … 11"):
        list(KNorm(layer=12).stages(Shape(12, 256)))
    with pytest.raises(OptionError, match="layer"):
        tokenprune.strategy("knorm", layer=0)
