"""The authors' numbers for a segmentation model, and the checks that hold for more than one family."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

import tokenprune as tp
from tokenprune_adapters.llava.prompt import prompt_ids
from tokenprune_adapters.segmentation.data import Segmentation, SegmenterInputs
from tokenprune_adapters.segmentation.generation import Generated

LIMIT = 1e-4
HALF = 2e-3  # tensors that are stored as float16


class Golden(NamedTuple):
    """A folder of reference data: the model of its checkpoint, what was asked of it, and what it gave."""

    model: Any
    case: dict[str, Any]
    tensors: dict[str, Tensor]

    @classmethod
    def read(cls, folder: Path) -> Golden:
        model = tp.load(folder / "checkpoint", vision_tower=folder / "vision_tower")
        case = json.loads((folder / "case.json").read_text(encoding="utf-8"))
        return cls(model, case, load_file(folder / "case.safetensors"))

    @property
    def image(self) -> np.ndarray[Any, Any]:
        return self.tensors["image"].numpy()


def difference(found: Tensor, expected: Tensor) -> float:
    assert found.shape == expected.shape
    return float((found.float() - expected.float()).abs().max())


def check_prompts(golden: Golden, found: list[str]) -> None:
    """The given prompts are the authors', and so are their ids and the prompt that is left open."""
    model, case, wanted = golden.model, golden.case, golden.tensors
    assert found == case["prompts"]
    for prompt, ids, mask in zip(found, wanted["input_ids"], wanted["attention_mask"].bool(), strict=True):
        assert prompt_ids(model.tokenizer, prompt) == ids[mask].tolist()
    (prompt,) = model.prompts(case["gen_query"], answer="generate")
    assert prompt == case["gen_prompt"]
    assert prompt_ids(model.tokenizer, prompt) == wanted["gen_input_ids"][0].tolist()


def check_resized(golden: Golden, found: tuple[int, int], size: list[int], digest: str) -> None:
    """The image, resized to the size that was found, is the authors' to the bit."""
    assert list(found) == size
    resized = np.array(Image.fromarray(golden.image).resize((found[1], found[0]), Image.Resampling.BILINEAR))
    assert hashlib.sha256(resized.tobytes()).hexdigest() == digest


def check_pixels(golden: Golden) -> None:
    """What CLIP and SAM get is the authors'."""
    prepared = golden.model.prepare_image(golden.image)
    assert torch.equal(prepared.clip_pixels, golden.tensors["clip_pixel_values"])
    assert torch.equal(prepared.sam_pixels[0, :, :16, :16], golden.tensors["sam_input_corner"])
    recipe = golden.case["sam_input"]
    assert list(prepared.sam_pixels.shape) == recipe["padded_float32_shape"]
    assert float(prepared.sam_pixels.double().abs().sum()) == pytest.approx(recipe["padded_float32_abs_sum"], rel=1e-9)
    check_resized(golden, prepared.sizes.resized, recipe["resized_uint8_hw"], recipe["resized_uint8_sha256"])


def check_towers(golden: Golden) -> None:
    """So is what CLIP, the projector and SAM's encoder give."""
    with torch.inference_mode():
        encoded = golden.model.encode_image(golden.image)
    assert difference(encoded.tower.features, golden.tensors["vision_features"]) < 1e-5
    assert difference(encoded.image_embeddings, golden.tensors["image_tokens"]) < 1e-5
    assert difference(encoded.sam_embedding, golden.tensors["sam_embeddings"]) < 3e-3  # stored as float16


