"""PixelLM against the numbers of its authors' implementation."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from segmentation_golden import (
    HALF,
    LIMIT,
    Golden,
    check_generation,
    check_keep_all,
    check_masks,
    check_prompts,
    check_resized,
    check_sequence,
    difference,
)

from tokenprune_adapters.pixellm import mask_scores


@pytest.fixture(scope="module")
def pixellm(golden: Callable[[str], Path]) -> Golden:
    return Golden.read(golden("pixellm"))


def queries_of(golden: Golden) -> list[str]:
    return [query for (query,) in golden.case["queries"]]


def test_prompts_and_ids(pixellm: Golden) -> None:
    model, case = pixellm.model, pixellm.case
    assert list(model.seg_tokens) == case["seg_tokens"]
    assert model.seg_ids == case["seg_token_ids"]
    check_prompts(pixellm, model.prompts(queries_of(pixellm), is_sentence=case["query_is_sentence"]))


def test_tower_input_is_exact(pixellm: Golden) -> None:
    prepared = pixellm.model.prepare_image(pixellm.image)
    assert torch.equal(prepared.pixels, pixellm.tensors["clip_pixel_values"])
    size, digest = pixellm.case["clip_resized_size_hw"], pixellm.case["clip_input"]["resized_uint8_sha256"]
    check_resized(pixellm, prepared.sizes.resized, size, digest)


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
    inputs = model.build_inputs(pixellm.image, queries_of(pixellm))
    states = check_sequence(pixellm, inputs, [12 * 16] * 2)
    sequence = inputs.sequence
    with torch.inference_mode():
        answered = model.answer(inputs)
    assert torch.equal(answered.states, states[sequence.mask_query])
    assert answered.rows == [0, 1]
    with torch.inference_mode():
        single = model.mask_projection(answered.states)
        fused = model.mask_embeddings(answered.states)
        coarse, fine = model.pixel_decoder.levels(inputs.encoded.mask_features[None], fused)
        low_res, _ = model.low_res_logits(answered.states, inputs.encoded)
        beside, _ = model.low_res_logits(states[sequence.seg], inputs.encoded)
    assert difference(single, wanted["seg_token_embeddings"]) < LIMIT
    assert difference(fused, wanted["seg_embeddings"]) < LIMIT
    assert difference(coarse, wanted["level_mask_logits_0"][:, 0]) < LIMIT
    assert difference(fine, wanted["level_mask_logits_1"][:, 0]) < HALF
    assert difference(low_res, wanted["low_res_logits"][:, 0]) < LIMIT
    assert difference(beside, wanted["low_res_logits"][:, 0]) > 0.1  # the place of a mask token gives another mask


@pytest.mark.parametrize("whole", [False, True], ids=["queries", "prompts"])
def test_segment_forced(pixellm: Golden, whole: bool) -> None:
    given: dict[str, Any] = {"prompt": pixellm.case["prompts"]} if whole else {"query": queries_of(pixellm)}
    result = pixellm.model.segment(pixellm.image, **given)
    check_masks(pixellm, result)
    assert difference(mask_scores(result.mask_logits), pixellm.tensors["mask_scores"]) < LIMIT
    answer = "[SEG0] [SEG1] [SEG2] [SEG3] [SEG4] [SEG5]."
    assert (result.query_index, result.text, result.trace) == ([0, 1], [answer, answer], None)


def test_segment_generated(pixellm: Golden) -> None:
    model, case, wanted = pixellm.model, pixellm.case, pixellm.tensors
    encoded = model.encode_image(pixellm.image)
    inputs, _ = check_generation(pixellm, encoded)
    with torch.inference_mode():
        answered = model.answer(inputs, max_new_tokens=case["gen_max_new_tokens"])
        fused = model.mask_embeddings(answered.states)
    length = inputs.sequence.token_ids.shape[1]
    (place,) = answered.places
    assert [length + place + step - 1 for step in range(6)] == wanted["gen_mask_positions"].tolist()
    assert difference(fused, wanted["gen_seg_embeddings"]) < LIMIT
    result = model.segment(encoded, case["gen_query"], answer="generate", max_new_tokens=16)
    assert (result.text, result.query_index) == ("It is [SEG0] [SEG1] [SEG2] [SEG3] [SEG4] [SEG5] .", [0])
    check_masks(pixellm, result, "gen_")


def test_a_strategy_that_keeps_all_changes_nothing(pixellm: Golden) -> None:
    check_keep_all(pixellm, 12 * 16, query=queries_of(pixellm))
