"""GLaMM against the numbers of its authors' implementation."""

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
from tokenprune_adapters.glamm import GlammModel
from tokenprune_adapters.glamm.prompts import ANSWERS, QUESTIONS, about_image
from tokenprune_adapters.llava_prompt import dialogue, prompt_ids
from tokenprune_adapters.segmentation import SegmenterInputs


class Golden(NamedTuple):
    model: GlammModel
    case: dict[str, Any]
    tensors: dict[str, Tensor]

    @property
    def image(self) -> np.ndarray[Any, Any]:
        return self.tensors["image"].numpy()

    def forced(self) -> SegmenterInputs:
        return self.model.inputs_of(self.case["prompts"], self.model.encode_image(self.image))


@pytest.fixture(scope="module")
def glamm(golden: Callable[[str], Path]) -> Golden:
    folder = golden("glamm")
    model = tp.load(folder / "checkpoint", vision_tower=folder / "vision_tower")
    case = json.loads((folder / "case.json").read_text(encoding="utf-8"))
    return Golden(model, case, load_file(folder / "case.safetensors"))


def difference(found: Tensor, expected: Tensor) -> float:
    assert found.shape == expected.shape
    return float((found.float() - expected.float()).abs().max())


def test_prompts_and_ids(glamm: Golden) -> None:
    (turns,) = glamm.case["conversations"]
    (first, answer), *later = turns
    (prompt,) = glamm.case["prompts"]
    assert dialogue([(about_image(first, True), answer), *later]) == prompt
    assert prompt_ids(glamm.model.tokenizer, prompt) == glamm.tensors["input_ids"][0].tolist()
    (open_prompt,) = glamm.model.prompts(glamm.case["gen_query"], answer="generate")
    assert open_prompt == glamm.case["gen_prompt"]
    assert prompt_ids(glamm.model.tokenizer, open_prompt) == glamm.tensors["gen_input_ids"][0].tolist()


def test_the_turns_are_in_the_templates(glamm: Golden) -> None:
    names = ["man in red", "left dog", "table"]
    for name, (question, answer) in zip(names, glamm.case["conversations"][0], strict=True):
        assert question in [template.format(name) for template in QUESTIONS]
        assert answer in ANSWERS


def test_tower_inputs_are_exact(glamm: Golden) -> None:
    prepared = glamm.model.prepare_image(glamm.image)
    assert torch.equal(prepared.clip_pixels, glamm.tensors["clip_pixel_values"])
    assert torch.equal(prepared.sam_pixels[0, :, :16, :16], glamm.tensors["sam_input_corner"])
    recipe = glamm.case["sam_input"]
    assert list(prepared.sam_pixels.shape) == recipe["padded_float32_shape"]
    assert float(prepared.sam_pixels.double().abs().sum()) == pytest.approx(recipe["padded_float32_abs_sum"], rel=1e-9)
    height, width = prepared.sizes.resized
    assert [height, width] == recipe["resized_uint8_hw"]
    resized = np.array(Image.fromarray(glamm.image).resize((width, height), Image.Resampling.BILINEAR))
    assert hashlib.sha256(resized.tobytes()).hexdigest() == recipe["resized_uint8_sha256"]


def test_sizes_come_from_the_weights(glamm: Golden) -> None:
    wanted = glamm.case["dims"]["sam_image_encoder"]
    vision = glamm.model.sam.config.vision_config
    assert vision.hidden_size == wanted["encoder_embed_dim"]
    assert vision.num_hidden_layers == wanted["encoder_depth"]
    assert vision.num_attention_heads == wanted["encoder_num_heads"]
    assert list(vision.global_attn_indexes) == wanted["encoder_global_attn_indexes"]
    assert (vision.window_size, vision.image_size, vision.patch_size) == (14, 1024, 16)
    assert glamm.model.left_out == ("model.region_encoder",)


def test_towers(glamm: Golden) -> None:
    with torch.inference_mode():
        encoded = glamm.model.encode_image(glamm.image)
    assert difference(encoded.tower.features, glamm.tensors["vision_features"]) < 1e-5
    assert difference(encoded.image_embeddings, glamm.tensors["image_tokens"]) < 1e-5
    assert difference(encoded.sam_embedding, glamm.tensors["sam_embeddings"]) < 3e-3  # stored as float16