def check_sequence(golden: Golden, inputs: SegmenterInputs, image_tokens: list[int]) -> Tensor:
    """The decoder's input and its final states are the authors'; gives the states."""
    wanted, sequence = golden.tensors, inputs.sequence
    assert torch.equal(sequence.attention_mask, wanted["expanded_attention_mask"].long())
    positions = wanted["mask_positions"]
    places = positions if positions.dim() == 2 else torch.stack((torch.arange(len(positions)), positions), 1)
    assert torch.equal(sequence.mask_query.nonzero(), places)
    assert torch.equal(sequence.seg.nonzero() - torch.tensor([0, 1]), places)
    assert sequence.image_tokens.sum(1).tolist() == image_tokens
    with torch.inference_mode():
        states, trace = golden.model.run_decoder(inputs)
    assert trace is None
    assert difference(states * sequence.attention_mask[..., None], wanted["hidden_states"]) < LIMIT
    return states


def check_sam_masks(golden: Golden, inputs: SegmenterInputs, states: Tensor) -> None:
    """SAM's masks of the mask queries are the authors'; those of the mask tokens, one place on, are others."""
    model, wanted, sequence = golden.model, golden.tensors, inputs.sequence
    with torch.inference_mode():
        embeddings = model.mask_projection(states[sequence.mask_query])
        low_res, scores = model.low_res_logits(states[sequence.mask_query], inputs.encoded)
        beside, _ = model.low_res_logits(states[sequence.seg], inputs.encoded)
    assert difference(embeddings, wanted["seg_embeddings"]) < LIMIT
    assert difference(low_res, wanted["low_res_logits"][:, 0]) < LIMIT
    assert difference(scores, wanted["iou_predictions"][:, 0]) < LIMIT
    assert difference(beside, wanted["low_res_logits"][:, 0]) > 0.5


def check_masks(golden: Golden, result: Segmentation, prefix: str = "") -> None:
    """Masks are the authors' of given answers, or with prefix "gen_" those of the generated one."""
    assert difference(result.low_res_logits, golden.tensors[f"{prefix}low_res_logits"][:, 0]) < LIMIT
    assert difference(result.mask_logits, golden.tensors[f"{prefix}mask_logits"]) < LIMIT
    assert torch.equal(result.masks, result.mask_logits > 0)


def check_generation(golden: Golden, encoded: Any) -> tuple[SegmenterInputs, Generated]:
    """The words that the model says, and its logits at each step, are the authors'."""
    model, case, wanted = golden.model, golden.case, golden.tensors
    with torch.inference_mode():
        inputs = model.inputs_of([case["gen_prompt"]], encoded, continues=True)
        generated, _ = model.run_generation(inputs, max_new_tokens=case["gen_max_new_tokens"])
        logits = model.decoder.lm_head(generated.states[0])
    assert generated.ids == wanted["gen_new_ids"].tolist()
    assert model.tokenizer.pieces(generated.ids[0]) == case["gen_new_text_pieces"]
    assert difference(logits, wanted["gen_step_logits"]) < LIMIT
    return inputs, generated


def check_generated_sam_mask(golden: Golden) -> Segmentation:
    """A generated answer makes the authors' mask from the state that said the mask token; gives the result."""
    model, wanted = golden.model, golden.tensors
    encoded = model.encode_image(golden.image)
    inputs, generated = check_generation(golden, encoded)
    _, steps = generated.where(model.seg_ids[0])
    assert inputs.sequence.token_ids.shape[1] + steps[0] - 1 == int(wanted["gen_mask_position"])
    with torch.inference_mode():
        embeddings = model.mask_projection(generated.states[0, steps])
    assert difference(embeddings, wanted["gen_seg_embeddings"]) < LIMIT
    result: Segmentation = model.segment(encoded, golden.case["gen_query"], answer="generate")
    check_masks(golden, result, "gen_")
    return result


def check_keep_all(golden: Golden, image_tokens: int, **asked: Any) -> None:
    """A strategy that keeps all changes nothing; `asked` are arguments of `segment`."""
    plain = golden.model.segment(golden.image, **asked)
    kept = golden.model.segment(golden.image, **asked, strategy=tp.strategy("none"))
    assert torch.equal(plain.mask_logits, kept.mask_logits)
    assert kept.trace is not None
    assert kept.trace.ledger.equivalent_tokens == image_tokens
