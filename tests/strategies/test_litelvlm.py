"""LiteLVLM against the reference data, and what holds for any tokens."""

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

import tokenprune
from tokenprune.core.reads import ClipTextEmbeddings, ClsQuery, Read
from tokenprune.errors import IncompatibleError, OptionError
from tokenprune_adapters.clip.shared_space import ClipSpace
from tokenprune_adapters.clip.tower import load_tower
from tokenprune_adapters.llava.vision import run_tower
from tokenprune_strategies.litelvlm import LiteLVLM, context_scores, select

QUICK = settings(max_examples=30, deadline=None)
IMAGES = st.lists(st.integers(1, 60), min_size=1, max_size=3)


@pytest.fixture(scope="module")
def case(golden: Callable[[str], Path]) -> dict[str, Tensor]:
    return load_file(golden("litelvlm") / "case.safetensors")


@pytest.fixture(scope="module")
def cases(golden: Callable[[str], Path]) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads((golden("litelvlm") / "case.json").read_text())["settings"]
    return found


@pytest.fixture(scope="module")
def ours(golden: Callable[[str], Path], case: dict[str, Tensor]) -> dict[str, Tensor]:
    """The stored tensors, from our own reads of the reference tower."""
    folder = golden("litelvlm") / "clip"
    tower, space = load_tower(folder, torch.float32), ClipSpace(folder)
    with torch.no_grad():
        run = run_tower(tower, case["pixel_values"].float())
        found = {
            "cls_query": run.cls_query(-1)[0, 0],
            "patch_keys": run.keys(-1)[0],
            "patch_values": run.values(-1)[0],
            "patch_features": run.features[0],
            "projected_patches": run.each_patch(lambda rows: space.embed_image(tower, rows))[0],
        }
    for count in (1, 2, 3):
        ids = case[f"questions{count}.input_ids"], case[f"questions{count}.attention_mask"]
        found[f"questions{count}.text_embeds"] = space.embed_ids(*ids)
    return found


def reads_of(values: dict[str, Tensor], questions: int) -> dict[str, Any]:
    texts = values[f"questions{questions}.text_embeds"][None]
    return {
        "hidden": values["patch_features"][None],
        "cls_query": values["cls_query"].expand(1, 144, -1),
        "keys": values["patch_keys"][None],
        "values": values["patch_values"][None],
        "clip_image_embeddings": values["projected_patches"][None],
        "clip_text_embeddings": (texts, torch.ones(1, questions, dtype=torch.bool)),
    }


def test_tower_reads_and_embeddings_agree(case: dict[str, Tensor], ours: dict[str, Tensor]) -> None:
    for name, values in ours.items():
        torch.testing.assert_close(values, case[name], atol=1e-5, rtol=1e-5, msg=name)


def test_golden_context_order(case: dict[str, Tensor]) -> None:
    scores = context_scores(case["cls_query"].expand(144, -1), case["patch_keys"], case["patch_values"])
    assert torch.equal(scores.argsort(descending=True, stable=True), case["context_order"])


@pytest.mark.parametrize("number", range(9))
@pytest.mark.parametrize("source", ["stored", "ours"])
def test_golden_choice_order_and_values(
    number: int, source: str, case: dict[str, Tensor], cases: list[dict[str, Any]], ours: dict[str, Tensor]
) -> None:
    setting = cases[number]
    reads = reads_of(case if source == "stored" else ours, setting["questions"])
    strategy = LiteLVLM(keep=setting["K"])
    bench = Bench(strategy, [[144]], given=reads)
    planned = bench.planned[0]
    answer = strategy.choose(planned.stage, bench._view(planned, bench.state, planned.target))
    wanted = case[f"setting{number}.kept_in_original_order"]
    assert torch.equal(answer.origin[0], wanted)
    assert torch.equal(answer.index[0], torch.arange(setting["K"]))
    torch.testing.assert_close(answer.values[0], case[f"setting{number}.output"], atol=1e-5, rtol=0)
    unlike = case[f"setting{number}.similarity_indices"]
    assert len(unlike) == setting["similarity_rows"]
    assert torch.equal(answer.origin[0, setting["context_rows"] :], unlike)


@pytest.mark.parametrize("changes", [{"order": "image"}, {"positions": "keep"}])
def test_image_order_keeps_the_same_tokens(
    changes: dict[str, str], case: dict[str, Tensor], cases: list[dict[str, Any]]
) -> None:
    for number, setting in enumerate(cases):
        bench = Bench(LiteLVLM(keep=setting["K"], **changes), [[144]], given=reads_of(case, setting["questions"]))
        bench.enter(0)
        wanted = sorted(case[f"setting{number}.kept_in_original_order"].tolist())
        assert bench.trace.stages[0].kept[0] == wanted


@QUICK
@given(
    IMAGES,
    st.one_of(st.integers(1, 90), st.floats(0.01, 1)),
    st.sampled_from([{}, {"order": "image"}, {"positions": "keep"}]),
)
def test_keep_is_exact_per_row_and_alone(images: list[int], keep: int | float, changes: dict[str, Any]) -> None:
    """Rows have one, two or three questions."""
    rows = [images, [17] * len(images), [40]]
    strategy = LiteLVLM(keep=keep, **changes)
    bench = Bench(strategy, rows).run()
    stage = bench.trace.stages[0]
    for row, own in enumerate(rows):
        alone = Bench(strategy, [own], seeds=[row]).run()
        kept = stage.kept[row]
        assert len(kept) == alone.planned[0].target.item()
        assert kept == alone.trace.stages[0].kept[0]
        origin = stage.origin[row, kept].tolist()
        assert origin == alone.trace.stages[0].origin[0, kept].tolist()
        assert len(set(origin)) == len(origin)
        torch.testing.assert_close(bench.states[row, kept], alone.states[0, kept])


@QUICK
@given(st.integers(0, 10**6), st.integers(1, 5), st.integers(0, 30))
def test_every_question_gets_its_most_unlike_patches(seed: int, questions: int, count: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    similar, context = torch.randn(30, questions, generator=draw), torch.rand(30, generator=draw)
    chosen = select(similar, context, count).tolist()
    assert len(chosen) == len(set(chosen)) == count
    each = count // questions
    unlike = {i for question in similar.T for i in question.argsort()[:each].tolist()}
    assert unlike <= set(chosen)
    assert chosen[count - len(unlike) :] == sorted(unlike)
    rest = [i for i in context.argsort(descending=True).tolist() if i not in unlike]
    assert chosen[: count - len(unlike)] == rest[: count - len(unlike)]


@QUICK
@given(st.integers(3, 700), st.floats(0.001, 1))
def test_budgets_are_met_within_a_token(total: int, budget: float) -> None:
    check_budget_is_met_within_a_token(LiteLVLM, total, budget)


@pytest.mark.parametrize(("missing", "why"), [(ClipTextEmbeddings, "text tower"), (ClsQuery, r"a \[CLS\]")])
def test_a_model_without_what_it_needs_is_refused(missing: type[Read], why: str) -> None:
    with pytest.raises(IncompatibleError, match=rf"requires {missing.__name__}.*that needs .*{why}"):
        Bench(LiteLVLM(), [[30]], readable=set(Read.__subclasses__()) - {missing})


@pytest.mark.parametrize("bad", [{"keep": 0}, {"wording": "words"}, {"order": "any"}, {"positions": "move"}])
def test_bad_options_are_named(bad: dict[str, Any]) -> None:
    with pytest.raises(OptionError, match=f"{next(iter(bad))}"):
        tokenprune.strategy("litelvlm", **bad)
