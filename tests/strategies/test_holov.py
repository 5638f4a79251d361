"""HoloV against the reference data, and against a slow form of its own, for any tokens."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from strategy_bench import Bench, check_budget_is_met_within_a_token
from torch import Tensor, nn

import tokenprune
from tokenprune.core.reads import ClsAttention, Crops, Read
from tokenprune.core.trace import StageTrace
from tokenprune.errors import IncompatibleError, InputError, OptionError
from tokenprune_adapters.clip.tower import load_tower
from tokenprune_adapters.llava.vision import run_tower
from tokenprune_strategies.holov import HoloV, block_quotas

QUICK = settings(max_examples=40, deadline=None)
IMAGES = st.lists(st.integers(1, 60), min_size=1, max_size=3)
CASES = ["setting0", "setting1", "direct0", "direct1"]


@pytest.fixture(scope="module")
def reference(golden: Callable[[str], Path]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    folder = golden("holov")
    return json.loads((folder / "case.json").read_text()), load_file(folder / "case.safetensors")


def chosen_in(about: dict[str, Any], name: str) -> dict[str, Any]:
    kind = {"setting": "settings"}.get(name[:-1], name[:-1])
    found: dict[str, Any] = about[kind][int(name[-1])]
    return found


def selected(strategy: HoloV, rows: Tensor, attention: Tensor) -> StageTrace:
    """What is kept of one image in every batch row, of these projected rows [batch, N, C]."""
    given = {"embeddings": rows, "cls_attention": attention}
    bench = Bench(strategy, [[rows.shape[1]]] * len(rows), given=given)
    bench.enter(0)
    return bench.trace.stages[0]


def check_choice(stage: StageTrace, wanted: list[int], row: int, *, faithful: bool) -> None:
    if faithful:
        assert stage.origin[row, : len(wanted)].tolist() == wanted
        assert stage.kept[row] == list(range(len(wanted)))
    elif -1 not in wanted:
        assert stage.kept[row] == sorted(wanted)
    else:  # what the authors fill with zeros goes to other blocks
        assert {*wanted} - {-1} < {*stage.kept[row]}
        assert len(stage.kept[row]) == len(wanted)


@pytest.mark.parametrize("faithful", [True, False])
@pytest.mark.parametrize("name", CASES)
def test_golden_choice(name: str, faithful: bool, reference: tuple[dict[str, Any], dict[str, Tensor]]) -> None:
    about, tensors = reference
    case = chosen_in(about, name)
    rows, attention = tensors["projected"], tensors["cls_attention"]
    if name.startswith("direct"):
        rows, attention = tensors[f"{name}.features"], tensors[f"{name}.attention"]
    strategy = HoloV(keep=case["new_image_token_num"], blocks=case["blocks"], faithful=faithful)
    stage = selected(strategy, rows, attention)
    for row, wanted in enumerate(tensors[f"{name}.kept_rows"].tolist()):
        check_choice(stage, wanted, row, faithful=faithful)
    # scores and quotas of the last row's blocks
    assert stage.scores is not None
    parts = stage.scores[-1].tensor_split(case["blocks"])
    means = torch.stack([part.mean() for part in parts])
    torch.testing.assert_close(means, tensors[f"{name}.block_scores"], atol=1e-4, rtol=1e-5)
    total = case["new_image_token_num"]
    quotas = block_quotas(means, [len(part) for part in parts], total, faithful=True)
    assert quotas == tensors[f"{name}.allocated"].tolist()


def test_golden_through_our_tower(
    reference: tuple[dict[str, Any], dict[str, Tensor]], golden: Callable[[str], Path]
) -> None:
    about, tensors = reference
    tower = load_tower(golden("holov") / "clip", torch.float32)
    projector = nn.Sequential(nn.Linear(32, 24), nn.GELU(), nn.Linear(24, 24))
    projector.load_state_dict({n.removeprefix("projector."): t for n, t in tensors.items() if "projector." in n})
    with torch.no_grad():
        runs = [run_tower(tower, pixels[None]) for pixels in tensors["pixel_values"].float()]
        rows = projector(torch.cat([run.features for run in runs]))
    attention = torch.cat([run.cls_attention(-2) for run in runs])
    torch.testing.assert_close(rows, tensors["projected"], atol=1e-4, rtol=0)
    torch.testing.assert_close(attention, tensors["cls_attention"], atol=1e-6, rtol=0)
    for name in ("setting0", "setting1"):
        stage = selected(HoloV(keep=chosen_in(about, name)["new_image_token_num"], faithful=True), rows, attention)
        for row, wanted in enumerate(tensors[f"{name}.kept_rows"].tolist()):
            check_choice(stage, wanted, row, faithful=True)


def slowly(rows: Tensor, attention: list[float], total: int, blocks: int) -> tuple[list[int], Iterator[list[int]]]:
    """Quotas of the blocks, and their tokens by falling attention, with loops over tokens in double precision."""
    count, size = min(blocks, len(rows)), len(rows) // min(blocks, len(rows))
    longer = len(rows) % count
    starts = [block * size + min(block, longer) for block in range(count + 1)]
    own = [list(range(start, end)) for start, end in pairwise(starts)]
    means = []
    for block in own:
        unit = [rows[i].double() / (rows[i].double().norm() + 1e-6) for i in block]
        variances = []
        for i, one in enumerate(unit):
            alike = [0.0 if i == j else float(one @ other) for j, other in enumerate(unit)]
            mean = sum(alike) / max(1, len(block) - 1)
            variances.append(sum((value - mean) ** 2 for value in alike) / max(1, len(block) - 1))
        seen = [1000 * attention[i] for i in block]
        factor = (sum(seen) / len(block)) / (sum(variances) / len(block) + 1e-6)
        means.append(sum(s + 0.09 * v * factor for s, v in zip(seen, variances, strict=True)) / len(block))
    quotas = [min(len(block), math.floor(mean / sum(means) * total)) for mean, block in zip(means, own, strict=True)]
    while sum(quotas) < total:
        for block in sorted(range(count), key=lambda block: -means[block]):
            if quotas[block] < len(own[block]) and sum(quotas) < total:
                quotas[block] += 1
    return quotas, (sorted(block, key=lambda i: -attention[i]) for block in own)


@QUICK
@given(st.lists(IMAGES, min_size=1, max_size=2), st.one_of(st.integers(1, 90), st.floats(0.01, 1)), st.integers(1, 20))
@example([[1], [15, 16]], 1.0, 16)
@example([[17, 60]], 0.9, 16)
def test_choice_is_that_of_the_slow_form(rows: list[list[int]], keep: int | float, blocks: int) -> None:
    bench = Bench(HoloV(keep=keep, blocks=blocks), rows)
    states, attention = bench.embeddings.clone(), bench.drawn("cls_attention").exp()
    bench.enter(0)
    for row, images in enumerate(rows):
        kept, first = bench.trace.stages[0].kept[row], 0
        assert len(kept) == bench.planned[0].target[row]
        for size in images:
            own = [token - first for token in kept if first <= token < first + size]
            seen = attention[row, first : first + size].tolist()
            quotas, order = slowly(states[row, first : first + size], seen, len(own), blocks)
            wanted = [token for quota, block in zip(quotas, order, strict=True) for token in block[:quota]]
            assert own == sorted(wanted)
            first += size


@QUICK
@given(st.lists(st.tuples(st.integers(1, 20), st.floats(0, 3, width=32)), min_size=1, max_size=20), st.floats(0, 1))
def test_quotas_are_exact_and_fit_into_their_blocks(blocks: list[tuple[int, float]], share: float) -> None:
    sizes, means = [size for size, _ in blocks], torch.tensor([mean for _, mean in blocks])
    total = int(share * sum(sizes))
    quotas = block_quotas(means, sizes, total, faithful=False)
    assert sum(quotas) == total
    assert all(0 <= quota <= size for quota, size in zip(quotas, sizes, strict=True))
    theirs = block_quotas(means, sizes, total, faithful=True)
    assert sum(theirs) == total
    if all(quota <= size for quota, size in zip(theirs, sizes, strict=True)):
        assert quotas == theirs


@QUICK
@given(IMAGES, st.floats(0.01, 1), st.booleans())
def test_a_row_is_itself_in_a_batch(images: list[int], keep: float, faithful: bool) -> None:
    rows = [images, [17] * len(images), [1]]
    strategy = HoloV(keep=keep, faithful=faithful)
    together = Bench(strategy, rows).run()
    for row, own in enumerate(rows):
        alone = Bench(strategy, [own], seeds=[row]).run()
        kept = together.trace.stages[0].kept[row]
        assert len(kept) == alone.planned[0].target.item()
        assert kept == alone.trace.stages[0].kept[0]
        torch.testing.assert_close(together.states[row, kept], alone.states[0, kept], atol=1e-5, rtol=1e-5)


def test_crops_choose_for_themselves() -> None:
    crops = torch.tensor([[0, 1] * 30])
    bench = Bench(HoloV(keep=20, blocks=4), [[60]], given={"crops": crops})
    states, attention = bench.embeddings, bench.drawn("cls_attention").exp()
    bench.enter(0)
    kept = bench.trace.stages[0].kept[0]
    for crop in (0, 1):
        alone = selected(HoloV(keep=10, blocks=4), states[:, crop::2], attention[:, crop::2]).kept[0]
        assert [token // 2 for token in kept if token % 2 == crop] == alone


def test_one_block_with_all_the_attention() -> None:
    """Theirs: eight rows of zeros. Ours: what a full block has no room for goes to the others."""
    attention = torch.full((1, 16), 1e-3)
    attention[0, 4:8] = torch.tensor([1.0, 4, 2, 3])
    rows = torch.randn(1, 16, 6, generator=torch.Generator().manual_seed(0))
    bench = Bench(HoloV(keep=12, blocks=4, faithful=True), [[16]], given={"cls_attention": attention})
    bench.enter(0)
    stage = bench.trace.stages[0]
    assert stage.origin[0, :12].tolist() == [4, 5, 6, 7] + [-1] * 8
    assert stage.mass[0, :12].tolist() == [1] * 4 + [0] * 8
    assert bench.states[0, :4].equal(bench.embeddings[0, 4:8])
    assert not bench.states[0, 4:12].any()
    kept = selected(HoloV(keep=12, blocks=4), rows, attention).kept[0]
    assert [token in kept for token in range(4, 8)] == [True] * 4
    assert len(kept) == 12


def test_a_block_of_one_token_counts_like_the_others() -> None:
    """Theirs: its score is a thousandth of the others'."""
    attention, rows = torch.tensor([[0.1, 0.1, 0.9]]), torch.eye(3)[None]
    assert selected(HoloV(keep=1, blocks=2), rows, attention).kept[0] == [2]
    assert selected(HoloV(keep=1, blocks=2, faithful=True), rows, attention).origin[0, 0] == 0


