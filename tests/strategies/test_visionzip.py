"""VisionZip against the reference data, and what holds for any scores."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from strategy_bench import WIDTH, Bench, check_budget_is_met_within_a_token
from torch import Tensor

import tokenprune
from tokenprune.core.decisions import Merge
from tokenprune.core.reads import ClsAttention, ClsFeatures, Crops, Projector, Read
from tokenprune.core.stage import Shape
from tokenprune.core.tokens import ImageTokens
from tokenprune.errors import IncompatibleError, OptionError
from tokenprune_adapters.clip.tower import load_tower
from tokenprune_adapters.llava.vision import run_tower
from tokenprune_strategies.visionzip.contextual import zip_crop
from tokenprune_strategies.visionzip.visionzip import VisionZip

QUICK = settings(max_examples=40, deadline=None)
IMAGES = st.lists(st.integers(1, 60), min_size=1, max_size=3)
POLICIES = st.sampled_from(["renumber", "keep"])
SIZES = {"small": [(20, 6), (54, 10), (100, 30)], "full": [(54, 10), (108, 20), (162, 30)]}
CASES = [(part, number) for part in SIZES for number in range(3)]


@pytest.fixture(scope="module")
def case(golden: Callable[[str], Path]) -> dict[str, Tensor]:
    return load_file(golden("visionzip") / "case.safetensors")


def reads_of(case: dict[str, Tensor], part: str) -> dict[str, Any]:
    """What the strategy reads, from the stored tensors of the authors' tower."""
    states = case[f"{part}.hidden_states"]
    return {
        "cls_attention": case[f"{part}.cls_attention"].mean(1),
        "keys": case[f"{part}.metric"][:, 1:],
        "features": states[:, 1:],
        "cls_features": states[:, :1].expand(-1, states.shape[1] - 1, -1),
        "project": lambda features: features,
    }


def decided(strategy: VisionZip, reads: dict[str, Any], rows: list[list[int]] | None = None) -> Merge:
    """What the strategy answers; by default every row has one image."""
    rows = rows or [[reads["features"].shape[1]]] * len(reads["features"])
    bench = Bench(strategy, rows, given=reads)
    planned = bench.planned[0]
    answer = strategy.choose(planned.stage, bench._view(planned, bench.state, planned.target))
    assert isinstance(answer, Merge)
    return answer


def options(part: str, number: int) -> dict[str, int]:
    dominant, contextual = SIZES[part][number]
    return {"keep": dominant + contextual, "contextual": contextual}


@pytest.mark.parametrize(("part", "number"), CASES)
def test_golden_choice_and_values(part: str, number: int, case: dict[str, Tensor]) -> None:
    (dominant, _), name = SIZES[part][number], f"{part}.setting{number}"
    answer = decided(VisionZip(**options(part, number)), reads_of(case, part))
    assert answer.origin is not None
    assert answer.values is not None
    assert answer.scores is not None
    torch.testing.assert_close(answer.values, case[f"{name}.output"], atol=1e-5, rtol=0)
    for row, selected in enumerate(case[f"{name}.selected_indices"].tolist()):
        assert answer.origin[row, :dominant].tolist() == [-1, *sorted(p - 1 for p in selected[1:])]
        assert answer.scores[row].topk(dominant - 1).indices.tolist() == [p - 1 for p in selected[1:]]
    assert torch.equal(answer.index, torch.arange(answer.index.shape[1]).expand_as(answer.index))


@pytest.mark.parametrize("number", range(3))
def test_golden_through_our_tower(number: int, case: dict[str, Tensor], golden: Callable[[str], Path]) -> None:
    tower = load_tower(golden("visionzip") / "clip_small", torch.float32)
    for row, pixels in enumerate(case["small.pixel_values"].float()):
        with torch.no_grad():
            run = run_tower(tower, pixels[None])
        reads = {
            "cls_attention": run.cls_attention(-2),
            "keys": run.keys(-2, "mean"),
            "features": run.features,
            "cls_features": run.cls_features.expand_as(run.features),
            "project": lambda features: features,
        }
        torch.testing.assert_close(
            reads["cls_attention"], case["small.cls_attention"][row, None].mean(1), atol=1e-6, rtol=0
        )
        torch.testing.assert_close(reads["keys"], case["small.metric"][row, None, 1:], atol=1e-5, rtol=0)
        answer = decided(VisionZip(**options("small", number)), reads)
        torch.testing.assert_close(answer.values[0], case[f"small.setting{number}.output"][row], atol=1e-5, rtol=0)


