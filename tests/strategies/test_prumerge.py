"""PruMerge and PruMerge+ against the reference data, and what holds for any scores."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from strategy_bench import CHANNELS, WIDTH, Bench
from torch import Tensor

import tokenprune
from tokenprune.core.decisions import Merge
from tokenprune.core.reads import ClsAttention, Projector, Read, ReceivedAttention
from tokenprune.core.stage import Shape, equivalent_tokens
from tokenprune.core.tokens import ImageTokens
from tokenprune.errors import BudgetError, OptionError
from tokenprune_adapters.llava.vision import run_tower
from tokenprune_strategies.prumerge.merging import merge_weights, outlier_share, place
from tokenprune_strategies.prumerge.prumerge import PruMerge, PruMergePlus

QUICK = settings(max_examples=40, deadline=None)
IMAGES = st.lists(st.integers(1, 60), min_size=1, max_size=3)
KINDS = st.sampled_from([PruMerge, PruMergePlus])
POLICIES = st.sampled_from(["renumber", "keep"])
GOLDEN_CASES = [
    ("clip336", "prumerge_adaptive", PruMerge()),
    ("clip336", "prumerge_fixed8", PruMerge(ratio=0.125)),
    ("clip336", "plus_adaptive", PruMergePlus()),
    ("clip224", "prumerge_adaptive", PruMerge()),
    ("clip224", "prumerge_fixed8", PruMerge(ratio=0.125)),
]


@pytest.fixture(scope="module")
def case(golden: Callable[[str], Path]) -> dict[str, Tensor]:
    return load_file(golden("prumerge") / "case.safetensors")


@pytest.fixture(scope="module")
def tower(golden: Callable[[str], Path], case: dict[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Per picture size: what PruMerge reads, from transformers' CLIP with the reference weights."""
    from transformers import CLIPVisionModel

    found = {}
    for size in ("336", "224"):
        model = CLIPVisionModel.from_pretrained(golden("prumerge") / f"clip_{size}").eval()
        with torch.no_grad():
            run = run_tower(model, case[f"clip{size}.pixel_values"])
        reads = {"cls_attention": run.cls_attention(-1, "joint"), "keys": run.keys(-1), "features": run.features}
        found[f"clip{size}"] = reads
    return found


def decided(strategy: PruMerge, reads: dict[str, Tensor]) -> Merge:
    """What the strategy answers for one image, with a projector that changes nothing."""
    given: dict[str, Any] = {**reads, "project": lambda features: features}
    bench = Bench(strategy, [[reads["features"].shape[1]]], given=given)
    planned = bench.planned[0]
    answer = strategy.choose(planned.stage, bench._view(planned, bench.state, planned.target))
    assert isinstance(answer, Merge)
    return answer


@pytest.mark.parametrize("size", ["clip336", "clip224"])
def test_tower_reads_agree(size: str, case: dict[str, Tensor], tower: dict[str, dict[str, Tensor]]) -> None:
    reads = tower[size]
    torch.testing.assert_close(reads["features"], case[f"{size}.features"], atol=1e-5, rtol=0)
    torch.testing.assert_close(reads["cls_attention"][0], case[f"{size}.cls_attention"], atol=1e-6, rtol=0)


@pytest.mark.parametrize(("size", "name", "strategy"), GOLDEN_CASES, ids=lambda v: v if isinstance(v, str) else "")
def test_golden_kept_and_values(
    size: str, name: str, strategy: PruMerge, case: dict[str, Tensor], tower: dict[str, dict[str, Tensor]]
) -> None:
    answer = decided(strategy, tower[size])
    kept, merged = case[f"{size}.{name}.kept_indices"], case[f"{size}.{name}.merged"]
    assert answer.origin is not None
    assert answer.values is not None
    assert answer.origin[0].tolist() == [*kept.tolist(), -1]
    assert answer.index[0].tolist() == list(range(len(kept) + 1))
    torch.testing.assert_close(answer.values, merged, atol=1e-4, rtol=0)


def test_golden_plus_fixed_repeats_tokens_and_ours_does_not(
    case: dict[str, Tensor], tower: dict[str, dict[str, Tensor]]
) -> None:
    answer = decided(PruMergePlus(ratio=0.125), tower["clip336"])
    theirs = case["clip336.plus_fixed8.kept_indices"].tolist()
    assert answer.origin is not None
    ours = answer.origin[0, :-1].tolist()
    assert len(theirs) == 144
    assert len(ours) == 134
    assert ours == list(dict.fromkeys(theirs))
    # Their pool of neighbours holds a repeated token twice, and lacks a low one for it that counts as neither kept nor
    # dropped; where a token has none of these near, it has the same value.
    repeated = {token for token in ours if theirs.count(token) > 1}
    lost = set(range(576)) - set(theirs) - set(case["clip336.plus_fixed8.dropped_indices"].tolist())
    near = [set(row.nonzero().flatten().tolist()) for row in answer.weights[0]]
    once = [i for i in range(len(ours)) if not near[i] & (repeated | lost)]
    assert len(once) > 10
    assert answer.values is not None
    merged = case["clip336.plus_fixed8.merged"][0, [theirs.index(ours[i]) for i in once]]
    torch.testing.assert_close(answer.values[0, once], merged, atol=1e-4, rtol=0)


