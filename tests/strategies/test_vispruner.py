"""VisPruner and FasterVLM against the reference data, and what holds for any scores."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from strategy_bench import Bench, check_budget_is_met_within_a_token
from torch import Tensor
from torch.nn.functional import linear, normalize

import tokenprune
from tokenprune.core.decisions import Keep
from tokenprune.core.reads import ClsAttention, Crops, Read, TowerFeatures
from tokenprune.core.strategy import Strategy
from tokenprune.errors import IncompatibleError, OptionError
from tokenprune_adapters.clip.tower import load_tower
from tokenprune_adapters.llava.vision import run_tower
from tokenprune_strategies.vispruner.duplicates import distinct, kept_by_authors
from tokenprune_strategies.vispruner.vispruner import FasterVLM, VisPruner

QUICK = settings(max_examples=40, deadline=None)
IMAGES = st.lists(st.integers(1, 60), min_size=1, max_size=3)
AMOUNTS = st.one_of(st.integers(1, 90), st.floats(0.01, 1))
SHARES = st.one_of(st.sampled_from([0.0, 0.5, 0.75, 1.0]), st.floats(0, 1))
KINDS = st.sampled_from([VisPruner, FasterVLM])


@pytest.fixture(scope="module")
def case(golden: Callable[[str], Path]) -> dict[str, Tensor]:
    return load_file(golden("vispruner") / "case.safetensors")


@pytest.fixture(scope="module")
def about(golden: Callable[[str], Path]) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((golden("vispruner") / "case.json").read_text())
    return found


def decided(strategy: Strategy, attention: Tensor, features: Tensor) -> Keep:
    """What the strategy answers; every row has one image."""
    given = {"cls_attention": attention, "features": features, "crops": torch.zeros(attention.shape, dtype=torch.int64)}
    bench = Bench(strategy, [[features.shape[1]]] * len(features), given=given)
    planned = bench.planned[0]
    answer = strategy.choose(planned.stage, bench._view(planned, bench.state, planned.target))
    assert isinstance(answer, Keep)
    return answer


def likeness(features: Tensor) -> Tensor:
    states = normalize(features, dim=-1)
    return states @ states.T


def options(setting: dict[str, Any]) -> dict[str, Any]:
    return {"keep": setting["visual_token_num"], "important": setting["important_ratio"]}


def stored(case: dict[str, Tensor], name: str) -> tuple[Tensor, Tensor]:
    """[CLS] attention [B, N] and features [B, N, C] of a case."""
    if name.startswith("direct"):
        return case[f"{name[:7]}.attentions"].mean(1), case[f"{name[:7]}.features"]
    return case["cls_attention"], case["hidden_states"]


CASES = [*(f"setting{number}" for number in range(4)), "direct0", "direct1"]


def setting_of(about: dict[str, Any], name: str) -> dict[str, Any]:
    kind = "settings" if name.startswith("setting") else "direct"
    setting: dict[str, Any] = about[kind][int(name[-1])]
    return setting


@pytest.mark.parametrize("faithful", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_golden_choice(name: str, faithful: bool, case: dict[str, Tensor], about: dict[str, Any]) -> None:
    setting, (attention, features) = setting_of(about, name), stored(case, name)
    answer = decided(VisPruner(**options(setting), faithful=faithful), attention, features)
    assert torch.equal(answer.index, case[f"{name}.kept_patches"])
    assert answer.scores is not None
    important = answer.scores.argsort(descending=True, stable=True)[:, : setting["important"]]
    assert torch.equal(important, case[f"{name}.important"])


@pytest.mark.parametrize("name", [name for name in CASES if name != "setting3"])
def test_golden_rounds_and_their_order(name: str, case: dict[str, Tensor]) -> None:
    _, features = stored(case, name)
    final = case[f"{name}.residual_final"]
    for row, start in enumerate(case[f"{name}.residual_start"]):
        alike = likeness(features[row])
        assert torch.equal(distinct(alike, start, len(start) - 8), case[f"{name}.residual_round1"][row])
        assert torch.equal(distinct(alike, start, len(final[row])), final[row])


def test_golden_of_the_cls_part_alone(case: dict[str, Tensor], about: dict[str, Any]) -> None:
    setting = setting_of(about, "setting3")
    assert setting["important_ratio"] == 1
    answer = decided(FasterVLM(keep=setting["visual_token_num"]), *stored(case, "setting3"))
    assert torch.equal(answer.index, case["setting3.kept_patches"])


@pytest.mark.parametrize("number", range(4))
def test_golden_through_our_tower(
    number: int, case: dict[str, Tensor], about: dict[str, Any], golden: Callable[[str], Path]
) -> None:
    tower = load_tower(golden("vispruner") / "clip", torch.float32)
    weight, bias = case["projector.weight"].float(), case["projector.bias"].float()
    for row, pixels in enumerate(case["pixel_values"].float()):
        with torch.no_grad():
            run = run_tower(tower, pixels[None])
            attention = run.cls_attention(-2)
        torch.testing.assert_close(attention[0], case["cls_attention"][row], atol=1e-6, rtol=0)
        torch.testing.assert_close(run.features[0], case["hidden_states"][row], atol=1e-4, rtol=0)
        kept = decided(VisPruner(**options(about["settings"][number])), attention, run.features).index[0]
        assert torch.equal(kept, case[f"setting{number}.kept_patches"][row])
        projected = linear(run.features[0, kept], weight, bias)
        torch.testing.assert_close(projected, case[f"setting{number}.output"][row], atol=1e-4, rtol=0)


def drawn(size: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return torch.rand(1, size, generator=draw), torch.randn(1, size, 12, generator=draw)


@pytest.mark.parametrize("number", range(5))
def test_golden_numbers_with_which_the_authors_code_fails(number: int, about: dict[str, Any]) -> None:
    """The right number is kept; `faithful` refuses, unless the authors' code keeps the right number too."""
    probe = about["failure_probe"][number]
    keep, size = probe["visual_token_num"], probe["N"]
    attention, features = drawn(size)
    kept = decided(VisPruner(**options(probe)), attention, features).index[0]
    assert len(kept.unique()) == keep
    assert (kept >= 0).all()
    faithful = VisPruner(**options(probe), faithful=True)
    if probe["result"] == f"{keep} rows kept":
        assert torch.equal(decided(faithful, attention, features).index[0], kept)
        return
    found = "stops with an error" if probe["result"] == "IndexError" else f"keeps {probe['result'].split()[0]};"
    with pytest.raises(OptionError, match=f"to keep {keep} of an image's {size} tokens the authors' code {found}"):
        decided(faithful, attention, features)


