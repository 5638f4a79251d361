"""Answers by beam search, pruned or not, are those of transformers' own beam search."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from vlm_checkpoints import LOADED, write_vlm
from vlm_families import CURRENT

import tokenprune as tp
from tokenprune.errors import OptionError, UnsupportedError
from tokenprune_adapters.hf.model import Answer, VisionLanguageModel

pytestmark = pytest.mark.skipif(not CURRENT, reason="the tiny processors are those of transformers 5.20 and later")
Models = Callable[[str], VisionLanguageModel]
BY_DEFAULT = ("llava", "qwen2_5_vl", "gemma3")
QUESTIONS = ["What is it?", "Is there anything to the left of the smaller one?"]
BEAMS, STEPS = 3, 6


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    """The loaded model of a family."""
    root = tmp_path_factory.mktemp("vlm")
    return functools.cache(lambda name: tp.load(write_vlm(root / name, name)))


def picture(height: int, width: int, seed: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


PICTURES = [picture(48, 64, 0), picture(64, 40, 1)]


def fastv() -> Any:
    return tp.strategy("fastv", layer=1, keep=0.5)


def searched(model: VisionLanguageModel, inputs: Any) -> str:
    """What transformers' beam search finds."""
    options = {"num_beams": BEAMS, "max_new_tokens": STEPS, "do_sample": False}
    with torch.inference_mode():
        ids = model.model.generate(**inputs, **options)[0, inputs["input_ids"].shape[1] :].tolist()
    return str(model.processor.decode(ids, skip_special_tokens=True))


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(*one.values, marks=[*one.marks, *([] if one.values[0] in BY_DEFAULT else [pytest.mark.slow])])
        for one in LOADED
    ],
)
def test_answers_are_those_of_beam_search(name: str, models: Models) -> None:
    model = models(name)
    inputs = model.inputs(PICTURES[0], QUESTIONS[0])
    found = model.answer(PICTURES[0], QUESTIONS[0], max_new_tokens=STEPS, num_beams=BEAMS)
    assert found == Answer(searched(model, inputs))
    with tp.prune(model, fastv()) as run:
        expected = searched(model, inputs)
    pruned = model.answer(PICTURES[0], QUESTIONS[0], fastv(), max_new_tokens=STEPS, num_beams=BEAMS)
    assert pruned.text == expected
    assert pruned.trace is not None
    assert pruned.trace.summary(pruned.row) == run.trace.summary(0)


@pytest.mark.parametrize("name", [pytest.param("llava"), pytest.param("qwen2_5_vl")])
@pytest.mark.parametrize("strategy", [lambda: None, fastv], ids=["untouched", "pruned"])
def test_a_batch_answers_as_its_rows_alone(name: str, strategy: Callable[[], Any], models: Models) -> None:
    model = models(name)
    options = {"max_new_tokens": STEPS, "num_beams": BEAMS}
    together = model.answer(PICTURES, QUESTIONS, strategy(), **options)
    alone = [
        model.answer(image, question, strategy(), **options)
        for image, question in zip(PICTURES, QUESTIONS, strict=True)
    ]
    assert [one.text for one in together] == [one.text for one in alone]
    for one, other in zip(together, alone, strict=True):
        if other.trace is None:
            assert one.trace is None
            continue
        assert one.trace is not None
        assert one.trace.summary(one.row) == other.trace.summary(other.row)
        kept = [[stage.kept[answer.row] for stage in answer.trace.stages] for answer in (one, other) if answer.trace]
        assert kept[0] == kept[1]


def test_more_beams_find_likelier_answers(models: Models) -> None:
    """For one that is not what greedy decoding finds."""
    model = models("llava")

    def likelihood(text: str) -> float:
        ids = model.processor.tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
        inputs = dict(model.inputs(PICTURES[0], question))
        start = inputs["input_ids"].shape[1]
        inputs["input_ids"] = torch.cat((inputs["input_ids"], ids), 1)
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        with torch.inference_mode():
            scores = model.model(**inputs).logits[0, start - 1 : -1].clone()
            scores[:, model.model.generation_config.suppress_tokens] = -torch.inf
        return float(scores.log_softmax(-1).gather(1, ids[0, :, None]).sum())

    better = []
    for question in (*QUESTIONS, "Why?", "Where?"):
        greedy, beams = (model.answer(PICTURES[0], question, max_new_tokens=3, num_beams=n).text for n in (1, 8))
        if greedy != beams:
            better.append(likelihood(beams) > likelihood(greedy))
    assert any(better)


@pytest.mark.parametrize("beams", [0, -1, 2.5, "3", True, None])
def test_beams_that_are_no_whole_numbers(beams: Any, models: Models) -> None:
    with pytest.raises(OptionError, match=r"num_beams: .* found, expected a whole number of at least 1"):
        models("llava").answer(PICTURES[0], QUESTIONS[0], num_beams=beams)


def test_a_model_without_beam_search(models: Models, monkeypatch: pytest.MonkeyPatch) -> None:
    """Llama 4 in transformers does not repeat the pictures for the beams, and says so with a ValueError."""
    model = models("llava")

    def fails(**options: Any) -> None:
        raise ValueError("image features and\nimage tokens do not match")

    monkeypatch.setattr(model.model, "generate", fails)
    with pytest.raises(UnsupportedError, match=r"llava: .* \(image features and image tokens .*\); use num_beams=1"):
        model.answer(PICTURES[0], QUESTIONS[0], num_beams=2)
    with pytest.raises(ValueError, match="do not match"):
        model.answer(PICTURES[0], QUESTIONS[0])
