"""CDPruner against the reference data, and what holds for any tokens."""

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
from torch import Tensor, nn

import tokenprune
from tokenprune.core.apportion import apportion
from tokenprune.core.reads import ClipImageEmbeddings, ClipTextEmbeddings, Read
from tokenprune.errors import IncompatibleError, OptionError, PluginError
from tokenprune_adapters.clip.shared_space import ClipSpace
from tokenprune_adapters.clip.tower import load_tower
from tokenprune_adapters.llava.vision import run_tower
from tokenprune_strategies.cdpruner import CDPruner, dissimilarity, scaled
from tokenprune_strategies.ops.dpp import map_picks

QUICK = settings(max_examples=30, deadline=None)
IMAGES = st.lists(st.integers(1, 60), min_size=1, max_size=3)
CASES = [(text, number) for text in range(2) for number in range(3)]
KEEP = [12, 40, 70]


@pytest.fixture(scope="module")
def case(golden: Callable[[str], Path]) -> dict[str, Tensor]:
    return load_file(golden("cdpruner") / "case.safetensors")


@pytest.fixture(scope="module")
def ours(golden: Callable[[str], Path], case: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same tensors from our own reads of the reference tower."""
    folder = golden("cdpruner") / "clip"
    tower, space = load_tower(folder, torch.float32), ClipSpace(folder)
    projector = nn.Sequential(nn.Linear(32, 128), nn.GELU(), nn.Linear(128, 128))
    projector.load_state_dict({n.removeprefix("projector."): t for n, t in case.items() if n.startswith("projector.")})
    with torch.no_grad():
        runs = [run_tower(tower, pixels[None]) for pixels in case["pixel_values"].float()]
        features = torch.cat([run.features for run in runs])
        found = {
            "tower_features": features,
            "image_embeds": torch.cat([run.each_patch(lambda rows: space.embed_image(tower, rows)) for run in runs]),
            "image_features": projector(features),
        }
        for text in ("text0", "text1"):
            ids = case[f"{text}.input_ids"], case[f"{text}.attention_mask"]
            found[f"{text}.text_embeds"] = space.embed_ids(*ids)
    return found


def tiles(values: dict[str, Tensor], text: int) -> dict[str, Any]:
    """Reads of one row, whose image is seen in two crops."""
    texts = values[f"text{text}.text_embeds"][None]
    return {
        "hidden": values["image_features"].flatten(0, 1)[None],
        "clip_image_embeddings": values["image_embeds"].flatten(0, 1)[None],
        "clip_text_embeddings": (texts, torch.ones(texts.shape[:2], dtype=torch.bool)),
        "crops": torch.arange(2).repeat_interleave(144)[None],
    }


def test_embeddings_agree(case: dict[str, Tensor], ours: dict[str, Tensor]) -> None:
    for name, values in ours.items():
        torch.testing.assert_close(values, case[name], atol=1e-5, rtol=1e-5, msg=name)


@pytest.mark.parametrize(("text", "number"), CASES)
@pytest.mark.parametrize("source", ["stored", "ours"])
def test_golden_choice(text: int, number: int, source: str, case: dict[str, Tensor], ours: dict[str, Tensor]) -> None:
    reads = tiles(case if source == "stored" else ours, text)
    bench = Bench(CDPruner(keep=2 * KEEP[number]), [[288]], given=reads)
    bench.enter(0)
    stage, wanted = bench.trace.stages[0], case[f"text{text}.setting{number}.kept_indices"]
    assert stage.kept[0] == [*wanted[0].tolist(), *(wanted[1] + 144).tolist()]
    if text == 0:
        torch.testing.assert_close(stage.scores[0], case["relevance_text0"].flatten(), atol=1e-5, rtol=0)


@pytest.mark.parametrize(("text", "number"), CASES)
def test_golden_picking_order(text: int, number: int, case: dict[str, Tensor]) -> None:
    reads = tiles(case, text)
    texts, exist = reads["clip_text_embeddings"]
    values = dissimilarity(reads["clip_image_embeddings"], texts, exist)
    scores = scaled(values, torch.ones(1, 288, dtype=torch.bool))
    counts = torch.tensor([KEEP[number]] * 2)
    picks = map_picks(case["image_features"], scores.view(2, 144), torch.ones(2, 144, dtype=torch.bool), counts)
    assert torch.equal(picks, case[f"text{text}.setting{number}.selection_order"])


def test_texts_are_cut_into_segments_as_the_authors_cut_them(
    golden: Callable[[str], Path], case: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The reference's own ids, made by a stand-in for the tokenizer, cut by us."""
    space = ClipSpace(golden("cdpruner") / "clip")
    texts = json.loads((golden("cdpruner") / "case.json").read_text())["texts"]
    for number, text in enumerate(texts):
        ids, mask = case[f"text{number}.input_ids"], case[f"text{number}.attention_mask"]
        flat = ids[mask.bool()].tolist()
        monkeypatch.setitem(space.__dict__, "_tokenizer", lambda text, flat=flat, **options: {"input_ids": flat})
        found, found_mask = space.cut_ids(text, "segments")
        width = found.shape[1]
        assert torch.equal(found, ids[:, :width])
        assert torch.equal(found_mask, mask[:, :width])
        embedded = space.embed_texts([text], "segments", torch.device("cpu"))
        torch.testing.assert_close(embedded, case[f"text{number}.text_embeds"], atol=1e-5, rtol=0)
    with pytest.raises(PluginError, match="cut='words' is not known; expected 'truncate' or 'segments'"):
        ClipTextEmbeddings(cut="words")


@QUICK
@given(IMAGES, st.one_of(st.integers(1, 90), st.floats(0.01, 1)), st.sampled_from(["renumber", "keep"]))
def test_keep_is_exact_per_row_and_alone(images: list[int], keep: int | float, positions: str) -> None:
    rows = [images, [17] * len(images), [40]]
    strategy = CDPruner(keep=keep, positions=positions)
    stage = Bench(strategy, rows).run().trace.stages[0]
    for row, own in enumerate(rows):
        alone = Bench(strategy, [own], seeds=[row]).run()
        assert len(stage.kept[row]) == alone.planned[0].target.item()
        assert stage.kept[row] == alone.trace.stages[0].kept[0]
    assert strategy.positions == positions


@QUICK
@given(IMAGES, st.one_of(st.integers(1, 90), st.floats(0.01, 1)))
def test_split_each_half_of_an_image_is_pruned_as_an_image_of_its_own(images: list[int], keep: int | float) -> None:
    bench = Bench(CDPruner(keep=keep, split=True), [images])
    kept, target = bench.run().trace.stages[0].kept[0], int(bench.planned[0].target)
    assert len(kept) == target
    texts, exist = bench.provide(ClipTextEmbeddings(cut="segments"))
    values = dissimilarity(bench.provide(ClipImageEmbeddings()), texts, exist)[0]
    expected, start = [], 0
    for size, quota in zip(images, apportion(target, images), strict=True):
        first = min(size // 2, (quota + 1) // 2)
        for begin, end, count in ((0, size // 2, first), (size // 2, size, quota - first)):
            part = slice(start + begin, start + end)
            if begin == end:
                continue
            every = torch.ones(1, end - begin, dtype=torch.bool)
            weights = scaled(values[None, part], every)
            picks = map_picks(bench.embeddings[:, part], weights, every, torch.tensor([count]))[0]
            expected += [start + begin + pick for pick in picks.tolist()]
        start += size
    assert kept == sorted(expected)


def test_tokens_less_like_the_text_weigh_more() -> None:
    images = torch.tensor([[[1.0, 0], [0, 2], [-3, 0], [1, 1]]])
    texts = torch.tensor([[[1.0, 0], [9, 9]]])
    values = dissimilarity(images, texts, torch.tensor([[True, False]]))
    scores = scaled(values, torch.ones(1, 4, dtype=torch.bool))
    torch.testing.assert_close(scores[0], torch.tensor([0, 0.5, 1, 0.5 - 0.5**1.5]), atol=1e-5, rtol=0)


def test_equal_relevance_is_no_division_by_zero() -> None:
    values = dissimilarity(torch.ones(1, 4, 3), torch.ones(1, 1, 3), torch.ones(1, 1).bool())
    scores = scaled(values, torch.ones(1, 4).bool())
    assert scores.isfinite().all()
    assert (scores[0] == scores[0, 0]).all()


@QUICK
@given(st.integers(0, 10**6), st.integers(1, 8), st.integers(2, 40))
def test_every_token_is_picked_once_where_the_rank_is_used_up(seed: int, rank: int, count: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    states = torch.randn(2, 60, rank, generator=draw)
    states[:, 30:] = states[:, :30]
    weights = torch.rand(2, 60, generator=draw)
    exists = torch.ones(2, 60, dtype=torch.bool)
    exists[1, 50:] = False
    picks = map_picks(states, weights, exists, torch.tensor([count, count // 2]))
    assert picks.shape == (2, count)
    for group, number in enumerate((count, count // 2)):
        found = picks[group][picks[group] >= 0].tolist()
        assert len(found) == len(set(found)) == number
        assert all(exists[group, pick] for pick in found)


@QUICK
@given(st.integers(0, 10**6))
def test_picks_are_the_greedy_ones_by_determinants(seed: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    states, weights = torch.randn(1, 12, 16, generator=draw), torch.rand(1, 12, generator=draw) + 0.2
    picks = map_picks(states, weights, torch.ones(1, 12, dtype=torch.bool), torch.tensor([5]))[0].tolist()
    rows = torch.nn.functional.normalize(states[0].double(), dim=-1) * weights[0, :, None]
    kernel = rows @ rows.T
    for step, pick in enumerate(picks):
        sets = [[*picks[:step], token] for token in range(12)]
        volumes = [float(torch.det(kernel[some][:, some])) for some in sets]  # 0 for one that is picked already
        assert volumes[pick] >= max(volumes) * (1 - 1e-4)


@QUICK
@given(st.integers(3, 700), st.floats(0.001, 1))
def test_budgets_are_met_within_a_token(total: int, budget: float) -> None:
    check_budget_is_met_within_a_token(CDPruner, total, budget)


@pytest.mark.parametrize("missing", [ClipImageEmbeddings, ClipTextEmbeddings])
def test_a_model_without_a_text_tower_is_refused(missing: type[Read]) -> None:
    with pytest.raises(IncompatibleError, match=rf"requires {missing.__name__}.*that needs .* text tower"):
        Bench(CDPruner(), [[30]], readable=set(Read.__subclasses__()) - {missing})


@pytest.mark.parametrize("bad", [{"keep": 0}, {"wording": "words"}, {"positions": "move"}])
def test_bad_options_are_named(bad: dict[str, Any]) -> None:
    with pytest.raises(OptionError, match=f"{next(iter(bad))}"):
        tokenprune.strategy("cdpruner", **bad)
