"""Answers of a batch equal those that are asked one by one, for every family; what cannot be is refused by name."""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from vlm_checkpoints import LOADED, write_vlm
from vlm_families import CURRENT
from vlm_processors import PROCESSORS

import tokenprune as tp
from tokenprune.errors import InputError, OptionError, UnsupportedError
from tokenprune_adapters.hf import FAMILIES
from tokenprune_adapters.hf.families import ROWS_DIFFER
from tokenprune_adapters.hf.model import Answer, VisionLanguageModel

pytestmark = pytest.mark.skipif(not CURRENT, reason="the tiny processors are those of transformers 5.20 and later")
Models = Callable[[str], VisionLanguageModel]
QUESTIONS = ["What is it?", "Is there anything to the left of the smaller one, and which colour has it?", "Why?"]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    """The loaded model of a family."""
    root = tmp_path_factory.mktemp("vlm")
    return functools.cache(lambda name: tp.load(write_vlm(root / name, name)))


def picture(height: int, width: int, seed: int) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


PICTURES = [picture(48, 64, 0), picture(64, 40, 1), picture(32, 32, 2)]
ALIKE = [one for one in LOADED if ROWS_DIFFER not in FAMILIES[one.values[0]].limits]
"""Parameters: families whose rows are answered as alone."""


def taken(model: VisionLanguageModel) -> list[Image.Image]:
    """Pictures for a batch: of three sizes, unless they are refused by name."""
    if model.name != "emu3":
        return PICTURES
    with pytest.raises(InputError, match=r"64×48, 40×64, 32×32 pixels in one batch .*pass one prompt at a time"):
        model.inputs(PICTURES, QUESTIONS)
    return [one.resize((64, 48)) for one in PICTURES]


STRATEGIES: dict[str, Any] = {
    "untouched": lambda: None,
    "fastv": lambda: tp.strategy("fastv", layer=1, keep=0.5),
    "random": lambda: tp.strategy("random", budget=0.5),
}


def assert_alike(together: list[Answer], alone: list[Answer]) -> None:
    """The same texts, and of each row the same tokens at every stage."""
    assert [answer.text for answer in together] == [answer.text for answer in alone]
    for row, (one, other) in enumerate(zip(together, alone, strict=True)):
        assert one.row == row
        if other.trace is None:
            assert one.trace is None
            continue
        assert one.trace is not None
        kept = [[stage.kept[row] for stage in one.trace.stages], [stage.kept[0] for stage in other.trace.stages]]
        assert kept[0] == kept[1]
        assert one.trace.summary(row) == other.trace.summary(0)


@pytest.mark.parametrize(
    ("name", "kind"),  # one strategy alone for families that are made of the parts of others; else another one in turn
    [
        pytest.param(*name.values, kind, marks=name.marks)
        for number, name in enumerate(ALIKE)
        for kind in ("fastv", ("untouched", "random")[number % 2])
        if kind == "fastv" or name.values[0] not in PROCESSORS
    ],
)
def test_a_batch_answers_as_its_rows_alone(name: str, kind: str, models: Models) -> None:
    model = models(name)
    pictures = taken(model)
    together = model.answer(pictures, QUESTIONS, strategy=STRATEGIES[kind](), max_new_tokens=4)
    alone = [
        model.answer(image, question, strategy=STRATEGIES[kind](), max_new_tokens=4)
        for image, question in zip(pictures, QUESTIONS, strict=True)
    ]
    assert_alike(together, alone)
    assert any(answer.text for answer in alone)


@pytest.mark.parametrize("name", ALIKE)
def test_rows_of_one_image_and_of_several(name: str, models: Models) -> None:
    model = models(name)
    pictures = taken(model)
    images = [pictures[0], [pictures[1], pictures[2]], pictures[2]]
    together = model.answer(images, QUESTIONS, strategy=STRATEGIES["fastv"](), max_new_tokens=4)
    alone = [
        model.answer(image, question, strategy=STRATEGIES["fastv"](), max_new_tokens=4)
        for image, question in zip(images, QUESTIONS, strict=True)
    ]
    assert_alike(together, alone)
    with torch.inference_mode():
        scores = model.model(**model.inputs(images, QUESTIONS)).logits[:, -1]
        for row, (image, question) in enumerate(zip(images, QUESTIONS, strict=True)):
            own = model.model(**model.inputs(image, question)).logits[0, -1]
            assert torch.allclose(scores[row], own, rtol=0, atol=5e-5)


