"""GLaMM's conversations, grounded answers and pruning with several mask queries in a row, on a tiny random model."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from clip_checkpoints import whole_clip
from glamm_checkpoints import write_glamm
from hypothesis import given
from hypothesis import strategies as st
from lisa_checkpoints import IMAGE_TOKENS

import tokenprune as tp
from tokenprune.cost import DecoderSpec, count_flops
from tokenprune.errors import InputError, UnsupportedError
from tokenprune.evaluation.models import SegmentationModel
from tokenprune_adapters.glamm import GlammModel
from tokenprune_adapters.glamm.prompts import ANSWERS, QUESTIONS, turn
from tokenprune_adapters.glamm.results import phrase_span
from tokenprune_adapters.llava.prompt import prompt_ids

HEIGHT, WIDTH = 45, 70
QUERIES = ["cat", "man in red", "Which of these can swim?"]
OPENING = "USER: The <im_start><image><im_end> provides an overview of the picture.\nWhat is there? ASSISTANT:"
GROUNDED = "There is <p> a cat </p> [SEG] near <p> two dogs </p> [SEG] and [SEG]."


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_glamm(tmp_path_factory.mktemp("glamm"))
    whole_clip(folder / "vision_tower")
    return folder


@pytest.fixture(scope="module")
def model(folder: Path) -> GlammModel:
    loaded: GlammModel = tp.load(folder)
    return loaded


@pytest.fixture(scope="module")
def image() -> np.ndarray[Any, Any]:
    return np.random.default_rng(0).integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)


# prompts -------------------------------------------------------------------------------------------------------------


def test_queries_are_turns_of_one_conversation(model: GlammModel) -> None:
    (prompt,) = model.prompts(QUERIES)
    turns = model.turns(QUERIES)
    first, *later = (f"{question} ASSISTANT: {answer}</s>" for question, answer in turns)
    overview = "USER: The <im_start><image><im_end> provides an overview of the picture.\n"
    assert prompt.endswith(overview + first + "".join("USER: " + text for text in later))
    assert turns[2][0] == "Which of these can swim? Please output segmentation mask."


def test_templates_depend_on_the_seed_and_the_query_alone(model: GlammModel) -> None:
    assert model.turns(QUERIES)[1] == model.turns("man in red")[0] == turn("man in red", False, 0)
    names = [f"thing {i}" for i in range(400)]
    drawn = [turn(name, False, 3) for name in names]
    assert {question.replace(name, "{}") for name, (question, _) in zip(names, drawn, strict=True)} == set(QUESTIONS)
    assert {answer for _, answer in drawn} == set(ANSWERS)
    assert drawn != [turn(name, False, 4) for name in names]


def test_the_seed_is_a_load_option(folder: Path) -> None:
    names = [f"thing {i}" for i in range(9)]
    other = tp.load(folder, template_seed=5)
    assert other.turns(names) == [turn(name, False, 5) for name in names]


def test_generation_asks_every_query_on_its_own(model: GlammModel) -> None:
    prompts = model.prompts(QUERIES, answer="generate")
    assert len(prompts) == 3
    assert prompts[2].endswith("of the picture.\nWhich of these can swim? ASSISTANT:")
    assert prompts[0].endswith(f"of the picture.\n{model.turns('cat')[0][0]} ASSISTANT:")


@pytest.mark.parametrize("token", ["[SEG]", "<p>", "</p>", "<bbox>", "<point>", "<image>"])
def test_queries_with_tokens_of_their_own_are_refused(model: GlammModel, token: str) -> None:
    with pytest.raises(InputError, match="complete") as found:
        model.prompts(f"the {token} cat")
    assert token in str(found.value)


def test_boxes_are_refused(model: GlammModel, image: np.ndarray[Any, Any]) -> None:
    with pytest.raises(UnsupportedError, match=r"boxes= was given.*region encoder is left out"):
        model.segment(image, "the cat", boxes=[[0, 0, 5, 5]])


# masks ---------------------------------------------------------------------------------------------------------------


def test_shapes_and_types(model: GlammModel, image: np.ndarray[Any, Any]) -> None:
    assert isinstance(model, SegmentationModel)
    result = model.segment(image, QUERIES)
    assert (result.masks.shape, result.masks.dtype) == ((3, HEIGHT, WIDTH), torch.bool)
    assert (result.query_index, result.row_index, result.phrases) == ([0, 1, 2], [0, 0, 0], [""] * 3)
    assert result.text == [answer for _, answer in model.turns(QUERIES)]
    alone = model.segment(image, "cat")
    assert (alone.text, alone.query_index) == (model.turns("cat")[0][1], [0])


def states(
    model: GlammModel, image: np.ndarray[Any, Any], queries: list[str], strategy: tp.Strategy | None = None
) -> torch.Tensor:
    """The states of the mask queries of a conversation: [queries, H]."""
    with torch.inference_mode():
        return model.answer(model.build_inputs(image, queries), strategy).states


def test_later_turns_see_earlier_ones_and_not_the_reverse(model: GlammModel, image: np.ndarray[Any, Any]) -> None:
    together = states(model, image, QUERIES)
    for count in (1, 2):
        assert torch.allclose(together[:count], states(model, image, QUERIES[:count]), atol=1e-4)
    assert not torch.allclose(together[1], states(model, image, QUERIES[1:2])[0], atol=1e-2)


def test_several_prompts_are_several_rows(model: GlammModel, image: np.ndarray[Any, Any]) -> None:
    prompts = [f"{OPENING} {GROUNDED}</s>", f"{OPENING} [SEG].</s>"]
    both = model.segment(image, prompt=prompts)
    assert both.query_index == both.row_index == [0, 0, 0, 1]
    assert both.phrases == ["a cat", "two dogs", "", ""]
    alone = model.segment(image, prompt=prompts[1])
    assert torch.allclose(both.low_res_logits[3], alone.low_res_logits[0], atol=1e-4)


def scripted(model: GlammModel, monkeypatch: pytest.MonkeyPatch, ids: list[int]) -> None:
    """Let the model say these ids, one a forward, whatever it would have said."""
    script: Iterator[int] = iter(ids)
    rows = model.decoder.lm_head.out_features

    def forward(state: torch.Tensor) -> torch.Tensor:
        logits = torch.zeros(*state.shape[:-1], rows)
        logits[..., next(script)] = 1
        return logits

    monkeypatch.setattr(model.decoder.lm_head, "forward", forward)


@pytest.mark.parametrize("strategy", [None, "none", "uniform", "prumerge+"])
def test_grounded_phrases_in_free_generation(
    model: GlammModel, image: np.ndarray[Any, Any], monkeypatch: pytest.MonkeyPatch, strategy: str | None
) -> None:
    pruning = None if strategy is None else tp.strategy(strategy)
    whole, opening = (prompt_ids(model.tokenizer, text) for text in (f"{OPENING} {GROUNDED}</s>", OPENING))
    assert whole[: len(opening)] == opening
    scripted(model, monkeypatch, whole[len(opening) :])
    said = model.segment(image, prompt=OPENING, answer="generate", strategy=pruning, draft=False)
    assert said.phrases == ["a cat", "two dogs", ""]
    assert said.text == "There is <p> a cat </p> [SEG] near <p> two dogs </p> [SEG] and [SEG] ."
    assert (said.query_index, said.masks.shape) == ([0, 0, 0], (3, HEIGHT, WIDTH))
    with torch.inference_mode():
        encoded = model.encode_image(image)
        forced = model.answer(model.inputs_of([f"{OPENING} {GROUNDED}</s>"], encoded), pruning)
        scripted(model, monkeypatch, whole[len(opening) :])
        free = model.answer(model.inputs_of([OPENING], encoded, continues=True), pruning, 64, draft=False)
    assert torch.allclose(free.states, forced.states, atol=1e-4)
    assert not torch.allclose(free.states[0], free.states[1], atol=1e-2)


SEG, START, END = 1, 2, 3


@given(st.lists(st.integers(SEG, 6), max_size=14))
def test_a_phrase_has_its_marks_and_no_mask_between(ids: list[int]) -> None:
    ids = [*ids, SEG]
    begin, stop = phrase_span(ids, len(ids) - 1, SEG, START, END)
    assert 0 <= begin <= stop <= len(ids) - 1
    since = max((i + 1 for i in range(len(ids) - 1) if ids[i] == SEG), default=0)
    if begin < stop or ids[stop] == END:
        assert (ids[begin - 1], ids[stop]) == (START, END)
        assert begin - 1 >= since
        assert START not in ids[begin:stop]
    else:
        closes = [i for i in range(since, len(ids)) if ids[i] == END]
        assert not closes or START not in ids[since : closes[-1]]


@pytest.mark.parametrize(
    ("ids", "phrase"),
    [
        ([2, 5, 6, 3, 1], [5, 6]),
        ([2, 4, 3, 2, 5, 3, 9, 1], [5]),
        ([2, 5, 3, 1, 1], []),
        ([5, 6, 1], []),
        ([2, 5, 1], []),
        ([5, 3, 1], []),
        ([2, 4, 2, 5, 3, 1], [5]),
    ],
)
def test_which_phrase_belongs_to_the_last_seg(ids: list[int], phrase: list[int]) -> None:
    begin, stop = phrase_span(ids, len(ids) - 1, SEG, START, END)
    assert ids[begin:stop] == phrase


# pruning -------------------------------------------------------------------------------------------------------------


def attention_by_hand(model: GlammModel, image: np.ndarray[Any, Any], layer: int) -> torch.Tensor:
    """float32 [3, N]: what the three mask queries of a conversation pay to the image tokens, mean over heads."""
    with torch.inference_mode():
        inputs = model.build_inputs(image, QUERIES)
        sequence = inputs.sequence
        model.decoder.set_attn_implementation("eager")
        try:
            weights = model.decoder.model(inputs_embeds=sequence.inputs_embeds, output_attentions=True).attentions
        finally:
            model.decoder.set_attn_implementation("sdpa")
    rows = sequence.mask_query[0].nonzero().flatten()
    assert len(rows) == len(QUERIES)
    return weights[layer][0].mean(0)[rows][:, sequence.image_tokens[0]]


@pytest.mark.parametrize("how", ["mean", "max"])
@pytest.mark.parametrize("name", ["fastv", "csp"])
def test_every_mask_query_counts(model: GlammModel, image: np.ndarray[Any, Any], name: str, how: str) -> None:
    options: dict[str, Any] = {"layer": 2} if name == "fastv" else {"representatives": 1.0, "prune_at": 2}
    strategy = tp.strategy(name, keep=5, query_reduce=how, **options)
    trace = model.segment(image, QUERIES, strategy).trace
    assert trace is not None
    seen = attention_by_hand(model, image, layer=1)
    wanted = seen.mean(0) if how == "mean" else seen.amax(0)
    scores = trace.stages[-1].scores
    assert scores is not None
    assert torch.allclose(scores[0], wanted, atol=1e-6)
    kept = trace.stages[-1].active[0].nonzero().flatten().tolist()
    assert kept == sorted(wanted.topk(5).indices.tolist())
    assert not torch.allclose(wanted, seen[-1], atol=1e-4)


@pytest.mark.parametrize("name", sorted(tp.strategies()))
def test_every_strategy_runs(model: GlammModel, image: np.ndarray[Any, Any], name: str) -> None:
    strategy = tp.strategy(name, **({"keep": 0.6} if name == "dart" else {}))  # dart's pivots alone are 4 tokens
    plain = model.segment(image, QUERIES)
    result = model.segment(image, QUERIES, strategy)
    assert result.trace is not None
    assert result.trace.ledger.image_tokens == (IMAGE_TOKENS,)
    assert result.masks.shape == (3, HEIGHT, WIDTH)
    assert torch.equal(plain.mask_logits, result.mask_logits) == (not result.trace.stages)
    assert torch.equal(plain.mask_logits, model.segment(image, QUERIES).mask_logits)


def test_compare_follows_the_conversation_protocol(model: GlammModel) -> None:
    names = ["none", "csp", "fastv:query_reduce=max", "prumerge+", "random"]
    comparison = tp.compare(model, "shapes", names, budget=0.6, limit=7, timing_samples=1, timing_rounds=1)
    assert comparison.samples == 7
    assert comparison.rows[0].agreement == pytest.approx(1.0)
    for row in comparison.rows[1:]:
        assert row.equivalent_tokens <= 0.6 * IMAGE_TOKENS
    scene = next(iter(tp.datasets()["shapes"].load()().scenes("val", 7, 0)))
    queries, flags = [query.text for query in scene.queries], [query.is_sentence for query in scene.queries]
    trace = model.segment(scene.image, queries, tp.strategy("none"), is_sentence=flags).trace
    assert trace is not None
    assert len(trace.ledger.image_tokens) == 1


def test_queries_of_a_conversation_share_its_cost(model: GlammModel) -> None:
    scene = next(iter(tp.datasets()["shapes"].load()().scenes("val", 3, 0)))
    queries, flags = [query.text for query in scene.queries], [query.is_sentence for query in scene.queries]
    trace = model.segment(scene.image, queries, tp.strategy("none"), is_sentence=flags).trace
    assert trace is not None
    wanted = count_flops(trace.ledger, DecoderSpec.from_config(model.decoder.config), "exact").parts["decoder"]
    comparison = tp.compare(model, "shapes", ["none"], limit=len(queries), timing_samples=0, records=0)
    assert len(queries) > 1
    assert comparison.rows[0].flops_by_part["decoder"] * len(queries) == pytest.approx(wanted)