def test_forced_answers(glamm: Golden) -> None:
    model, wanted = glamm.model, glamm.tensors
    with torch.inference_mode():
        inputs = glamm.forced()
        states, trace = model.run_decoder(inputs)
    assert trace is None
    sequence = inputs.sequence
    assert torch.equal(sequence.attention_mask, wanted["expanded_attention_mask"].long())
    assert torch.equal(sequence.mask_query.nonzero(), wanted["mask_positions"])
    assert torch.equal(sequence.seg.nonzero() - torch.tensor([0, 1]), wanted["mask_positions"])
    assert sequence.image_tokens.sum(1).tolist() == [glamm.case["num_image_tokens"]]
    assert difference(states, wanted["hidden_states"]) < 1e-4
    with torch.inference_mode():
        embeddings = model.mask_projection(states[sequence.mask_query])
        low_res, scores = model.low_res_logits(states[sequence.mask_query], inputs.encoded)
    assert difference(embeddings, wanted["seg_embeddings"]) < 1e-4
    assert difference(low_res, wanted["low_res_logits"][:, 0]) < 1e-4
    assert difference(scores, wanted["iou_predictions"][:, 0]) < 1e-4


def test_segment_a_whole_conversation(glamm: Golden) -> None:
    result = glamm.model.segment(glamm.image, prompt=glamm.case["prompts"][0])
    assert difference(result.low_res_logits, glamm.tensors["low_res_logits"][:, 0]) < 1e-4
    assert difference(result.mask_logits, glamm.tensors["mask_logits"]) < 1e-4
    assert torch.equal(result.masks, result.mask_logits > 0)
    assert (result.row_index, result.phrases, result.trace) == ([0, 0, 0], ["", "", ""], None)


def test_the_neighbouring_position_gives_another_mask(glamm: Golden) -> None:
    with torch.inference_mode():
        inputs = glamm.forced()
        states, _ = glamm.model.run_decoder(inputs)
        low_res, _ = glamm.model.low_res_logits(states[inputs.sequence.seg], inputs.encoded)
    assert difference(low_res, glamm.tensors["low_res_logits"][:, 0]) > 0.5


def test_segment_generated(glamm: Golden) -> None:
    model, wanted = glamm.model, glamm.tensors
    encoded = model.encode_image(glamm.image)
    with torch.inference_mode():
        inputs = model.inputs_of([glamm.case["gen_prompt"]], encoded, continues=True)
        generated, _ = model.run_generation(inputs, max_new_tokens=glamm.case["gen_max_new_tokens"])
        logits = model.decoder.lm_head(generated.states[0])
    assert generated.ids == wanted["gen_new_ids"].tolist()
    assert model.tokenizer.pieces(generated.ids[0]) == glamm.case["gen_new_text_pieces"]
    assert difference(logits, wanted["gen_step_logits"]) < 1e-4
    _, steps = generated.where(model.seg_ids[0])
    assert inputs.sequence.token_ids.shape[1] + steps[0] - 1 == int(wanted["gen_mask_position"])
    with torch.inference_mode():
        embeddings = model.mask_projection(generated.states[0, steps])
    assert difference(embeddings, wanted["gen_seg_embeddings"]) < 1e-4
    result = model.segment(encoded, glamm.case["gen_query"], answer="generate")
    assert (result.text, result.phrases) == ("Sure, it is [SEG] .", [""])
    assert difference(result.low_res_logits, wanted["gen_low_res_logits"][:, 0]) < 1e-4
    assert difference(result.mask_logits, wanted["gen_mask_logits"]) < 1e-4


def test_a_strategy_that_keeps_all_changes_nothing(glamm: Golden) -> None:
    prompt = glamm.case["prompts"][0]
    plain = glamm.model.segment(glamm.image, prompt=prompt)
    kept = glamm.model.segment(glamm.image, prompt=prompt, strategy=tp.strategy("none"))
    assert torch.equal(plain.mask_logits, kept.mask_logits)
    assert kept.trace is not None
    assert kept.trace.ledger.equivalent_tokens == glamm.case["num_image_tokens"]
