"""gIoU, cIoU, size buckets, agreement, and the pixels that kept tokens cover."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from PIL import Image

from tokenprune.core.decisions import Keep, Merge
from tokenprune.core.layout import SequenceLayout
from tokenprune.core.ledger import Ledger
from tokenprune.core.scheduling.state import TokenState
from tokenprune.core.trace import StageTrace, Trace
from tokenprune.errors import InputError
from tokenprune.evaluation import metrics
from tokenprune.evaluation.coverage import cells_to_pixels, target_coverage, target_shares, token_map

SHAPE = (5, 7)
MASKS = hnp.arrays(bool, SHAPE)
LABELS = hnp.arrays(np.uint8, SHAPE, elements=st.sampled_from([0, 1, 255])).filter(
    lambda labels: bool((labels == 1).any()) or not bool((labels == 255).any())
)
PAIRS = st.lists(st.tuples(MASKS, LABELS), min_size=1, max_size=5)


def naive(pairs: list[tuple[np.ndarray, np.ndarray]]) -> tuple[float, float]:
    """gIoU and cIoU, pixel by pixel."""
    total, intersections, unions = 0.0, 0, 0
    for prediction, target in pairs:
        inside = outside = 0
        for p, t in zip(prediction.ravel().tolist(), target.ravel().tolist(), strict=True):
            if t == 255:
                continue
            inside += bool(p) and t != 0
            outside += bool(p) or t != 0
        total += 1.0 if outside == 0 else inside / (outside + 1e-5)
        intersections, unions = intersections + inside, unions + outside
    return total / len(pairs), intersections / unions if unions else 1.0


@given(PAIRS)
def test_equal_to_the_naive_reference(pairs: list[tuple[np.ndarray, np.ndarray]]) -> None:
    overlaps = [metrics.overlap(p, t) for p, t in pairs]
    giou, ciou = naive(pairs)
    assert metrics.giou(overlaps) == pytest.approx(giou, abs=1e-12)
    assert metrics.ciou(overlaps) == pytest.approx(ciou, abs=1e-12)


@given(MASKS, MASKS)
def test_symmetric_and_bounded(a: np.ndarray, b: np.ndarray) -> None:
    assert metrics.overlap(a, b) == metrics.overlap(b, a)
    assert 0 <= metrics.giou([metrics.overlap(a, b)]) <= 1


@given(MASKS)
def test_a_mask_agrees_with_itself(mask: np.ndarray) -> None:
    assert metrics.agreement([mask], [mask]) == pytest.approx(1.0, abs=1e-4)
    assert metrics.ciou([metrics.overlap(mask, mask)]) == 1.0


@given(MASKS)
def test_disjoint_masks_share_nothing(mask: np.ndarray) -> None:
    expected = 0.0 if mask.size else 1.0
    assert metrics.giou([metrics.overlap(mask, ~mask)]) == expected


def test_nothing_where_nothing_is_wanted_counts_as_right() -> None:
    empty, full = np.zeros(SHAPE, dtype=bool), np.ones(SHAPE, dtype=bool)
    assert metrics.giou([metrics.overlap(empty, empty)]) == 1.0
    assert metrics.ciou([metrics.overlap(empty, empty)]) == 1.0
    assert metrics.giou([metrics.overlap(full, empty)]) == 0.0


@given(MASKS, LABELS)
def test_what_is_predicted_on_ignored_pixels_does_not_matter(prediction: np.ndarray, target: np.ndarray) -> None:
    flipped = np.where(target == 255, ~prediction, prediction)
    assert metrics.overlap(prediction, target) == metrics.overlap(flipped, target)


def test_giou_weighs_expressions_ciou_weighs_pixels() -> None:
    pairs = [(1, 1), (0, 99)]
    assert metrics.giou(pairs) == pytest.approx(0.5, abs=1e-4)
    assert metrics.ciou(pairs) == pytest.approx(0.01)


@pytest.mark.parametrize("metric", [metrics.giou, metrics.ciou])
def test_no_expressions_is_an_error(metric: object) -> None:
    with pytest.raises(InputError, match="no expressions"):
        metric([])  # type: ignore[operator]


@pytest.mark.parametrize("junk", [[[True]], Image.new("1", (2, 2)), None, np.array("x"), np.zeros((2, 2), complex)])
def test_masks_are_arrays_of_numbers(junk: object) -> None:
    mask = np.zeros((2, 2), bool)
    for pair, kind in (((junk, mask), "predicted"), ((mask, junk), "target")):
        with pytest.raises(InputError, match=f"^a {kind} mask is "):
            metrics.overlap(*pair)  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"^a target mask is "):
        metrics.size_of(junk)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "junk", [3, [3], [(1, 2, 3)], [(1, "x")], [(-1, 2)], [(1, float("nan"))], "x", np.ones((2, 2))]
)
def test_pairs_are_numbers_of_pixels(junk: object) -> None:
    for metric in (metrics.giou, metrics.ciou):
        with pytest.raises(InputError, match="expected numbers of pixels"):
            metric(junk)  # type: ignore[arg-type]


def test_lists_of_two_lengths() -> None:
    with pytest.raises(InputError, match="groups and overlaps: found 2 and 1, expected as many"):
        metrics.miou_by(["a", "b"], [(1, 2)])
    with pytest.raises(InputError, match="masks and reference: found 1 and 0, expected as many"):
        metrics.agreement([np.zeros((2, 2), bool)], [])


def test_shapes_must_agree() -> None:
    with pytest.raises(InputError, match=r"\[2, 3\].*\[3, 2\]"):
        metrics.overlap(np.zeros((2, 3), bool), np.zeros((3, 2), bool))


@pytest.mark.parametrize(
    ("pixels", "size"), [(0, None), (1, "small"), (1023, "small"), (1024, "medium"), (9215, "medium"), (9216, "large")]
)
def test_size_buckets_are_cocos_at_640_by_480(pixels: int, size: str | None) -> None:
    target = np.zeros((480, 640), dtype=bool)
    target.flat[:pixels] = True
    assert metrics.size_of(target) == size


def test_means_by_group_leave_out_none() -> None:
    found = metrics.miou_by(["a", None, "b", "a"], [(1, 2), (5, 5), (0, 3), (1, 1)])
    assert list(found) == ["a", "b"]
    assert found["a"] == pytest.approx(0.75, abs=1e-4)
    assert found["b"] == 0.0


# from tokens to pixels ------------------------------------------------------------------------------------------------


def trace_of(side: int = 3, rows: int = 1, text: int = 2) -> tuple[Trace, TokenState]:
    """A trace without stages over a square grid, and the state that it starts from."""
    image = torch.zeros(rows, side**2 + text, dtype=torch.bool)
    image[:, 1 : 1 + side**2] = True
    layout = SequenceLayout.from_mask(image)
    exists = layout.slots >= 0
    counts = (side**2,) * rows
    return Trace("test", {}, layout, exists, Ledger(counts, (text,) * rows)), TokenState.start(exists)


def stage_of(state: TokenState, layer: int = 1, scores: torch.Tensor | None = None) -> StageTrace:
    """The record of a state."""
    s = state
    return StageTrace("s", layer, "keep", s.active, s.parked, s.dropped, s.origin, s.mass, scores, s.lineage)


@given(hnp.arrays(bool, st.tuples(st.integers(1, 6), st.integers(1, 6))), st.integers(1, 40), st.integers(1, 40))
def test_every_pixel_belongs_to_the_cell_of_its_centre(cells: np.ndarray, height: int, width: int) -> None:
    found = cells_to_pixels(cells, height, width)
    for y in range(height):
        for x in range(width):
            row = int((y + 0.5) * cells.shape[0] / height)
            column = int((x + 0.5) * cells.shape[1] / width)
            assert found[y, x] == cells[row, column]


def test_pixels_outside_the_box_belong_to_no_cell() -> None:
    found = cells_to_pixels(np.ones((2, 2), bool), 4, 8, (0, 2, 4, 6))
    assert found[:, 2:6].all()
    assert not found[:, :2].any()
    assert not found[:, 6:].any()


def test_cells_partly_outside_the_image_are_cut() -> None:
    found = cells_to_pixels(np.array([[True, False]]), 2, 4, (0, -4, 2, 4))
    assert not found.any()


def test_coverage_of_everything_nothing_and_a_part() -> None:
    trace, state = trace_of(side=2)
    target = np.zeros((4, 4), bool)
    target[:, :2] = True
    assert target_coverage(target, trace, 0) == 1.0
    kept = state.after(Keep.where(torch.tensor([[True, False, False, False]])))
    trace.stages.append(stage_of(kept))
    assert target_coverage(target, trace, 0) == 0.5
    assert target_coverage(~target, trace, 0) == 0.0
    assert target_coverage(np.zeros((4, 4), bool), trace, 0) is None


def test_coverage_leaves_ignored_pixels_out() -> None:
    trace, state = trace_of(side=2)
    trace.stages.append(stage_of(state.after(Keep.where(torch.tensor([[True, False, False, False]])))))
    target = np.ones((4, 4), np.uint8)
    target[2:] = 255
    assert target_coverage(target, trace, 0) == 0.5


def test_shares_of_cells_that_show_the_target() -> None:
    """Four cells of 2 x 3 pixels, the right ones half outside the image; an ignored pixel is none of the target's."""
    trace, _ = trace_of(side=2)
    target = np.zeros((4, 6), np.uint8)
    target[:2, :4], target[0, 0], target[3, 5] = 1, 255, 1
    assert target_shares(target, trace, 0) == pytest.approx([5 / 6, 2 / 6, 0, 1 / 6])
    assert target_shares(target[:, :4], trace, 0, (0, 0, 4, 6)) == pytest.approx([5 / 6, 1, 0, 0])
    assert target_shares(target, trace, 0, (0, 0, 2, 6)) == pytest.approx([2 / 3, 1 / 3, 1, 1 / 3])


def test_a_merged_token_covers_the_place_it_stands_at() -> None:
    trace, state = trace_of(side=2)
    merge = Merge(torch.tensor([[0, 1]]), weights=torch.ones(1, 2, 4) / 4, origin=torch.tensor([[3, -1]]))
    trace.stages.append(stage_of(state.after(merge)))
    target = np.zeros((4, 4), bool)
    target[2:, 2:] = True
    assert target_coverage(target, trace, 0) == 1.0
    assert target_coverage(~target, trace, 0) == 0.0


def test_token_map_puts_values_on_their_cells() -> None:
    trace, _ = trace_of(side=3, rows=2)
    assert token_map(torch.arange(9.0), trace, 1).tolist() == [[0, 1, 2], [3, 4, 5], [6, 7, 8]]
