"""LISA against the numbers of its authors' implementation."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

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


@pytest.fixture(scope="module")
def lisa(golden: Callable[[str], Path]) -> Golden:
    return Golden.read(golden("lisa"))


def test_prompts_and_ids(lisa: Golden) -> None:
    check_prompts(lisa, lisa.model.prompts(lisa.case["queries"]))


def test_tower_inputs_are_exact(lisa: Golden) -> None:
    check_pixels(lisa)


def test_towers(lisa: Golden) -> None:
    check_towers(lisa)


def test_forced_answers(lisa: Golden) -> None:
    inputs = lisa.model.build_inputs(lisa.image, lisa.case["queries"])
    states = check_sequence(lisa, inputs, [lisa.case["num_image_tokens"]] * 2)
    check_sam_masks(lisa, inputs, states)


@pytest.mark.parametrize("whole", [False, True], ids=["queries", "prompts"])
def test_segment_forced(lisa: Golden, whole: bool) -> None:
    given: dict[str, Any] = {"prompt": lisa.case["prompts"]} if whole else {"query": lisa.case["queries"]}
    result = lisa.model.segment(lisa.image, **given)
    check_masks(lisa, result)
    assert (result.query_index, result.text, result.trace) == ([0, 1], ["[SEG].", "[SEG]."], None)


def test_segment_generated(lisa: Golden) -> None:
    result = check_generated_sam_mask(lisa)
    assert (result.text, result.query_index) == ("Sure, it is [SEG] .", [0])


def test_a_strategy_that_keeps_all_changes_nothing(lisa: Golden) -> None:
    check_keep_all(lisa, lisa.case["num_image_tokens"], query=lisa.case["queries"])