def test_batches_are_refused_where_rows_depend_on_one_another(models: Models) -> None:
    model = models("hunyuan_vl")
    with pytest.raises(InputError, match=r"^3 prompts in one batch found: .*pass one prompt at a time"):
        model.answer(PICTURES, QUESTIONS)
    assert model.answer(PICTURES[:1], QUESTIONS[:1], max_new_tokens=1)[0].text


def test_what_stands_for_all(models: Models) -> None:
    model = models("llava")
    one_question = model.answer(PICTURES, QUESTIONS[:1], max_new_tokens=8)
    assert_alike(one_question, [model.answer(image, QUESTIONS[0], max_new_tokens=8) for image in PICTURES])
    one_image = model.answer(PICTURES[0], QUESTIONS, max_new_tokens=8)
    assert_alike(one_image, [model.answer(PICTURES[0], question, max_new_tokens=8) for question in QUESTIONS])
    assert len({answer.text for answer in one_image}) == 3
    single = model.answer([PICTURES[0]], QUESTIONS[:1], max_new_tokens=8)
    assert_alike(single, [model.answer(PICTURES[0], QUESTIONS[0], max_new_tokens=8)])
    assert isinstance(model.answer(PICTURES[:2], QUESTIONS[0], max_new_tokens=1), Answer)  # one prompt about two images


def test_rows_that_end_early(models: Models, monkeypatch: pytest.MonkeyPatch) -> None:
    """What fills up a finished row is not part of its answer, whatever token it is."""
    model = models("llava")
    pairs = list(zip(PICTURES, QUESTIONS, strict=True))
    alone = [model.answer(image, question, max_new_tokens=12).text for image, question in pairs]
    ends = {character: [text.find(character) + 1 or len(text) for text in alone] for character in "".join(alone)}
    character = max(ends, key=lambda one: len({*ends[one]}))  # rows end at different times
    assert min(ends[character]) < max(ends[character])
    token = model.processor.tokenizer.convert_tokens_to_ids(character)
    monkeypatch.setattr(model.model.generation_config, "eos_token_id", [token])
    monkeypatch.setattr(model.model.generation_config, "pad_token_id", token + 1)  # an ordinary character
    found = [answer.text for answer in model.answer(PICTURES, QUESTIONS, max_new_tokens=12)]
    assert found == [text[:end] for text, end in zip(alone, ends[character], strict=True)]


@pytest.mark.parametrize(
    ("images", "prompts", "message"),
    [
        (PICTURES, QUESTIONS[:2], "3 images and 2 prompts found"),
        (PICTURES[:2], QUESTIONS, "2 images and 3 prompts found"),
        ([], QUESTIONS, "0 images and 3 prompts found"),
        ([], QUESTIONS[:1], "0 images and 1 prompts found"),
        (PICTURES, [], "3 images and 0 prompts found"),
        (PICTURES, ["What?", "  ", "Why?"], "expected a text about the image"),
        (PICTURES, ["What?", None, "Why?"], "prompt None found"),
        (PICTURES, ["What?", b"x", "Why?"], "prompt b'x' found"),
        (PICTURES, ["What?", "Why \ud800?", "Why?"], r"prompt 'Why .ud800.' holds .ud800 at character 4"),
        ([PICTURES[0], [], PICTURES[1]], QUESTIONS, "an empty list of images"),
        ([PICTURES[0], 7, PICTURES[1]], QUESTIONS, "image is a int"),
        (PICTURES[:2], ["<s><image>What?", "<image>What?"], "prompt 0 begins with <s>, others do not"),
    ],
)
def test_bad_batches(images: Any, prompts: Any, message: str, models: Models) -> None:
    with pytest.raises(InputError, match=message):
        models("llava").answer(images, prompts)


