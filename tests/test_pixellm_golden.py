"""PixelLM against the numbers of its authors' implementation."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

import tokenprune as tp
from tokenprune_adapters.llava_prompt import prompt_ids
from tokenprune_adapters.pixellm import PixelLMModel, mask_scores

LIMIT = 1e-4
HALF = 2e-3  # tensors that are stored as float16


class Golden(NamedTuple):
    model: PixelLMModel
    case: dict[str, Any]
    tensors: dict[str, Tensor]

    @property
    def image(self) -> np.ndarray[Any, Any]:
        return self.tensors["image"].numpy()


@pytest.fixture(scope="module")
def pixellm(golden: Callable[[str], Path]) -> Golden:
    folder = golden("pixellm")
    model = tp.load(folder / "checkpoint", vision_tower=folder / "vision_tower")
    case = json.loads((folder / "case.json").read_text(encoding="utf-8"))
    return Golden(model, case, load_file(folder / "case.safetensors"))


def difference(found: Tensor, expected: Tensor) -> float:
    assert found.shape == expected.shape
    return float((found.float() - expected.float()).abs().max())


def test_prompts_and_ids(pixellm: Golden) -> None:
    model, case = pixellm.model, pixellm.case
    assert list(model.seg_tokens) == case["seg_tokens"]
    assert model.seg_ids == case["seg_token_ids"]
    prompts = model.prompts([query for (query,) in case["queries"]], is_sentence=case["query_is_sentence"])
    assert prompts == case["prompts"]
    wanted, mask = pixellm.tensors["input_ids"], pixellm.tensors["attention_mask"].bool()
    for row, prompt in enumerate(prompts):
        assert prompt_ids(model.tokenizer, prompt) == wanted[row][mask[row]].tolist()
    (prompt,) = model.prompts(case["gen_query"], answer="generate")
    assert prompt == case["gen_prompt"]
    assert prompt_ids(model.tokenizer, prompt) == pixellm.tensors["gen_input_ids"][0].tolist()


def test_tower_input_is_exact(pixellm: Golden) -> None:
    prepared = pixellm.model.prepare_image(pixellm.image)
    assert torch.equal(prepared.pixels, pixellm.tensors["clip_pixel_values"])
    height, width = prepared.sizes.resized
    assert [height, width] == pixellm.case["clip_resized_size_hw"]
    resized = np.array(Image.fromarray(pixellm.image).resize((width, height), Image.Resampling.BILINEAR))
    assert hashlib.sha256(resized.tobytes()).hexdigest() == pixellm.case["clip_input"]["resized_uint8_sha256"]


def test_tower(pixellm: Golden) -> None:
    wanted = pixellm.tensors
    table = pixellm.model.tower.get_parameter(
        next(name for name, _ in pixellm.model.tower.named_parameters() if name.endswith("position_embedding.weight"))
    )
    assert torch.equal(table, wanted["clip_position_table"])
    with torch.inference_mode():
        encoded = pixellm.model.encode_image(pixellm.image)
    features, early = encoded.tower.patches.features, encoded.tower.early_features
    assert difference(features, wanted["vision_features"]) < LIMIT
    assert difference(early, wanted["vision_features_early"]) < HALF
    assert difference(encoded.image_embeddings, wanted["image_tokens"]) < LIMIT
    shown = encoded.mask_features[..., ::4, ::4]
    assert difference(shown, wanted["mask_features"]) < LIMIT


def test_forced_answers(pixellm: Golden) -> None:
    model, wanted = pixellm.model, pixellm.tensors
    queries = [query for (query,) in pixellm.case["queries"]]
    with torch.inference_mode():
        inputs = model.build_inputs(pixellm.image, queries)
        states, trace = model.run_decoder(inputs)
        answered = model.answer(inputs)
    assert trace is None
    sequence = inputs.sequence
    assert torch.equal(sequence.attention_mask, wanted["expanded_attention_mask"].long())
    assert torch.equal(sequence.mask_query.nonzero(), wanted["mask_positions"])
    assert torch.equal(sequence.seg.nonzero() - torch.tensor([0, 1]), wanted["mask_positions"])
    assert sequence.image_tokens.sum(1).tolist() == [12 * 16] * 2
    shown = states * sequence.attention_mask[..., None]
    assert difference(shown, wanted["hidden_states"]) < LIMIT
    assert torch.equal(answered.states, states[sequence.mask_query])
    assert answered.rows == [0, 1]
    with torch.inference_mode():
        single = model.mask_projection(answered.states)
        fused = model.mask_embeddings(answered.states)
        coarse, fine = model.pixel_decoder.levels(inputs.encoded.mask_features, fused)
        low_res, _ = model.low_res_logits(answered.states, inputs.encoded)
    assert difference(single, wanted["seg_token_embeddings"]) < LIMIT
    assert difference(fused, wanted["seg_embeddings"]) < LIMIT
    assert difference(coarse, wanted["level_mask_logits_0"][:, 0]) < LIMIT
    assert difference(fine, wanted["level_mask_logits_1"][:, 0]) < HALF
    assert difference(low_res, wanted["low_res_logits"][:, 0]) < LIMIT


@pytest.mark.parametrize("whole", [False, True], ids=["queries", "prompts"])
def test_segment_forced(pixellm: Golden, whole: bool) -> None:
    case, wanted = pixellm.case, pixellm.tensors
    given: dict[str, Any] = {"prompt": case["prompts"]} if whole else {"query": [q for (q,) in case["queries"]]}
    result = pixellm.model.segment(pixellm.image, **given)
    assert difference(result.low_res_logits, wanted["low_res_logits"][:, 0]) < LIMIT
    assert difference(result.mask_logits, wanted["mask_logits"]) < LIMIT
    assert difference(mask_scores(result.mask_logits), wanted["mask_scores"]) < LIMIT
    assert torch.equal(result.masks, result.mask_logits > 0)
    answer = "[SEG0] [SEG1] [SEG2] [SEG3] [SEG4] [SEG5]."
    assert (result.query_index, result.text, result.trace) == ([0, 1], [answer, answer], None)


def test_the_neighbouring_position_gives_another_mask(pixellm: Golden) -> None:
    model = pixellm.model
    with torch.inference_mode():
        inputs = model.build_inputs(pixellm.image, [query for (query,) in pixellm.case["queries"]])
        states, _ = model.run_decoder(inputs)
        low_res, _ = model.low_res_logits(states[inputs.sequence.seg], inputs.encoded)
    assert float((low_res - pixellm.tensors["low_res_logits"][:, 0]).abs().max()) > 0.1


def test_segment_generated(pixellm: Golden) -> None:
    model, case, wanted = pixellm.model, pixellm.case, pixellm.tensors
    encoded = model.encode_image(pixellm.image)
    with torch.inference_mode():
        inputs = model.inputs_of([case["gen_prompt"]], encoded, continues=True)
        generated, _ = model.run_generation(inputs, max_new_tokens=case["gen_max_new_tokens"])
        logits = model.decoder.lm_head(generated.states[0])
        answered = model.answer(inputs, max_new_tokens=case["gen_max_new_tokens"])
        fused = model.mask_embeddings(answered.states)
    assert generated.ids == wanted["gen_new_ids"].tolist()
    assert model.tokenizer.pieces(generated.ids[0]) == case["gen_new_text_pieces"]
    assert difference(logits, wanted["gen_step_logits"]) < LIMIT
    length = inputs.sequence.token_ids.shape[1]
    (place,) = answered.places
    assert [length + place + step - 1 for step in range(6)] == wanted["gen_mask_positions"].tolist()
    assert difference(fused, wanted["gen_seg_embeddings"]) < LIMIT
    result = model.segment(encoded, case["gen_query"], answer="generate", max_new_tokens=16)
    assert result.text == "It is [SEG0] [SEG1] [SEG2] [SEG3] [SEG4] [SEG5] ."
    assert result.query_index == [0]
    assert difference(result.low_res_logits, wanted["gen_low_res_logits"][:, 0]) < LIMIT
    assert difference(result.mask_logits, wanted["gen_mask_logits"]) < LIMIT


def test_a_strategy_that_keeps_all_changes_nothing(pixellm: Golden) -> None:
    queries = [query for (query,) in pixellm.case["queries"]]
    plain = pixellm.model.segment(pixellm.image, queries)
    kept = pixellm.model.segment(pixellm.image, queries, strategy=tp.strategy("none"))
    assert torch.equal(plain.mask_logits, kept.mask_logits)
    assert kept.trace is not None
    assert kept.trace.ledger.equivalent_tokens == 12 * 16
