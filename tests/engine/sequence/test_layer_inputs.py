"""What the layers of a stage are given: cut once for all of them, and right for each."""

from __future__ import annotations

import weakref
from typing import Any

import pytest
import torch
from torch import Tensor

from tokenprune.engine.decoder import find_decoder
from tokenprune.engine.sequence.gathered import GatheredSequence
from tokenprune.engine.sequence.layer_inputs import LayerInputs
from tokenprune.errors import UnsupportedError
from tokenprune.testing.tiny_decoders import tiny_llama

PRESENT = torch.tensor([[1, 1, 0, 1, 0, 1], [1, 0, 0, 1, 1, 1]]).bool()
KEPT = torch.tensor([[0, 1, 3, 5], [0, 3, 4, 5]])
HIDDEN = torch.zeros(2, 4, 8)


def given(seed: int) -> dict[str, Any]:
    """A layer's arguments for [2, 6] positions."""
    draw = torch.Generator().manual_seed(seed)
    cos, sin = torch.randn(2, 1, 6, 8, generator=draw)
    mask = torch.randn(2, 1, 6, 6, generator=draw)
    return {"attention_mask": mask, "position_embeddings": (cos, sin), "position_ids": torch.arange(6)[None]}


def expected(full: dict[str, Any]) -> list[Tensor]:
    cos, sin = full["position_embeddings"]
    rows = [full["attention_mask"][row, :, kept][..., kept] for row, kept in enumerate(KEPT)]
    return [torch.stack(rows), cos[0][KEPT], sin[0][KEPT], KEPT]


def shortened(inputs: LayerInputs, frame: GatheredSequence, full: dict[str, Any]) -> list[Tensor]:
    kwargs = dict(full)
    inputs.shorten(0, kwargs, HIDDEN, frame)
    return [kwargs["attention_mask"], *kwargs["position_embeddings"], kwargs["position_ids"]]


@pytest.fixture
def inputs() -> LayerInputs:
    return LayerInputs(find_decoder(tiny_llama()))


def test_layers_that_are_given_the_same_tensors_share_one_cut(inputs: LayerInputs) -> None:
    frame, full = GatheredSequence.of(PRESENT), given(0)
    first, second = shortened(inputs, frame, full), shortened(inputs, frame, full)
    assert all(map(torch.equal, first, expected(full)))
    assert all(one is other for one, other in zip(first, second, strict=True))


def test_layers_of_another_kind_have_masks_and_tables_of_their_own(inputs: LayerInputs) -> None:
    frame, kinds = GatheredSequence.of(PRESENT), [given(0), given(1)]
    mixed = {**kinds[0], "attention_mask": kinds[1]["attention_mask"]}
    for full in (*kinds, mixed, kinds[0]):
        assert all(map(torch.equal, shortened(inputs, frame, full), expected(full)))


def test_other_values_of_each_position_are_cut_too(inputs: LayerInputs) -> None:
    frame, kinds = GatheredSequence.of(PRESENT), torch.arange(12).reshape(2, 6)
    for own in (kinds, -kinds):
        kwargs = {
            **given(0),
            "kinds": own,
            "lengths": torch.tensor([0, 6, 12]),
            "table": torch.zeros(3, 6),
            "flag": True,
        }
        left = dict(kwargs)
        inputs.shorten(0, kwargs, HIDDEN, frame)
        assert torch.equal(kwargs["kinds"], own.gather(1, KEPT))
        assert all(kwargs[name] is left[name] for name in ("lengths", "table", "flag"))


@pytest.mark.parametrize("over", ["next stage", "end"])
def test_what_was_cut_is_not_kept_past_its_stage(inputs: LayerInputs, over: str) -> None:
    full = given(0)
    cut = [weakref.ref(tensor) for tensor in shortened(inputs, GatheredSequence.of(PRESENT), full)]
    if over == "end":
        inputs.forget()
    else:
        shortened(inputs, GatheredSequence.of(PRESENT), full)
    assert all(tensor() is None for tensor in cut)


@pytest.mark.parametrize("positions", ["keep", "renumber"])
def test_a_layer_that_does_not_rotate_is_given_no_tables(inputs: LayerInputs, positions: str) -> None:
    if positions == "renumber":
        inputs.renumber(torch.ones(2, dtype=torch.bool), PRESENT)
    kwargs: dict[str, Any] = {**given(0), "position_embeddings": None}
    inputs.shorten(0, kwargs, HIDDEN, GatheredSequence.of(PRESENT))
    assert kwargs["position_embeddings"] is None
    assert kwargs["position_ids"].tolist() == (KEPT.tolist() if positions == "keep" else [[0, 1, 2, 3]] * 2)


def test_tables_of_another_form_are_refused(inputs: LayerInputs) -> None:
    for tables in (
        torch.zeros(1, 6, 8),
        (torch.zeros(1, 6, 8),),
        [torch.zeros(1, 6, 8)] * 2,
        (torch.zeros(1, 6, 8), None),
    ):
        with pytest.raises(UnsupportedError, match="do not take position_embeddings"):
            shortened(inputs, GatheredSequence.of(PRESENT), {**given(0), "position_embeddings": tables})
