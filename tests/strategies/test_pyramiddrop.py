"""PyramidDrop against the reference run of the authors' decoder, and what holds for any input."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from golden_llama import Reference, run
from hypothesis import given, settings
from hypothesis import strategies as st
from strategy_bench import Bench

from tokenprune.core.options import tokens_of
from tokenprune.core.stage import Shape, equivalent_tokens
from tokenprune.errors import BudgetError, IncompatibleError, OptionError
from tokenprune_strategies.ops.falling_stages import layers_of, windows
from tokenprune_strategies.pyramiddrop import PyramidDrop

QUICK = settings(max_examples=40, deadline=None)
IMAGES = st.lists(st.integers(1, 40), min_size=1, max_size=3)
BATCH = st.lists(IMAGES, min_size=1, max_size=3)


@pytest.fixture(scope="module")
def case(golden: Callable[[str], Path]) -> Reference:
    return Reference.read(golden("pyramiddrop"))


@pytest.fixture(scope="module", params=["eager", "sdpa"])
def llama(request: pytest.FixtureRequest, case: Reference) -> Any:
    return case.llama(request.param)


def theirs(case: Reference, setting: int, faithful: bool = True) -> PyramidDrop:
    chosen = case.about["settings"][setting]
    return PyramidDrop(layers=chosen["layer_list"], keep=chosen["image_token_ratio_list"], faithful=faithful)


@pytest.mark.parametrize("setting", [0, 1])
def test_golden_scores_kept_tokens_logits_and_decoding(setting: int, llama: Any, case: Reference) -> None:
    chosen, tensors, name = case.about["settings"][setting], case.tensors, f"setting{setting}"
    first = case.about["PRE"]
    fed = tensors[f"{name}.decode_token_ids"].tolist()
    found = run(llama, theirs(case, setting), tensors["inputs_embeds"], case.image_tokens(), fed)
    before = torch.arange(case.about["IMG"])
    for number, stage in enumerate(found.trace.stages):
        kept = before[tensors[f"{name}.stage{number}.kept_local"]]
        assert stage.kept[0] == kept.tolist()
        assert stage.scores is not None
        scores = tensors[f"{name}.stage{number}.image_scores"]
        torch.testing.assert_close(stage.scores[0, before], scores, atol=1e-6, rtol=0)
        rows = tensors[f"{name}.stage{number}.kept_positions"]
        inside = (rows >= first) & (rows < first + case.about["IMG"])
        assert (rows[inside] - first).tolist() == stage.kept[0]
        before = kept
    assert [len(stage.kept[0]) for stage in found.trace.stages] == chosen["kept_image_tokens"]
    lengths = [entry.image[0] + entry.other[0] for entry in found.trace.ledger.entries]
    assert [*lengths, lengths[-1]] == chosen["hidden_state_lengths"]
    assert found.kv_lengths == chosen["kv_lengths_after_decode"]
    torch.testing.assert_close(found.logits[:, found.rows()], tensors[f"{name}.logits"], atol=1e-4, rtol=0)
    torch.testing.assert_close(found.hidden[:, found.rows()], tensors[f"{name}.last_hidden"], atol=1e-4, rtol=0)
    torch.testing.assert_close(found.decoded, tensors[f"{name}.decode_logits"], atol=1e-4, rtol=0)


def test_golden_batch_of_images_at_different_places(llama: Any, case: Reference) -> None:
    about, tensors = case.about["batch2"], case.tensors
    mask = case.image_tokens(about["image_start"])
    found = run(llama, theirs(case, about["setting"]), tensors["batch2.inputs_embeds"], mask)
    for row in range(2):
        before = torch.arange(case.about["IMG"])
        for number, stage in enumerate(found.trace.stages):
            before = before[tensors[f"batch2.row{row}.stage{number}.kept_local"]]
            assert stage.kept[row] == before.tolist()
        rows = found.rows(row)
        torch.testing.assert_close(found.logits[row, rows], tensors["batch2.logits"][row], atol=1e-4, rtol=0)


def test_shares_are_cut_off_as_floats_only_where_faithful(case: Reference) -> None:
    shape = Shape(8, 50)
    assert [s.tokens for s in theirs(case, 1).stages(shape)] == [28, 10]
    assert [s.tokens for s in theirs(case, 1, faithful=False).stages(shape)] == [29, 10]


def test_positions_kept_give_other_logits(case: Reference) -> None:
    renumbered, kept = (
        run(case.llama(), PyramidDrop(layers=(2, 4, 6), positions=policy), case.tensors["inputs_embeds"], mask)
        for policy, mask in (("renumber", case.image_tokens()), ("keep", case.image_tokens()))
    )
    assert not torch.allclose(renumbered.logits[:, -1], kept.logits[:, -1], atol=1e-2)


def test_published_settings_and_the_published_average() -> None:
    stages = list(PyramidDrop().stages(Shape(32, 576)))
    assert [(stage.layer, stage.tokens) for stage in stages] == [(8, 288), (16, 144), (24, 72)]
    assert equivalent_tokens(stages, Shape(32, 576)) == 270


@QUICK
@given(BATCH, st.lists(st.floats(0.05, 1), min_size=3, max_size=3))
def test_every_row_and_image_keeps_its_best(rows: list[list[int]], shares: list[float]) -> None:
    keep = tuple(sorted(shares, reverse=True))
    bench = Bench(PyramidDrop(keep=keep), rows)
    scores, trace = bench.drawn("attention"), bench.run().trace
    for row, images in enumerate(rows):
        alone = Bench(PyramidDrop(keep=keep), [images], seeds=[row]).run().trace
        left = set(range(sum(images)))
        for number, share in enumerate(keep):
            kept = trace.stages[number].kept[row]
            assert kept == alone.stages[number].kept[0]
            assert len(kept) == tokens_of(share, sum(images))
            assert set(kept) <= left
            start = 0
            for size in images:
                own = [token for token in left if start <= token < start + size]
                best = sorted(own, key=lambda token: -scores[row, token])[: len(set(own) & set(kept))]
                assert set(best) == set(own) & set(kept)
                start += size
            left = set(kept)


@QUICK
@given(st.integers(4, 40), st.integers(1, 700), st.floats(0.01, 1))
def test_budgets_are_met_closely(layers: int, total: int, budget: float) -> None:
    shape = Shape(layers, total)
    try:
        bound = PyramidDrop(budget=budget).bind(shape)
    except BudgetError:
        least = PyramidDrop(layers=(1, 2, 3), keep=(1, 1, 1))
        assert equivalent_tokens(list(least.stages(shape)), shape) > budget * total
        return
    spent = equivalent_tokens(list(bound.stages(shape)), shape)
    assert budget * total - 1 - 1e-6 < spent <= budget * total + 1e-6


def test_the_published_share_is_what_the_published_budget_gives() -> None:
    bound = PyramidDrop(budget=270 / 576).bind(Shape(32, 576))
    assert bound.options.model_dump(include={"layers", "keep"}) == {"layers": (8, 16, 24), "keep": (288, 144, 72)}


def test_what_the_user_set_stays() -> None:
    shape = Shape(32, 576)
    layers = PyramidDrop(budget=0.3, layers=(4, 12, 20)).bind(shape).options.layers
    assert layers == (4, 12, 20)
    keep = PyramidDrop(budget=0.3, keep=(300, 20, 10)).bind(shape)
    assert (keep.options.keep, keep.options.layers[0]) == ((300, 20, 10), 6)
    with pytest.raises(BudgetError, match=r"'pyramiddrop' cannot meet budget 0\.2 on 32 layers"):
        PyramidDrop(budget=0.2, layers=(8, 16, 24)).bind(shape)


def test_layers_of_other_depths() -> None:
    assert layers_of((0.25, 0.5, 0.75), 4, "x") == (1, 2, 3)
    assert layers_of((0.25, 0.5, 0.75), 28, "x") == (7, 14, 21)
    assert layers_of((0.01, 0.02, 0.03), 12, "x") == (1, 2, 3)
    assert windows((3, 6, 9)) == [(3, 6, 9), (2, 4, 6), (1, 2, 3)]
    with pytest.raises(
        IncompatibleError, match=r"'pyramiddrop' has 3 stages after the first layer, and the model has 3"
    ):
        list(PyramidDrop().stages(Shape(3, 16)))
    with pytest.raises(OptionError, match=r"gives layers \[8, 16, 24\], expected ascending ones below 12"):
        list(PyramidDrop(layers=(8, 16, 24)).stages(Shape(12, 16)))
    with pytest.raises(OptionError, match=r"would keep \[4, 8, 2\] image tokens, expected no more in a stage"):
        list(PyramidDrop(keep=(4, 8, 2)).stages(Shape(12, 16)))
    with pytest.raises(OptionError, match="found 2 and 3 values"):
        PyramidDrop(layers=(2, 4))
