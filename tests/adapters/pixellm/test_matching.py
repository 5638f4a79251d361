"""Masks of one answer against several targets, and their scores."""

from __future__ import annotations

from itertools import permutations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional

from tokenprune.errors import InputError
from tokenprune_adapters.pixellm import mask_scores, match_masks


def test_matching_by_hand() -> None:
    targets = torch.zeros(3, 4, 4, dtype=torch.bool)
    targets[0, :2], targets[1, 2:], targets[2, :, 0] = True, True, True
    logits = torch.where(targets[[1, 0]], 8.0, -8.0)
    assert match_masks(logits, targets) == [(0, 1), (1, 0)]
    assert match_masks(logits[:0], targets) == []
    assert match_masks(logits, targets[:1]) == [(1, 0)]
    with pytest.raises(InputError, match="cannot be matched"):
        match_masks(logits, targets[:, :2])
    with pytest.raises(InputError, match="NaN"):
        match_masks(logits * float("nan"), targets)


@given(st.integers(0, 4), st.integers(0, 4), st.integers(0, 99))
@settings(max_examples=40, deadline=None)
def test_matching_is_the_cheapest(masks: int, wanted: int, seed: int) -> None:
    drawn = torch.Generator().manual_seed(seed)
    logits = torch.randn(masks, 5, 6, generator=drawn) * 3
    targets = torch.rand(wanted, 5, 6, generator=drawn) > 0.5

    def cost(mask: int, target: int) -> float:
        hit = targets[target].float()
        entropy = functional.binary_cross_entropy_with_logits(logits[mask], hit)
        soft = logits[mask].sigmoid()
        return float(entropy + 1 - (2 * (soft * hit).sum() + 1) / (soft.sum() + hit.sum() + 1))

    pairs = match_masks(logits, targets)
    fewer = min(masks, wanted)
    assert len({mask for mask, _ in pairs}) == len({target for _, target in pairs}) == len(pairs) == fewer
    least = min(
        sum(cost(m, t) for m, t in zip(ms, ts, strict=True))
        for ms in permutations(range(masks), fewer)
        for ts in permutations(range(wanted), fewer)
    )
    assert sum(cost(*pair) for pair in pairs) == pytest.approx(least, abs=1e-4)


def test_mask_scores() -> None:
    logits = torch.tensor([[[2.0, -1.0], [0.0, -3.0]], [[-1.0, -1.0], [-1.0, -1.0]]])
    assert mask_scores(logits).tolist() == pytest.approx([float(torch.tensor(2.0).sigmoid()), 0.0], abs=1e-5)