@pytest.mark.parametrize("name", ["embeddings", "cls_attention"])
def test_nan_is_refused(name: str) -> None:
    given = {"embeddings": torch.ones(1, 20, 6), "cls_attention": torch.ones(1, 20)}
    given[name][0, 3] = float("nan")
    with pytest.raises(
        InputError, match=rf"'holov', stage 'select': NaN or infinity in tokens\.{name} .*image token 3"
    ):
        Bench(HoloV(keep=4), [[20]], given=given).enter(0)


@QUICK
@given(st.integers(3, 700), st.floats(0.001, 1))
def test_budgets_are_met_within_a_token(total: int, budget: float) -> None:
    check_budget_is_met_within_a_token(HoloV, total, budget)


def test_a_tower_without_cls_is_refused() -> None:
    with pytest.raises(IncompatibleError, match="requires ClsAttention"):
        Bench(HoloV(), [[30]], readable=set(Read.__subclasses__()) - {ClsAttention})


def test_without_crops_an_image_is_one() -> None:
    bench = Bench(HoloV(keep=10), [[30]], readable=set(Read.__subclasses__()) - {Crops})
    bench.enter(0)
    assert len(bench.trace.stages[0].kept[0]) == 10


@pytest.mark.parametrize("bad", [{"keep": 0}, {"blocks": 0}, {"positions": "move"}])
def test_bad_options_are_named(bad: dict[str, Any]) -> None:
    with pytest.raises(OptionError, match=f"{next(iter(bad))}"):
        tokenprune.strategy("holov", **bad)


def test_their_order_has_no_original_positions() -> None:
    with pytest.raises(OptionError, match="'faithful' and positions='keep' found"):
        HoloV(faithful=True, positions="keep")