@pytest.mark.parametrize("size", ["clip336", "clip224"])
def test_keep_policy_gives_the_same_values_at_their_own_places(size: str, tower: dict[str, dict[str, Tensor]]) -> None:
    compact, placed = (decided(PruMerge(positions=p), tower[size]) for p in ("renumber", "keep"))
    assert compact.origin is not None
    assert placed.origin is not None
    assert compact.values is not None
    assert placed.values is not None
    order = placed.origin[0].tolist()
    own = placed.origin[0] >= 0
    assert placed.index[0][own].tolist() == placed.origin[0][own].tolist()
    assert sorted(order) == sorted(compact.origin[0].tolist())
    for new, token in enumerate(order):
        torch.testing.assert_close(placed.values[0, new], compact.values[0, compact.origin[0].tolist().index(token)])


@QUICK
@given(KINDS, POLICIES, IMAGES, st.one_of(st.integers(1, 90), st.floats(0.01, 1)))
def test_keep_is_exact_per_row_and_alone(
    kind: type[PruMerge], positions: str, images: list[int], keep: int | float
) -> None:
    rows = [images, [17] * len(images)]
    strategy = kind(keep=keep, positions=positions)
    bench = Bench(strategy, rows).run()
    stage = bench.trace.stages[0]
    for row, own in enumerate(rows):
        alone = Bench(strategy, [own], seeds=[row]).run()
        number = alone.planned[0].target.item()
        assert len(stage.kept[row]) == number == len(alone.trace.stages[0].kept[0])
        assert stage.kept[row] == alone.trace.stages[0].kept[0]
        total = sum(own)
        assert torch.equal(stage.origin[row, :total], alone.trace.stages[0].origin[0, :total])
        kept = stage.kept[row]
        torch.testing.assert_close(bench.states[row, kept], alone.states[0, kept], atol=1e-5, rtol=1e-5)
    assert strategy.positions == positions


@QUICK
@given(
    KINDS, POLICIES, st.lists(IMAGES, min_size=1, max_size=3), st.sampled_from(["adaptive", 0.05, 0.125, 0.4, 0.9, 1.0])
)
def test_any_ratio_runs_and_stays_within_the_images(
    kind: type[PruMerge], positions: str, rows: list[list[int]], ratio: Any
) -> None:
    stage = Bench(kind(ratio=ratio, positions=positions), rows).run().trace.stages[0]
    assert stage.lineage is not None
    for row, images in enumerate(rows):
        image = torch.tensor([i for i, n in enumerate(images) for _ in range(n)])
        assert set(image[stage.kept[row]].tolist()) == set(range(len(images)))
        lineage = stage.lineage[row][stage.kept[row]].nonzero()
        carrier = image[torch.tensor(stage.kept[row])[lineage[:, 0]]]
        assert torch.equal(carrier, image[lineage[:, 1]])
        places = [o for o in stage.origin[row, stage.kept[row]].tolist() if o >= 0]
        assert len(set(places)) == len(places)


@QUICK
@given(KINDS, st.integers(3, 700), st.floats(0.001, 1))
def test_budgets_are_met_within_a_token(kind: type[PruMerge], total: int, budget: float) -> None:
    shape = Shape(12, total)
    if budget * total < 1 - 1e-6:
        with pytest.raises(BudgetError, match="raise the budget"):
            kind(budget=budget).bind(shape)
        return
    spent = equivalent_tokens(list(kind(budget=budget, ratio=0.3).bind(shape).stages(shape)), shape)
    assert budget * total - 1 - 1e-6 < spent <= budget * total + 1e-6


def test_weights_are_the_neighbours_attention() -> None:
    keys = torch.randn(50, CHANNELS, generator=torch.Generator().manual_seed(0))
    attention = torch.rand(50, generator=torch.Generator().manual_seed(1)) + 0.1
    kept = torch.tensor([7, 3, 40])
    weights = merge_weights(attention, keys, kept)
    likeness = torch.nn.functional.cosine_similarity(keys[7][None], keys, dim=1)
    near = [i for i in likeness.argsort(descending=True).tolist() if i != 7][:32]
    assert sorted(weights[0].nonzero().flatten().tolist()) == sorted([7, *near])
    assert weights[0, 7] == 1
    assert weights[0, near[0]] == attention[near[0]]
    dropped = [i for i in range(50) if i not in (7, 3, 40)]
    assert torch.equal(weights[3, dropped], attention[dropped])
    assert weights[3, kept].tolist() == [0, 0, 0]