def test_golden_order_of_tiles(case: dict[str, Tensor]) -> None:
    """Two tiles side by side are one image in two crops; rows of the grid run through both."""
    side, tiles = 24, case["anyres.tile_features"]
    selected = case["anyres.selected_indices"][:, 1:] - 1
    place = torch.arange(side * side)
    joined = [place // side * 2 * side + place % side + tile * side for tile in range(2)]
    size, width = 2 * side * side, tiles.shape[-1]
    features, attention, cls = torch.zeros(1, size, width), torch.zeros(1, size), torch.zeros(1, size, width)
    crops = torch.zeros(1, size, dtype=torch.int64)
    for tile in range(2):
        kept = selected[tile].sort().values
        rest = torch.tensor(sorted(set(range(side * side)) - set(kept.tolist())))
        targets = rest[:: len(rest) // 10][:10]
        features[0, joined[tile][kept]] = tiles[tile, 1:54]
        features[0, joined[tile][targets]] = tiles[tile, 54:]  # what joins them is zero
        attention[0, joined[tile][selected[tile]]] = torch.arange(53, 0, -1).float()
        cls[0, joined[tile]] = tiles[tile, 0]
        crops[0, joined[tile]] = tile
    reads = {"features": features, "cls_attention": attention, "cls_features": cls, "crops": crops}
    reads.update(keys=torch.ones(1, size, 2), project=lambda values: values)
    answer = decided(VisionZip(keep=128, contextual=20), reads)
    torch.testing.assert_close(answer.values[0], case["anyres.output"], atol=1e-6, rtol=0)


def test_crops_and_images_share_the_tokens_equally() -> None:
    crops = torch.tensor([[0] * 30 + [1] * 30 + [2] * 30])
    bench = Bench(VisionZip(keep=33), [[30, 60]], given={"crops": crops})
    bench.enter(0)
    lineage = bench.trace.stages[0].lineage[0]
    assert (bench.trace.stages[0].origin[0, bench.trace.stages[0].kept[0]] == -1).sum() == 3
    for crop in range(3):
        carries = lineage[:, crops[0] == crop].any(1)
        assert carries.sum() == 10  # 11 with [CLS], which carries no patch
        assert not (lineage[carries][:, crops[0] != crop]).any()


@pytest.mark.parametrize(("keep", "dominant", "contextual"), [(64, 54, 10), (128, 108, 20), (192, 162, 30)])
def test_published_splits(keep: int, dominant: int, contextual: int) -> None:
    strategy = VisionZip(keep=keep)
    assert strategy.contextual([keep]) == [contextual]
    shape = Shape(32, 576)
    assert VisionZip(budget=keep / 576).bind(shape).options.keep == keep
    stage = Bench(strategy, [[576]]).run().trace.stages[0]
    assert (stage.lineage[0].sum(1) == 1).sum() >= dominant - 1
    assert len(stage.kept[0]) == dominant + contextual


@QUICK
@given(POLICIES, IMAGES, st.one_of(st.integers(1, 90), st.floats(0.01, 1)), st.sampled_from([0, 3, 0.0, 0.16, 0.9]))
def test_keep_is_exact_per_row_and_alone(positions: str, images: list[int], keep: Any, contextual: Any) -> None:
    rows = [images, [17] * len(images)]
    strategy = VisionZip(keep=keep, contextual=contextual, positions=positions)
    bench = Bench(strategy, rows).run()
    stage = bench.trace.stages[0]
    for row, own in enumerate(rows):
        alone = Bench(strategy, [own], seeds=[row]).run()
        kept = stage.kept[row]
        assert len(kept) == alone.planned[0].target.item()
        assert kept == alone.trace.stages[0].kept[0]
        assert torch.equal(stage.origin[row, : sum(own)], alone.trace.stages[0].origin[0, : sum(own)])
        torch.testing.assert_close(bench.states[row, kept], alone.states[0, kept], atol=1e-5, rtol=1e-5)
    assert strategy.positions == positions


@QUICK
@given(IMAGES, st.floats(0.05, 1))
def test_keep_policy_gives_the_same_tokens_at_their_own_places(images: list[int], keep: float) -> None:
    compact, placed = (Bench(VisionZip(keep=keep, positions=policy), [images]) for policy in ("renumber", "keep"))
    for bench in (compact, placed):
        bench.enter(0)
    first, second = compact.trace.stages[0], placed.trace.stages[0]
    by_origin = [sorted(stage.origin[0, stage.kept[0]].tolist()) for stage in (first, second)]
    assert by_origin[0] == by_origin[1]
    for slot in second.kept[0]:
        origin = int(second.origin[0, slot])
        assert origin in (slot, -1)
        if origin >= 0:
            where = first.origin[0].tolist().index(origin)
            torch.testing.assert_close(placed.states[0, slot], compact.states[0, where])


def test_everything_kept_is_left_as_it_is() -> None:
    bench = Bench(VisionZip(keep=1.0), [[9, 4]])
    features = bench.drawn("features", 8)
    bench.enter(0)
    assert bench.trace.stages[0].origin[0].tolist() == list(range(13))
    torch.testing.assert_close(bench.states[0], features[0, :, :WIDTH] * 2)


def test_one_token_is_cls_and_stands_for_no_patch() -> None:
    bench = Bench(VisionZip(keep=1), [[9]])
    cls = bench.drawn("cls_features", 8)
    bench.enter(0)
    stage = bench.trace.stages[0]
    assert (stage.kept[0], stage.origin[0, 0].item(), stage.mass[0, 0].item()) == ([0], -1, 0)
    torch.testing.assert_close(bench.states[0, 0], cls[0, 0, :WIDTH] * 2)


def test_contextual_tokens_are_sums_not_averages() -> None:
    keys = torch.tensor([[1.0, 0], [0, 1], [1, 0.1], [0.1, 1], [1, 0.2], [5, 5]])
    crop = ImageTokens(0, 0, torch.arange(6), quota=4)
    left = zip_crop(crop, torch.tensor([0.1, 0, 0, 0, 0, 0.9]), keys, contextual=2)
    assert (left.dominant.tolist(), left.targets.tolist()) == ([5], [0, 2])
    assert left.weights[0].tolist() == [1, 0, 0, 0, 0, 0]
    torch.testing.assert_close(left.weights[1], torch.tensor([0, 1 / 3, 1, 1 / 3, 1 / 3, 0]))


@QUICK
@given(st.integers(3, 700), st.floats(0.001, 1))
def test_budgets_are_met_within_a_token(total: int, budget: float) -> None:
    check_budget_is_met_within_a_token(VisionZip, total, budget)


@pytest.mark.parametrize("missing", [ClsAttention, ClsFeatures, Projector])
def test_a_tower_without_cls_is_refused(missing: type[Read]) -> None:
    with pytest.raises(IncompatibleError, match=f"requires {missing.__name__}"):
        Bench(VisionZip(), [[30]], readable=set(Read.__subclasses__()) - {missing})


def test_without_crops_an_image_is_one() -> None:
    bench = Bench(VisionZip(keep=10), [[30]], readable=set(Read.__subclasses__()) - {Crops})
    bench.enter(0)
    assert len(bench.trace.stages[0].kept[0]) == 10


@pytest.mark.parametrize("bad", [{"keep": 0}, {"contextual": -1}, {"positions": "move"}])
def test_bad_options_are_named(bad: dict[str, Any]) -> None:
    with pytest.raises(OptionError, match=f"{next(iter(bad))}"):
        tokenprune.strategy("visionzip", **bad)