def test_no_new_tokens(models: Models) -> None:
    with pytest.raises(OptionError, match="max_new_tokens: 0 found"):
        models("llava").answer(PICTURES, QUESTIONS, max_new_tokens=0)


@pytest.mark.parametrize("limit", ["3", 2.5, True, None, float("nan")])
def test_limits_that_are_no_whole_numbers(limit: Any, models: Models) -> None:
    with pytest.raises(OptionError, match=r"max_new_tokens: .* found, expected a whole number of at least 1"):
        models("llava").answer(PICTURES, QUESTIONS, max_new_tokens=limit)


def likeliest(model: VisionLanguageModel, image: Any, question: str, steps: int) -> str:
    """The answer by its definition: the whole sequence anew for each token, the best of the allowed ones."""
    inputs = dict(model.inputs(image, question))
    start = inputs["input_ids"].shape[1]
    never = model.model.generation_config.suppress_tokens
    for _ in range(steps):
        with torch.no_grad():
            scores = model.model(**inputs).logits[:, -1]
        scores[:, never] = -torch.inf
        inputs["input_ids"] = torch.cat((inputs["input_ids"], scores.argmax(-1, keepdim=True)), 1)
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    return str(model.processor.decode(inputs["input_ids"][0, start:], skip_special_tokens=True))


CHECKPOINTS: dict[str, dict[str, Any]] = {
    "beams": {"num_beams": 3},
    "several": {"num_beams": 2, "num_return_sequences": 2},
    "sampled": {"do_sample": True, "num_return_sequences": 2},
    "dictionary": {"return_dict_in_generate": True, "output_scores": True, "output_attentions": True},
    "contrastive": {"penalty_alpha": 0.6, "top_k": 4},
    "guessed": {"prompt_lookup_num_tokens": 3},
    "stopped": {"stop_strings": ["a"], "max_time": 1e-9},
    "in parts": {"prefill_chunk_size": 4},
}


@pytest.mark.parametrize("kind", ["untouched", "all kept"])
@pytest.mark.parametrize("asked", CHECKPOINTS)
def test_greedy_and_one_answer_whatever_the_checkpoint_says(
    asked: str, kind: str, models: Models, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, config = models("llava"), models("llava").model.generation_config
    wanted = [likeliest(model, image, question, 6) for image, question in zip(PICTURES, QUESTIONS, strict=True)]
    for name, value in CHECKPOINTS[asked].items():
        monkeypatch.setattr(config, name, value, raising=False)
    before = config.to_dict()
    strategy = None if kind == "untouched" else tp.strategy("fastv", layer=1, keep=1.0)
    found = model.answer(PICTURES, QUESTIONS, strategy, max_new_tokens=6)
    assert [answer.text for answer in found] == wanted
    assert config.to_dict() == before


def test_a_tokenizer_that_cannot_pad(models: Models, monkeypatch: pytest.MonkeyPatch) -> None:
    model = models("llava")
    own = model.processor.tokenizer
    tokenizer = SimpleNamespace(
        pad_token=None, bos_token=own.bos_token, convert_ids_to_tokens=own.convert_ids_to_tokens
    )
    padless = SimpleNamespace(tokenizer=tokenizer, image_token="<image>")
    monkeypatch.setitem(vars(model), "processor", padless)
    with pytest.raises(UnsupportedError, match=r"no padding token, .* or set model\.processor"):
        model.answer(PICTURES, QUESTIONS)


def test_printed_answers(models: Models) -> None:
    found = models("llava").answer(PICTURES[:2], QUESTIONS[:2], strategy=STRATEGIES["fastv"](), max_new_tokens=2)
    lines = str(found[1]).splitlines()
    assert lines[:2] == ["Answer:", f"  .text: {found[1].text!r}"]
    assert lines[2] == "  .trace: row 1: 16 image tokens, 8 from layer 1; 10.0 equivalent tokens (62.5%)"
    assert len(lines) == 3