@pytest.mark.parametrize(
    ("kept", "slots", "origins"),
    [
        ([4, 1], [1, 4, 5], [11, 14, -1]),
        ([5, 1], [1, 4, 5], [11, -1, 15]),
        ([0, 1, 2, 3, 4], [0, 1, 2, 3, 4, 5], [10, 11, 12, 13, 14, -1]),
    ],
)
def test_extra_token_takes_a_dropped_slot(kept: list[int], slots: list[int], origins: list[int]) -> None:
    image, weights = ImageTokens(0, 0, torch.arange(10, 16), quota=6), torch.eye(6)[[*kept, 0]]
    placed = place(image, torch.tensor(kept), weights, "keep")
    assert placed.origin is not None
    order = placed.index.argsort()
    assert placed.index[order].tolist() == [10 + slot for slot in slots]
    assert placed.origin[order].tolist() == origins
    assert torch.equal(placed.weights, weights)
    assert torch.equal(placed.members, image.index)
    compact = place(image, torch.tensor(kept), weights, "renumber")
    assert compact.origin is not None
    assert compact.index.tolist() == [10 + i for i in range(len(kept) + 1)]
    assert compact.origin.tolist() == [*(10 + k for k in kept), -1]


def test_no_outlier_keeps_one_and_everything_kept_needs_no_extra() -> None:
    flat = torch.full((40,), 1 / 41)
    assert outlier_share(flat) == 0
    assert len(PruMerge().selected(flat, None)) == 1
    assert len(PruMergePlus().selected(flat, None)) == 3
    stage = Bench(PruMerge(keep=1.0), [[9]]).run().trace.stages[0]
    assert stage.origin[0].tolist() != list(range(9))
    assert sorted(stage.origin[0].tolist()) == list(range(9))


def test_a_tower_without_cls_scores_by_received_attention() -> None:
    bench = Bench(PruMerge(ratio=0.2), [[30]], readable=set(Read.__subclasses__()) - {ClsAttention})
    bench.enter(0)
    stage = bench.trace.stages[0]
    received = bench.drawn("received_attention").exp()[0]
    assert stage.scores is not None
    torch.testing.assert_close(stage.scores[0], received)
    assert set(stage.origin[0, :6].tolist()) == set(received.topk(6).indices.tolist())
    assert ReceivedAttention() in bench.planned[0].stage.reads


def test_without_a_projector_the_projected_tokens_are_merged() -> None:
    bench = Bench(PruMerge(ratio=0.2), [[30]], readable=set(Read.__subclasses__()) - {Projector})
    bench.enter(0)
    first, (merged,) = int(bench.trace.stages[0].origin[0, 0]), bench.states[:, 0]
    attention, keys = bench.drawn("cls_attention").exp()[0], bench.drawn("keys", CHANNELS)[0]
    weights = merge_weights(attention, keys, torch.tensor([first]))[0]
    torch.testing.assert_close(merged, weights @ bench.embeddings[0])


def test_values_go_through_the_projector() -> None:
    bench = Bench(PruMerge(ratio=0.2), [[30]])
    features = bench.drawn("features", CHANNELS)
    bench.enter(0)
    lineage = bench.trace.stages[0].lineage
    assert lineage is not None
    first = int(bench.trace.stages[0].origin[0, 0])
    assert lineage[0, 0, first]
    attention = bench.drawn("cls_attention").exp()[0]
    near = [i for i in lineage[0, 0].nonzero().flatten().tolist() if i != first]
    assert len(near) == 29
    merged = features[0, first] + (attention[near, None] * features[0, near]).sum(0)
    torch.testing.assert_close(bench.states[0, 0], merged[:WIDTH] * 2)


@pytest.mark.parametrize(
    "options", [{"ratio": 0}, {"ratio": 1.5}, {"ratio": "adaptiv"}, {"positions": "move"}, {"keep": 0}]
)
@pytest.mark.parametrize("name", ["prumerge", "prumerge+"])
def test_bad_options_are_named(name: str, options: dict[str, Any]) -> None:
    with pytest.raises(OptionError, match=f"{next(iter(options))}"):
        tokenprune.strategy(name, **options)


def test_weights_are_float32_whatever_the_default_type_of_torch_is() -> None:
    attention, keys = torch.rand(9), torch.randn(9, 4)
    torch.set_default_dtype(torch.bfloat16)
    try:
        weights = merge_weights(attention, keys, torch.tensor([4, 1]))
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(weights, merge_weights(attention, keys, torch.tensor([4, 1])))
