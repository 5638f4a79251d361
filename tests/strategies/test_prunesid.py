"""PruneSID against the reference data, against a slow form of its own, and what holds for any tokens."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from strategy_bench import CHANNELS, WIDTH, Bench, check_budget_is_met_within_a_token
from torch import Tensor
from torch.nn.functional import normalize

import tokenprune
from tokenprune.core.decisions import Merge
from tokenprune.core.reads import ClsAttention, ClsFeatures, Crops, Projector, Read
from tokenprune.core.tokens import Tokens
from tokenprune.errors import IncompatibleError, InputError, OptionError
from tokenprune_adapters.clip.tower import load_tower
from tokenprune_adapters.llava.vision import run_tower
from tokenprune_strategies.prunesid.prunesid import PruneSID
from tokenprune_strategies.prunesid.selection import Patches, loadings, quotas, selected, threshold, unsuppressed

QUICK = settings(max_examples=40, deadline=None)
IMAGES = st.lists(st.integers(1, 60), min_size=1, max_size=3)
AMOUNTS = st.one_of(st.integers(1, 90), st.floats(0.01, 1))
POLICIES = st.sampled_from(["renumber", "keep"])
CASES = ["setting0", "setting1", "setting2", "direct0"]


@pytest.fixture(scope="module")
def case(golden: Callable[[str], Path]) -> dict[str, Tensor]:
    return load_file(golden("prunesid") / "case.safetensors")


@pytest.fixture(scope="module")
def about(golden: Callable[[str], Path]) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((golden("prunesid") / "case.json").read_text())
    return found


@pytest.fixture
def global_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Random numbers as the authors' run drew them: from the seed alone."""
    monkeypatch.setattr(Tokens, "generator", lambda self, seed=0: torch.Generator().manual_seed(seed))


def setting_of(about: dict[str, Any], name: str) -> dict[str, Any]:
    setting: dict[str, Any] = about["settings" if name.startswith("setting") else "direct"][int(name[-1])]
    return setting


def reads_of(case: dict[str, Tensor], name: str) -> dict[str, Any]:
    """What the strategy reads, from the stored rows of the tower."""
    states, attention = case["hidden_states"], case["cls_attention"]
    if name.startswith("direct"):
        states, attention = case[f"{name}.hidden_states"], case[f"{name}.attention"].sum(1)[:, 1:]
    return reads_from(states[:, 1:], attention, states[:, :1])


def reads_from(features: Tensor, attention: Tensor, cls: Tensor) -> dict[str, Any]:
    crops = torch.zeros(attention.shape, dtype=torch.int64)
    given = {"features": features, "cls_attention": attention, "cls_features": cls.expand_as(features), "crops": crops}
    return {**given, "project": lambda rows: rows}


def decided(strategy: PruneSID, reads: dict[str, Any]) -> Merge:
    """What the strategy answers; every row has one image."""
    features = reads["features"]
    bench = Bench(strategy, [[features.shape[1]]] * len(features), given=reads)
    planned = bench.planned[0]
    answer = strategy.choose(planned.stage, bench._view(planned, bench.state, planned.target))
    assert isinstance(answer, Merge)
    return answer


def compared(reads: dict[str, Any], row: int, groups: Tensor, total: int) -> Patches:
    """The patches of a row, with given groups."""
    unit = normalize(reads["features"][row], dim=-1)
    likeness = unit @ unit.T
    order = reads["cls_attention"][row].argsort(descending=True, stable=True)
    return Patches(groups, order, likeness > threshold(likeness, total))


@pytest.mark.parametrize("name", CASES)
def test_golden_groups_of_the_stored_start(name: str, case: dict[str, Tensor], about: dict[str, Any]) -> None:
    setting, start = setting_of(about, name), case[f"{name}.pca_random"]
    drawn = torch.randn(*start.shape, generator=torch.Generator().manual_seed(setting["seed"]))
    assert torch.equal(drawn, start)
    for row, features in enumerate(reads_of(case, name)["features"]):
        found = loadings(features, setting["groups"], start)
        stored = case[f"{name}.group_loadings"][row].float()
        torch.testing.assert_close(found, stored, atol=5e-4, rtol=0)
        assert torch.equal(found.argmax(1), case[f"{name}.groups"][row])


