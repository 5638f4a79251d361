"""GLaMM against the numbers of its authors' implementation."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from segmentation_golden import (
    Golden,
    check_generated_sam_mask,
    check_keep_all,
    check_masks,
    check_pixels,
    check_prompts,
    check_sam_masks,
    check_sequence,
    check_towers,
)

from tokenprune_adapters.glamm.prompts import ANSWERS, QUESTIONS, about_image
from tokenprune_adapters.llava.prompt import dialogue


@pytest.fixture(scope="module")
def glamm(golden: Callable[[str], Path]) -> Golden:
    return Golden.read(golden("glamm"))


def test_prompts_and_ids(glamm: Golden) -> None:
    (turns,) = glamm.case["conversations"]
    (first, answer), *later = turns
    check_prompts(glamm, [dialogue([(about_image(first, True), answer), *later])])


def test_the_turns_are_in_the_templates(glamm: Golden) -> None:
    names = ["man in red", "left dog", "table"]
    for name, (question, answer) in zip(names, glamm.case["conversations"][0], strict=True):
        assert question in [template.format(name) for template in QUESTIONS]
        assert answer in ANSWERS


def test_tower_inputs_are_exact(glamm: Golden) -> None:
    check_pixels(glamm)


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
    check_towers(glamm)


def test_forced_answers(glamm: Golden) -> None:
    inputs = glamm.model.inputs_of(glamm.case["prompts"], glamm.model.encode_image(glamm.image))
    states = check_sequence(glamm, inputs, [glamm.case["num_image_tokens"]])
    check_sam_masks(glamm, inputs, states)


def test_segment_a_whole_conversation(glamm: Golden) -> None:
    result = glamm.model.segment(glamm.image, prompt=glamm.case["prompts"][0])
    check_masks(glamm, result)
    assert (result.row_index, result.phrases, result.trace) == ([0, 0, 0], ["", "", ""], None)


def test_segment_generated(glamm: Golden) -> None:
    result = check_generated_sam_mask(glamm)
    assert (result.text, result.phrases) == ("Sure, it is [SEG] .", [""])


def test_a_strategy_that_keeps_all_changes_nothing(glamm: Golden) -> None:
    check_keep_all(glamm, glamm.case["num_image_tokens"], prompt=glamm.case["prompts"][0])
