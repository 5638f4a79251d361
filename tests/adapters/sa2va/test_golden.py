"""Sa2VA against its authors' own code, which was run once on the tiny checkpoint that these tests write.

`tests/data/sa2va` has what it gave, float32 on a CPU. `predict_forward` ran the released classes in the sizes of the
checkpoint: the chat model, InternVL's tower, SAM 2 with its prompt encoder, mask decoder and video predictor, and
transformers' Qwen2. Replaced were SAM 2's memory encoder, which a single picture does not need, and torchvision's
transforms, by PIL and torch.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from sa2va_checkpoints import write_sa2va
from safetensors.torch import load_file
from segmentation_golden import HALF, LIMIT, difference
from torch import Tensor

import tokenprune as tp
from tokenprune_adapters.llava.prompt import IMAGE_ID
from tokenprune_adapters.sa2va import Sa2vaModel

DATA = Path(__file__).parents[2] / "data" / "sa2va"
CASES: dict[str, dict[str, Any]] = json.loads((DATA / "case.json").read_text(encoding="utf-8"))
QUERIES = {
    "phrase": "the red car",
    "cut": "a man in red",
    "several": "What is it?",
    "one_tile": "the red car",
    "phi3": "the red car",
}
NEW_TOKENS = 24


@pytest.fixture(scope="module")
def reference() -> dict[str, Tensor]:
    return load_file(DATA / "case.safetensors")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Sa2vaModel]:
    """One for each chat format."""
    folder = tmp_path_factory.mktemp("sa2va")
    return {
        template: tp.load(write_sa2va(folder / template, config={"template": template}))
        for template in ("qwen_chat", "phi3_chat")
    }


@pytest.mark.parametrize("name", ["wide", "small"])
def test_what_the_towers_get_and_give(reference: dict[str, Tensor], models: dict[str, Sa2vaModel], name: str) -> None:
    with torch.inference_mode():
        encoded = models["qwen_chat"].encode_image(reference[f"image.{name}"].numpy())
    assert difference(encoded.prepared.tiles, reference[f"tiles.{name}"]) < 1e-6
    assert difference(encoded.image_embeddings, reference[f"embeds.{name}"].flatten(0, 1)[None]) < 1e-5
    if name == "wide":
        assert difference(encoded.prepared.sam_pixels, reference["sam_pixels.wide"]) < HALF
        features = encoded.sam_features
        assert difference(features.coarse, reference["coarse.wide"]) < LIMIT
        assert difference(features.middle, reference["middle.wide"]) < LIMIT
        assert difference(features.fine, reference["fine.wide"]) < LIMIT


@pytest.mark.parametrize("case", CASES)
def test_prompts_and_their_ids(reference: dict[str, Tensor], models: dict[str, Sa2vaModel], case: str) -> None:
    about = CASES[case]
    model = models[about["template"]]
    (prompt,) = model.prompts(QUERIES[case], answer="generate")
    with torch.inference_mode():
        inputs = model.inputs_of(
            [prompt], model.encode_image(reference[f"image.{about['image']}"].numpy()), continues=True
        )
    context = model.tokenizer.token_id("<IMG_CONTEXT>")
    ids = inputs.sequence.token_ids[0]
    assert torch.where(ids == IMAGE_ID, context, ids).tolist() == reference[f"{case}.input_ids"].tolist()


@pytest.mark.parametrize("draft", [True, False], ids=["drafted", "token by token"])
@pytest.mark.parametrize("case", CASES)
def test_answers_and_masks(reference: dict[str, Tensor], models: dict[str, Sa2vaModel], case: str, draft: bool) -> None:
    about = CASES[case]
    model, image = models[about["template"]], reference[f"image.{about['image']}"].numpy()
    with torch.inference_mode():
        encoded = model.encode_image(image)
        inputs = model.inputs_of(model.prompts(QUERIES[case], answer="generate"), encoded, continues=True)
        answered = model.answer(inputs, max_new_tokens=NEW_TOKENS, draft=draft)
    assert answered.said == [reference[f"{case}.new_ids"].tolist()]
    assert difference(answered.states, reference[f"{case}.seg_states"]) < LIMIT if about["masks"] else True
    result = model.segment(image, QUERIES[case], answer="generate", max_new_tokens=NEW_TOKENS, draft=draft)
    assert result.text == about["text"].removesuffix("<|endoftext|>")
    assert len(result.masks) == about["masks"]
    if about["masks"]:
        with torch.inference_mode():
            assert difference(model.mask_projection(answered.states), reference[f"{case}.mask_prompts"]) < LIMIT
        assert difference(result.low_res_logits, reference[f"{case}.low_res"]) < LIMIT
        assert difference(result.iou_predictions, reference[f"{case}.ious"].amax(1)) < LIMIT
        assert torch.equal(result.masks, reference[f"{case}.masks"])


def test_the_best_of_three_candidates(reference: dict[str, Tensor], models: dict[str, Sa2vaModel]) -> None:
    best = reference["several.ious"].argmax(1)
    assert torch.equal(reference["several.candidates"][torch.arange(5), best], reference["several.low_res"])
    result = models["qwen_chat"].segment(
        reference["image.wide"].numpy(), "What is it?", answer="generate", max_new_tokens=24
    )
    others = reference["several.candidates"][torch.arange(5), (best + 1) % 3]
    assert difference(result.low_res_logits, others) > 0.1


def test_a_state_beside_makes_another_mask(reference: dict[str, Tensor], models: dict[str, Sa2vaModel]) -> None:
    """The state of [SEG] and the one before it differ enough for the tests above to tell."""
    model = models["qwen_chat"]
    with torch.inference_mode():
        encoded = model.encode_image(reference["image.wide"].numpy())
        inputs = model.inputs_of(model.prompts("the red car", answer="generate"), encoded, continues=True)
        generated, _ = model.run_generation(inputs, max_new_tokens=NEW_TOKENS)
        _, (step,) = generated.where(model.seg_ids[0])
        masks, _ = model.low_res_logits(generated.states[0, [step, step + 1]], encoded)
    assert difference(masks[1:], reference["phrase.low_res"]) < LIMIT
    assert difference(masks[:1], reference["phrase.low_res"]) > 100 * LIMIT


def test_masks_of_the_whole_square(reference: dict[str, Tensor], models: dict[str, Sa2vaModel]) -> None:
    result = models["qwen_chat"].segment(
        reference["image.wide"].numpy(), "the red car", answer="generate", max_new_tokens=24, mask_size=(64, 64)
    )
    assert difference(result.mask_logits, reference["phrase.square"]) < 4 * HALF
