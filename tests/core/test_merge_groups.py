"""`Merge.from_groups` against a construction token by token."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenprune import Merge, MergeGroup
from tokenprune.errors import PluginError

QUICK = settings(max_examples=80, deadline=None)
SIZE = 12


def tokens_like(batch: int) -> Any:
    """All of `Tokens` that joining groups looks at."""
    return SimpleNamespace(exists=torch.ones(batch, SIZE, dtype=torch.bool), device=torch.device("cpu"))


@st.composite
def groups_of(draw: Any, batch: int) -> list[MergeGroup]:
    """Groups whose slots differ within a row, in any order, some without an origin of their own."""
    found = []
    for row in range(batch):
        free = draw(st.permutations(range(SIZE)))
        for _ in range(draw(st.integers(0, 3))):
            count = draw(st.integers(0, min(3, len(free))))
            slots, free = free[:count], free[count:]
            members = draw(st.permutations(range(SIZE)))[: draw(st.integers(0, 5))]
            weights = torch.tensor([[float(draw(st.integers(0, 9))) for _ in members] for _ in slots])
            origin = None
            if draw(st.booleans()):
                origin = torch.tensor([draw(st.integers(-1, SIZE - 1)) for _ in slots], dtype=torch.int64)
            index, made_of = (torch.tensor(part, dtype=torch.int64) for part in (slots, members))
            found.append(MergeGroup(row, index, made_of, weights.reshape(len(slots), len(members)), origin))
    return draw(st.permutations(found))


@QUICK
@given(st.integers(1, 3).flatmap(lambda batch: st.tuples(st.just(batch), groups_of(batch))))
def test_each_row_has_its_new_tokens_in_the_order_of_slots(made: tuple[int, list[MergeGroup]]) -> None:
    batch, groups = made
    merged = Merge.from_groups(tokens_like(batch), groups)
    assert merged.origin is not None
    expected: list[dict[int, tuple[int, list[float]]]] = [{} for _ in range(batch)]
    for group in groups:
        for k, slot in enumerate(group.index.tolist()):
            row = [0.0] * SIZE
            for j, member in enumerate(group.members.tolist()):
                row[member] = float(group.weights[k, j])
            expected[group.row][slot] = (slot if group.origin is None else int(group.origin[k]), row)
    most = max(len(row) for row in expected)
    assert merged.index.shape == merged.origin.shape == (batch, most)
    assert merged.weights.shape == (batch, most, SIZE)
    for row, wanted in enumerate(expected):
        slots = sorted(wanted)
        padding = most - len(slots)
        assert merged.index[row].tolist() == slots + [-1] * padding
        assert merged.origin[row].tolist() == [wanted[slot][0] for slot in slots] + [-1] * padding
        assert merged.weights[row].tolist() == [wanted[slot][1] for slot in slots] + [[0.0] * SIZE] * padding


def test_what_it_is_told_beside_the_groups_is_passed_on() -> None:
    scores = torch.rand(2, SIZE)
    merged = Merge.from_groups(tokens_like(2), [], scores=scores, conserves_mass=True, rest="park")
    assert merged.index.shape == (2, 0)
    assert (merged.scores is scores, merged.conserves_mass, merged.rest) == (True, True, "park")


@pytest.mark.parametrize(("index", "members", "weights", "origin"), [(2, 3, (3, 2), None), (2, 3, (2, 3), 3)])
def test_shapes_that_do_not_go_together_are_refused(index: int, members: int, weights: Any, origin: int | None) -> None:
    with pytest.raises(PluginError, match=r"merge group of batch row 1: .* = \[2, 3\] and \[2\]"):
        MergeGroup(
            1,
            torch.arange(index),
            torch.arange(members),
            torch.zeros(weights),
            None if origin is None else torch.arange(origin),
        )
