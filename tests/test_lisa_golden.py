"""LISA against the numbers of its authors' implementation."""

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
from tokenprune_adapters.lisa import LisaModel
from tokenprune_adapters.llava_prompt import prompt_ids


class Golden(NamedTuple):
    model: LisaModel
    case: dict[str, Any]
    tensors: dict[str, Tensor]

    @property
    def image(self) -> np.ndarray[Any, Any]:
        return self.tensors["image"].numpy()


@pytest.fixture(scope="module")
def lisa(golden: Callable[[str], Path]) -> Golden:
    folder = golden("lisa")
    model = tp.load(folder / "checkpoint", vision_tower=folder / "vision_tower")
    case = json.loads((folder / "case.json").read_text(encoding="utf-8"))
    return Golden(model, case, load_file(folder / "case.safetensors"))


def difference(found: Tensor, expected: Tensor) -> float:
    assert found.shape == expected.shape
    return float((found.float() - expected.float()).abs().max())


def test_prompts_and_ids(lisa: Golden) -> None:
    prompts = lisa.model.prompts(lisa.case["queries"])
    assert prompts == lisa.case["prompts"]
    wanted, mask = lisa.tensors["input_ids"], lisa.tensors["attention_mask"].bool()
    for row, prompt in enumerate(prompts):
        assert prompt_ids(lisa.model.tokenizer, prompt) == wanted[row][mask[row]].tolist()
    (prompt,) = lisa.model.prompts(lisa.case["gen_query"], answer="generate")
    assert prompt == lisa.case["gen_prompt"]
    assert prompt_ids(lisa.model.tokenizer, prompt) == lisa.tensors["gen_input_ids"][0].tolist()


def test_tower_inputs_are_exact(lisa: Golden) -> None:
    prepared = lisa.model.prepare_image(lisa.image)
    assert torch.equal(prepared.clip_pixels, lisa.tensors["clip_pixel_values"])
    assert torch.equal(prepared.sam_pixels[0, :, :16, :16], lisa.tensors["sam_input_corner"])
    recipe = lisa.case["sam_input"]
    assert list(prepared.sam_pixels.shape) == recipe["padded_float32_shape"]
    assert float(prepared.sam_pixels.double().abs().sum()) == pytest.approx(recipe["padded_float32_abs_sum"], rel=1e-9)
    height, width = prepared.sizes.resized
    assert [height, width] == recipe["resized_uint8_hw"]
    resized = np.array(Image.fromarray(lisa.image).resize((width, height), Image.Resampling.BILINEAR))
    assert hashlib.sha256(resized.tobytes()).hexdigest() == recipe["resized_uint8_sha256"]


def test_towers(lisa: Golden) -> None:
    with torch.inference_mode():
        encoded = lisa.model.encode_image(lisa.image)
    assert difference(encoded.tower.features, lisa.tensors["vision_features"]) < 1e-5
    assert difference(encoded.image_embeddings, lisa.tensors["image_tokens"]) < 1e-5
    assert difference(encoded.sam_embedding, lisa.tensors["sam_embeddings"]) < 3e-3  # stored as float16


def test_forced_answers(lisa: Golden) -> None:
    model, wanted = lisa.model, lisa.tensors
    with torch.inference_mode():
        inputs = model.build_inputs(lisa.image, lisa.case["queries"])
        states, trace = model.run_decoder(inputs)
    assert trace is None
    sequence = inputs.sequence
    assert torch.equal(sequence.attention_mask, wanted["expanded_attention_mask"].long())
    assert sequence.mask_query.nonzero()[:, 1].tolist() == wanted["mask_positions"].tolist()
    assert (sequence.seg.nonzero()[:, 1] - 1).tolist() == wanted["mask_positions"].tolist()
    assert sequence.image_tokens.sum(1).tolist() == [lisa.case["num_image_tokens"]] * 2
    assert difference(states * sequence.attention_mask[..., None], wanted["hidden_states"]) < 1e-4
    with torch.inference_mode():
        embeddings = model.mask_projection(states[sequence.mask_query])
        low_res, scores = model.low_res_logits(states[sequence.mask_query], inputs.encoded)
    assert difference(embeddings, wanted["seg_embeddings"]) < 1e-4
    assert difference(low_res, wanted["low_res_logits"][:, 0]) < 1e-4
    assert difference(scores, wanted["iou_predictions"][:, 0]) < 1e-4


@pytest.mark.parametrize("whole", [False, True], ids=["queries", "prompts"])
def test_segment_forced(lisa: Golden, whole: bool) -> None:
    given: dict[str, Any] = {"prompt": lisa.case["prompts"]} if whole else {"query": lisa.case["queries"]}
    result = lisa.model.segment(lisa.image, **given)
    assert difference(result.low_res_logits, lisa.tensors["low_res_logits"][:, 0]) < 1e-4
    assert difference(result.mask_logits, lisa.tensors["mask_logits"]) < 1e-4
    assert torch.equal(result.masks, result.mask_logits > 0)
    assert (result.query_index, result.text, result.trace) == ([0, 1], ["[SEG].", "[SEG]."], None)


def test_the_neighbouring_position_gives_another_mask(lisa: Golden) -> None:
    with torch.inference_mode():
        inputs = lisa.model.build_inputs(lisa.image, lisa.case["queries"])
        states, _ = lisa.model.run_decoder(inputs)
        low_res, _ = lisa.model.low_res_logits(states[inputs.sequence.seg], inputs.encoded)
    assert difference(low_res, lisa.tensors["low_res_logits"][:, 0]) > 0.5


def test_segment_generated(lisa: Golden) -> None:
    model, wanted = lisa.model, lisa.tensors
    encoded = model.encode_image(lisa.image)
    with torch.inference_mode():
        inputs = model.inputs_of([lisa.case["gen_prompt"]], encoded, continues=True)
        generated, _ = model.run_generation(inputs, max_new_tokens=lisa.case["gen_max_new_tokens"])
        logits = model.decoder.lm_head(generated.states[0])
    assert generated.ids == wanted["gen_new_ids"].tolist()
    assert model.tokenizer.pieces(generated.ids[0]) == lisa.case["gen_new_text_pieces"]
    assert difference(logits, wanted["gen_step_logits"]) < 1e-4
    _, steps = generated.where(model.seg_ids[0])
    assert inputs.sequence.token_ids.shape[1] + steps[0] - 1 == int(wanted["gen_mask_position"])
    with torch.inference_mode():
        embeddings = model.mask_projection(generated.states[0, steps])
    assert difference(embeddings, wanted["gen_seg_embeddings"]) < 1e-4
    result = model.segment(encoded, lisa.case["gen_query"], answer="generate")
    assert result.text == "Sure, it is [SEG] ."
    assert result.query_index == [0]
    assert difference(result.low_res_logits, wanted["gen_low_res_logits"][:, 0]) < 1e-4
    assert difference(result.mask_logits, wanted["gen_mask_logits"]) < 1e-4


def test_a_strategy_that_keeps_all_changes_nothing(lisa: Golden) -> None:
    plain = lisa.model.segment(lisa.image, lisa.case["queries"])
    kept = lisa.model.segment(lisa.image, lisa.case["queries"], strategy=tp.strategy("none"))
    assert torch.equal(plain.mask_logits, kept.mask_logits)
    assert kept.trace is not None
    assert kept.trace.ledger.equivalent_tokens == lisa.case["num_image_tokens"]