@pytest.mark.parametrize("name", CASES)
def test_golden_exact_groups(name: str, case: dict[str, Tensor], about: dict[str, Any]) -> None:
    """They differ from the stored ones at as many patches as the data say that an exact decomposition does."""
    setting, features = setting_of(about, name), reads_of(case, name)["features"]
    exact = torch.stack([loadings(one, setting["groups"]) for one in features])
    differ = exact.argmax(2) != case[f"{name}.groups"]
    assert int(differ.sum()) == setting["rows_whose_group_differs_with_exact_svd"]
    for one, found in zip(features, exact, strict=True):
        matrix = one.double().sigmoid().T
        wanted = torch.linalg.svd(matrix - matrix.mean(0), full_matrices=False).Vh[: setting["groups"]].T.abs()
        torch.testing.assert_close(found.double(), wanted, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", CASES)
def test_golden_suppression_and_quotas_of_the_stored_groups(
    name: str, case: dict[str, Tensor], about: dict[str, Any]
) -> None:
    total, reads, number = setting_of(about, name)["need_token_num"], reads_of(case, name), setting_of(about, name)
    for row, groups in enumerate(case[f"{name}.groups"]):
        unit = normalize(reads["features"][row], dim=-1)
        limit = threshold(unit @ unit.T, total)
        torch.testing.assert_close(limit, case[f"{name}.threshold"][row], atol=1e-6, rtol=0)
        patches = compared(reads, row, groups, total)
        remain = groups[unsuppressed(patches)].bincount(minlength=number["groups"])
        sizes = groups.bincount(minlength=number["groups"])
        assert torch.equal(remain, case[f"{name}.nms_counts"][row])
        assert torch.equal(sizes, case[f"{name}.group_sizes"][row])
        assert torch.equal(quotas(remain, sizes, total), case[f"{name}.group_quota"][row])
        assert torch.equal(selected(patches, total) + 1, case[f"{name}.kept_rows"][row, 1:])


@pytest.mark.usefixtures("global_seed")
@pytest.mark.parametrize("name", CASES)
def test_golden_choice_order_and_values(name: str, case: dict[str, Tensor], about: dict[str, Any]) -> None:
    setting, reads = setting_of(about, name), reads_of(case, name)
    theirs = {"keep": setting["need_token_num"], "faithful": True, "seed": setting["seed"]}
    answer = decided(PruneSID(**theirs), reads)
    wanted = case[f"{name}.kept_rows"] - 1
    assert answer.origin is not None
    assert answer.values is not None
    assert torch.equal(answer.origin, wanted)
    assert torch.equal(answer.index, torch.arange(wanted.shape[1]).expand_as(wanted))
    torch.testing.assert_close(answer.values, case[f"{name}.output"], atol=1e-4, rtol=0)
    placed = decided(PruneSID(**theirs, positions="keep"), reads)
    assert placed.origin is not None
    assert torch.equal(placed.origin.sort().values, wanted.sort().values)


@pytest.mark.usefixtures("global_seed")
@pytest.mark.parametrize("number", range(3))
def test_golden_through_our_tower(
    number: int, case: dict[str, Tensor], about: dict[str, Any], golden: Callable[[str], Path]
) -> None:
    tower, setting = load_tower(golden("prunesid") / "clip", torch.float32), about["settings"][number]
    for row, pixels in enumerate(case["pixel_values"].float()):
        with torch.no_grad():
            run = run_tower(tower, pixels[None])
            reads = reads_from(run.features, run.cls_attention(-2), run.cls_features)
        torch.testing.assert_close(run.features[0], case["hidden_states"][row, 1:], atol=1e-4, rtol=0)
        torch.testing.assert_close(4 * reads["cls_attention"][0], case["cls_attention"][row], atol=1e-5, rtol=0)
        answer = decided(PruneSID(keep=setting["need_token_num"], faithful=True, seed=setting["seed"]), reads)
        assert answer.origin is not None
        assert torch.equal(answer.origin[0], case[f"setting{number}.kept_rows"][row] - 1)
        torch.testing.assert_close(answer.values[0], case[f"setting{number}.output"][row], atol=1e-4, rtol=0)


# for any tokens -------------------------------------------------------------------------------------------------------


def slowly(states: Tensor, attention: list[float], total: int) -> list[int]:
    """The kept patches of one crop, ascending, with loops over patches."""
    size, channels = states.shape
    groups = loadings(states, max(1, min(total // 4, channels - 1))).argmax(1).tolist()
    unit = normalize(states, dim=-1)
    alike = unit @ unit.T
    pairs = [float(alike[i, j]) for i in range(size) for j in range(i + 1, size)]
    limit = float(np.mean(pairs)) * total / 32
    left, ranked = set(range(size)), []
    while left:
        best = max(left, key=lambda patch: (attention[patch], -patch))
        ranked.append(best)
        left -= {patch for patch in left if groups[patch] == groups[best] and float(alike[best, patch]) > limit}
        left -= {best}
    remain = [[patch for patch in ranked if groups[patch] == group] for group in range(max(groups) + 1)]
    everything = sorted(range(size), key=lambda patch: (-attention[patch], patch))
    members = [
        own + [patch for patch in everything if groups[patch] == group and patch not in own]
        for group, own in enumerate(remain)
    ]
    most = [min(5 * math.ceil(total / 64), len(own)) for own in remain]
    while sum(most) < total:
        most = [min(one + 1, len(own)) for one, own in zip(most, members, strict=True)]
    least = [min(1, len(own)) for own in members]
    # ends of shares are often halves, which rounding errors decide: in torch's, as in the authors' code
    counts, free = torch.tensor([float(len(own)) for own in remain]), total - sum(least) - 1
    ends = [0, *(round(float(end)) for end in (counts / len(ranked)).cumsum(0) * free)]
    found = [min(up, end - start + low) for up, start, end, low in zip(most, ends, ends[1:], least, strict=False)]
    for group in sorted(range(len(remain)), key=lambda group: -len(remain[group])):
        while sum(found) < total - 1 and found[group] < most[group]:
            found[group] += 1
    return sorted(patch for own, count in zip(members, found, strict=True) for patch in own[:count])


@QUICK
@given(IMAGES, AMOUNTS)
def test_every_crop_of_every_row_is_as_the_slow_form(images: list[int], keep: int | float) -> None:
    rows = [images, [17] * len(images)]
    bench = Bench(PruneSID(keep=keep), rows)
    attention, features = bench.drawn("cls_attention").exp(), bench.drawn("features", CHANNELS)
    crops = bench._view(bench.planned[0], bench.state, bench.planned[0].target).images()
    bench.enter(0)
    stage = bench.trace.stages[0]
    for row in range(2):
        wanted: list[int] = []
        for crop in (crop for crop in crops if crop.row == row):
            if crop.quota in (0, len(crop)):
                wanted += crop.index[: crop.quota].tolist()
                continue
            wanted.append(-1)
            if crop.quota > 1:
                own = slowly(features[row, crop.index], attention[row, crop.index].tolist(), crop.quota)
                wanted += crop.index[own].tolist()
        assert stage.origin[row, stage.kept[row]].tolist() == wanted


@QUICK
@given(st.lists(st.tuples(st.integers(0, 20), st.floats(0, 1)), min_size=1, max_size=12), st.floats(0, 1))
def test_quotas_are_exact_and_fit_into_their_groups(groups: list[tuple[int, float]], share: float) -> None:
    sizes = torch.tensor([size for size, _ in groups])
    counts = torch.tensor([min(size, 1 + int(size * part)) for size, part in groups])
    least = int((sizes > 0).sum()) + 1
    if int(sizes.sum()) < least:
        return
    total = least + int(share * (int(sizes.sum()) - least))
    found = quotas(counts, sizes, total)
    assert int(found.sum()) == total - 1
    assert bool(((found >= sizes.clamp(max=1)) & (found <= sizes)).all())


@QUICK
@given(POLICIES, IMAGES, AMOUNTS)
def test_numbers_are_exact_and_a_row_is_itself_in_a_batch(positions: str, images: list[int], keep: int | float) -> None:
    rows = [images, [17] * len(images), [40]]
    strategy = PruneSID(keep=keep, positions=positions)
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
@given(st.lists(st.integers(30, 60), min_size=1, max_size=3), st.floats(0.2, 0.5), st.integers(0, 9))
def test_a_row_of_the_authors_form_is_itself_in_a_batch(images: list[int], keep: float, seed: int) -> None:
    rows, strategy = [images, [40]], PruneSID(keep=keep, faithful=True, seed=seed)
    bench = Bench(strategy, rows).run()
    for row, own in enumerate(rows):
        alone = Bench(strategy, [own], seeds=[row]).run()
        ours, theirs = (one.trace.stages[0].origin for one in (bench, alone))
        assert torch.equal(ours[row, : sum(own)], theirs[0, : sum(own)])


@QUICK
@given(IMAGES, st.floats(0.05, 1))
def test_keep_policy_gives_the_same_tokens_at_their_own_places(images: list[int], keep: float) -> None:
    compact, placed = (Bench(PruneSID(keep=keep, positions=policy), [images]) for policy in ("renumber", "keep"))
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


def test_groups_depend_on_the_seed_only_where_faithful() -> None:
    def origins(**options: Any) -> list[int]:
        bench = Bench(tokenprune.strategy("prunesid", keep=20, **options), [[60]])
        bench.enter(0)
        found: list[int] = bench.trace.stages[0].origin[0, :20].tolist()
        return found

    drawn = [origins(faithful=True, seed=seed) for seed in (0, 0, 1, 2)]
    assert drawn[0] == drawn[1]
    assert len({tuple(one) for one in drawn}) > 1
    assert origins()[0] == -1
    assert origins()[1:] == sorted(origins()[1:])
    with pytest.raises(OptionError, match="seed"):
        origins(seed=1)


def test_groups_of_separate_directions() -> None:
    """Patches of one direction are one group, whatever their number."""
    directions = torch.linalg.qr(torch.randn(40, 40, generator=torch.Generator().manual_seed(1)))[0][:3]
    own = torch.tensor([0] * 9 + [1] * 6 + [2] * 4)
    rows = 8 * directions[own] * torch.linspace(0.9, 1.1, 19)[:, None]
    groups = loadings(rows, 3).argmax(1)
    assert [len(groups[own == one].unique()) for one in range(3)] == [1, 1, 1]
    assert len(groups.unique()) == 3


def test_everything_kept_is_left_as_it_is() -> None:
    bench = Bench(PruneSID(keep=1.0), [[9, 4]])
    features = bench.drawn("features", CHANNELS)
    bench.enter(0)
    assert bench.trace.stages[0].origin[0].tolist() == list(range(13))
    torch.testing.assert_close(bench.states[0], features[0, :, :WIDTH] * 2)


def test_one_token_is_cls_and_stands_for_no_patch() -> None:
    bench = Bench(PruneSID(keep=1), [[9]])
    cls = bench.drawn("cls_features", CHANNELS)
    bench.enter(0)
    stage = bench.trace.stages[0]
    assert (stage.kept[0], stage.origin[0, 0].item(), stage.mass[0, 0].item()) == ([0], -1, 0)
    torch.testing.assert_close(bench.states[0, 0], cls[0, 0, :WIDTH] * 2)


@pytest.mark.parametrize("faithful", [False, True])
def test_crops_share_the_tokens_and_their_cls_rows_come_last(faithful: bool) -> None:
    """Tiles side by side: rows of the grid run through both. The authors' values of a tile come in its own order."""
    crops = torch.tensor([([0] * 6 + [1] * 6) * 6])
    strategy = PruneSID(keep=40, faithful=faithful)
    bench = Bench(strategy, [[72]], given={"crops": crops})
    cls = bench.drawn("cls_features", CHANNELS)
    features, attention = bench.drawn("features", CHANNELS), bench.drawn("cls_attention").exp()
    bench.enter(0)
    origin = bench.trace.stages[0].origin[0, :40]
    assert origin[-2:].tolist() == [-1, -1]
    torch.testing.assert_close(bench.states[0, 38:40], torch.stack((cls[0, 0], cls[0, 6]))[:, :WIDTH] * 2)
    for tile in range(2):
        inside = (crops[0] == tile).nonzero().flatten()
        reads = reads_from(features[:, inside], attention[:, inside], cls[:, :1])
        alone = decided(PruneSID(keep=20, faithful=faithful), reads).origin
        assert alone is not None
        own = origin[:38][crops[0, origin[:38]] == tile]
        assert own.tolist() == inside[alone[0, 1:]].tolist()
    if not faithful:
        assert origin[:38].tolist() == origin[:38].sort().values.tolist()
    with_order = crops[0, origin[:38]]
    assert with_order.bincount().tolist() == [19, 19]


@pytest.mark.parametrize(("keep", "tokens", "groups"), [(3, 30, 0), (1, 30, 0), (40, 60, 10)])
def test_numbers_with_which_the_authors_code_stops(keep: int, tokens: int, groups: int) -> None:
    text = f"keep {keep} of an image's {tokens} tokens the authors' code makes {groups} groups of {CHANNELS} channels"
    with pytest.raises(OptionError, match=text):
        Bench(PruneSID(keep=keep, faithful=True), [[tokens]]).enter(0)
    bench = Bench(PruneSID(keep=keep), [[tokens]])
    bench.enter(0)
    assert len(bench.trace.stages[0].kept[0]) == keep


@pytest.mark.parametrize(
    ("name", "value"), [("features", math.nan), ("features", math.inf), ("cls_attention", math.nan)]
)
def test_what_is_not_finite_is_refused(name: str, value: float) -> None:
    given = {"features": torch.randn(1, 20, CHANNELS), "cls_attention": torch.ones(1, 20)}
    given[name][0, 3] = value
    with pytest.raises(InputError, match=rf"'prunesid', stage '.*': NaN or infinity in tokens\.{name} .*image token 3"):
        Bench(PruneSID(keep=6), [[20]], given=given).enter(0)


@QUICK
@given(st.integers(1, 30), st.integers(1, 30))
def test_equal_patches_are_chosen_from_too(tokens: int, keep: int) -> None:
    given = {"features": torch.ones(1, tokens, CHANNELS), "cls_attention": torch.ones(1, tokens)}
    bench = Bench(PruneSID(keep=keep), [[tokens]], given=given)
    bench.enter(0)
    assert len(bench.trace.stages[0].kept[0]) == min(keep, tokens)


@QUICK
@given(st.integers(3, 700), st.floats(0.001, 1))
def test_budgets_are_met_within_a_token(total: int, budget: float) -> None:
    check_budget_is_met_within_a_token(PruneSID, total, budget)


def test_the_default_keeps_64_of_576() -> None:
    bench = Bench(PruneSID(), [[576]])
    bench.enter(0)
    assert len(bench.trace.stages[0].kept[0]) == 64


@pytest.mark.parametrize("missing", [ClsAttention, ClsFeatures, Projector])
def test_a_tower_without_cls_is_refused(missing: type[Read]) -> None:
    with pytest.raises(IncompatibleError, match=f"requires {missing.__name__}"):
        Bench(PruneSID(), [[30]], readable=set(Read.__subclasses__()) - {missing})


def test_without_crops_an_image_is_one() -> None:
    bench = Bench(PruneSID(keep=10), [[30]], readable=set(Read.__subclasses__()) - {Crops})
    bench.enter(0)
    assert len(bench.trace.stages[0].kept[0]) == 10


@pytest.mark.parametrize("bad", [{"keep": 0}, {"keep": 1.5}, {"positions": "move"}])
def test_bad_options_are_named(bad: dict[str, Any]) -> None:
    with pytest.raises(OptionError, match=f"{next(iter(bad))}"):
        tokenprune.strategy("prunesid", **bad)