@QUICK
@given(st.integers(1, 120), st.data())
def test_where_the_authors_code_fails(size: int, data: st.DataObject) -> None:
    """Their index of survivors is made for half of the tokens, whatever the number of those compared."""
    count = data.draw(st.integers(0, size))
    rest: int | None = size
    try:
        while 0 < count < rest:
            gone = min(8, rest - count)
            compared = torch.arange((rest + 1) // 2)[None]
            rows = torch.zeros(1, 1, dtype=torch.int64).expand(-1, rest // 2 - gone)
            rest = compared[rows, compared[:, gone:]].shape[1] + rest // 2
    except (IndexError, RuntimeError):
        rest = None
    assert kept_by_authors(size, count) == (rest if count else 0)


def slowly(attention: list[float], alike: list[list[float]], keep: int, share: float) -> list[int]:
    """The kept tokens of one image, step by step in plain Python."""
    order = sorted(range(len(attention)), key=lambda token: -attention[token])
    count = int(keep * share)
    chosen, rest = order[:count], order[count:]
    while keep - count and len(rest) > keep - count:
        compared, others = rest[0::2], rest[1::2]
        by_likeness = sorted(compared, key=lambda token: -max(alike[token][other] for other in others))
        gone = min(8, len(rest) - (keep - count), len(compared))
        rest = by_likeness[gone:] + others
    return sorted(chosen + (rest if keep > count else []))


@QUICK
@given(IMAGES, AMOUNTS, SHARES, st.booleans())
def test_every_crop_of_every_row_is_as_the_slow_reference(
    images: list[int], keep: int | float, share: float, copies: bool
) -> None:
    rows = [images, [17] * len(images)]
    strategy = VisPruner(keep=keep, important=share)
    bench = Bench(strategy, rows)
    attention, features = bench.drawn("cls_attention").exp(), bench.drawn("features", 8)
    if copies:  # nothing but ties
        attention, features = attention.round(), features.sign()
    bench.given.update(cls_attention=attention, features=features)
    view = bench._view(bench.planned[0], bench.state, bench.planned[0].target)
    crops = view.images()
    kept = bench.run().trace.stages[0].kept
    for row in range(2):
        expected = []
        for crop in (crop for crop in crops if crop.row == row):
            alike = likeness(features[row, crop.index]).tolist()
            picks = slowly(attention[row, crop.index].tolist(), alike, crop.quota, share)
            expected += crop.index[torch.tensor(picks, dtype=torch.int64)].tolist()
        assert kept[row] == sorted(expected)


@QUICK
@given(KINDS, IMAGES, AMOUNTS, st.sampled_from(["renumber", "keep"]))
def test_numbers_are_exact_and_a_row_is_itself_in_a_batch(
    kind: type[Strategy], images: list[int], keep: int | float, positions: str
) -> None:
    rows = [images, [17] * len(images), [40]]
    strategy = kind(keep=keep, positions=positions)
    bench = Bench(strategy, rows).run()
    for row, own in enumerate(rows):
        alone = Bench(strategy, [own], seeds=[row]).run()
        kept = bench.trace.stages[0].kept[row]
        assert len(kept) == alone.planned[0].target.item()
        assert kept == alone.trace.stages[0].kept[0]
    assert strategy.positions == positions


@QUICK
@given(IMAGES, AMOUNTS)
def test_without_diverse_tokens_both_are_the_same(images: list[int], keep: int | float) -> None:
    ours, theirs = (Bench(one, [images]).run() for one in (VisPruner(keep=keep, important=1.0), FasterVLM(keep=keep)))
    assert ours.trace.stages[0].kept == theirs.trace.stages[0].kept


def test_duplicates_go_and_tokens_unlike_the_others_stay() -> None:
    attention, features = torch.arange(16, 0, -1.0)[None], torch.eye(16)[None].clone()
    features[0, [0, 4, 8, 12]] = features[0, [1, 1, 9, 9]]
    kept = decided(VisPruner(keep=12, important=0.0), attention, features).index[0]
    assert kept.tolist() == [token for token in range(16) if token not in (0, 4, 8, 12)]


@pytest.mark.parametrize("kind", [VisPruner, FasterVLM])
def test_crops_share_the_tokens_by_size(kind: type[Strategy]) -> None:
    crops = torch.tensor([[0] * 20 + [1] * 20 + [2] * 40])
    kept = Bench(kind(keep=20), [[40, 40]], given={"crops": crops}).run().trace.stages[0].kept[0]
    assert crops[0, kept].bincount().tolist() == [5, 5, 10]


@pytest.mark.parametrize("kind", [VisPruner, FasterVLM])
def test_without_crops_an_image_is_one(kind: type[Strategy]) -> None:
    bench = Bench(kind(keep=10), [[30]], readable=set(Read.__subclasses__()) - {Crops}).run()
    assert len(bench.trace.stages[0].kept[0]) == 10


@QUICK
@given(KINDS, st.integers(3, 700), st.floats(0.001, 1))
def test_budgets_are_met_within_a_token(kind: type[Strategy], total: int, budget: float) -> None:
    check_budget_is_met_within_a_token(kind, total, budget)


@pytest.mark.parametrize("kind", [VisPruner, FasterVLM])
def test_the_default_keeps_128_of_576(kind: type[Strategy]) -> None:
    assert len(Bench(kind(), [[576]]).run().trace.stages[0].kept[0]) == 128


@pytest.mark.parametrize(
    ("kind", "missing"), [(VisPruner, ClsAttention), (VisPruner, TowerFeatures), (FasterVLM, ClsAttention)]
)
def test_a_tower_without_what_it_needs_is_refused(kind: type[Strategy], missing: type[Read]) -> None:
    with pytest.raises(IncompatibleError, match=f"requires {missing.__name__}"):
        Bench(kind(), [[30]], readable=set(Read.__subclasses__()) - {missing})


@pytest.mark.parametrize("bad", [{"keep": 0}, {"important": 1.5}, {"important": -0.1}, {"positions": "move"}])
def test_bad_options_are_named(bad: dict[str, Any]) -> None:
    with pytest.raises(OptionError, match=f"{next(iter(bad))}"):
        tokenprune.strategy("vispruner", **bad)
