"""What the values of masks mean, wherever a target or a prediction is taken."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fake_segmentation import FakeData, FakeModel
from hypothesis import assume, given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray
from PIL import Image

from tokenprune.datasets.base import Scene
from tokenprune.errors import InputError, OptionError, PluginError
from tokenprune.evaluation import metrics
from tokenprune.evaluation.comparison.compare import compare
from tokenprune.evaluation.samples import run_query
from tokenprune.report.panels import with_mask
from tokenprune.utils.masks import LabelMask, foreground, ignored, predicted, read_mask, with_ignored
from tokenprune_adapters.pixellm import match_masks

SHAPE = (4, 6)
BOOLS = hnp.arrays(bool, SHAPE)
TYPES = st.sampled_from([np.uint8, np.int16, np.int64, np.float32])
TARGETS = hnp.arrays(np.uint8, SHAPE, elements=st.sampled_from([0, 1, 255]))


@given(BOOLS, TARGETS, TYPES)
def test_one_is_foreground_and_255_beside_it_does_not_count(mask: Any, target: Any, dtype: Any) -> None:
    assume((target == 1).any())
    inside = outside = 0
    for found, wanted in zip(mask.flat, target.flat, strict=True):
        if wanted != 255:
            inside += bool(found) and wanted == 1
            outside += bool(found) or wanted == 1
    assert metrics.overlap(mask, target.astype(dtype)) == (inside, outside)
    assert foreground(target.astype(dtype)).tolist() == [[value == 1 for value in row] for row in target.tolist()]
    assert ignored(target).tolist() == [[value == 255 for value in row] for row in target.tolist()]


@given(BOOLS, BOOLS, TYPES, st.sampled_from([1, 255]))
def test_predictions_of_0_and_255_are_those_of_bool(mask: Any, target: Any, dtype: Any, white: int) -> None:
    stored = np.where(mask, white, 0).astype(dtype)
    assert metrics.overlap(stored, target) == metrics.overlap(mask, target)
    assert metrics.agreement([stored], [stored]) == metrics.agreement([mask], [mask])
    assert predicted(stored).tolist() == mask.tolist()


def mask_of(*values: float, dtype: Any = np.int64) -> NDArray[Any]:
    return np.resize(np.array(values, dtype), SHAPE)


REFUSED: list[tuple[Any, str]] = [
    (mask_of(0, 255), "255 and no 1, .*give bool: mask == 255"),
    (mask_of(255), "255 and no 1, .*give bool: mask == 255"),
    (mask_of(0, 1, -1), "has the values -1, expected bool, or 0 for background"),
    (mask_of(0, 1, 2), "has the values 2, .*such as labels == 2"),
    (mask_of(0, 3, 4, 5, 6), "has the values 3, 4, 5, …,"),
    (mask_of(0, 1, 0.5, dtype=float), "has the values 0.5,"),
    (mask_of(0, np.nan, dtype=float), "has the values nan,"),
    (mask_of(0, 1, dtype=complex), "is of type complex128,"),
    (torch.zeros(SHAPE), "is a Tensor, expected a numpy array"),
    (None, "is a NoneType, expected a numpy array"),
]


@pytest.mark.parametrize(("target", "message"), REFUSED)
def test_targets_that_mean_nothing_or_two_things_are_refused_everywhere(target: Any, message: str) -> None:
    calls: list[Callable[[], Any]] = [lambda: foreground(target), lambda: ignored(target)]
    if isinstance(target, np.ndarray):
        picture = np.zeros((*SHAPE, 3), np.uint8)
        calls += [
            lambda: metrics.overlap(np.zeros(SHAPE, bool), target),
            lambda: metrics.size_of(target),
            lambda: with_mask(picture, target),
        ]
    for call in calls:
        with pytest.raises(InputError, match=f"a target mask .*{message}") as caught:
            call()
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "mask", [mask_of(0, 1, 255), mask_of(2), mask_of(-1, 0), mask_of(0, 0.5, dtype=float), mask_of(np.nan, dtype=float)]
)
def test_predictions_of_other_values_are_refused(mask: NDArray[Any]) -> None:
    with pytest.raises(InputError, match=r"a predicted mask has the values .*give logits > 0"):
        metrics.overlap(mask, np.zeros(SHAPE, bool))


class Stored(FakeData):
    """The same targets, stored in another way."""

    def __init__(self, change: Callable[[NDArray[np.bool_]], NDArray[Any]]) -> None:
        self.change = change

    def scenes(self, split: str, limit: int | None = None, seed: int = 0) -> Iterator[Scene]:
        for scene in super().scenes(split, limit, seed):
            queries = [replace(query, mask=self.change(np.asarray(query.mask))) for query in scene.queries]
            yield replace(scene, queries=queries)


def scores(data: FakeData) -> list[tuple[float, float]]:
    rows = compare(FakeModel(), data, ["none", "uniform"], budget=0.5, limit=5, timing_samples=0).rows
    return [(row.giou, row.ciou) for row in rows]


def test_comparisons_give_the_same_whatever_stores_the_targets() -> None:
    wanted = scores(FakeData())
    assert scores(Stored(lambda mask: mask.astype(np.uint8))) == wanted
    assert scores(Stored(lambda mask: (mask.astype(np.uint8) * 255) == 255)) == wanted


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda mask: mask.astype(np.uint8) * 255, "has 255 and no 1, .*give bool: mask == 255"),
        (lambda mask: mask.astype(np.int64) * 2, "has the values 2"),
        (lambda mask: -mask.astype(np.int64), "has the values -1"),
    ],
)
def test_a_data_set_is_refused_with_its_name_and_the_cure(change: Callable[[Any], Any], message: str) -> None:
    with pytest.raises(PluginError, match=rf"dataset 'rectangles' .*scene .*, the mask of '.*', which {message}"):
        scores(Stored(change))
    scene = next(iter(Stored(change).scenes("val", 1, 0)))
    with pytest.raises(InputError, match=message):
        run_query(FakeModel(), scene, scene.queries[0])


@given(BOOLS, BOOLS, BOOLS)
def test_a_target_may_be_ignored_as_a_whole(mask: Any, target: Any, void: Any) -> None:
    labels = with_ignored(target, void)
    assert foreground(labels).tolist() == (target & ~void).tolist()
    assert ignored(labels).tolist() == void.tolist()
    assert metrics.overlap(mask, labels) == ((mask & target & ~void).sum(), ((mask | target) & ~void).sum())
    assert {type(foreground(labels)), type(ignored(labels))} == {np.ndarray}


def test_only_the_labels_themselves_may_be_0_and_255() -> None:
    labels = with_ignored(np.zeros(SHAPE, bool), np.eye(*SHAPE, dtype=bool))
    assert type(labels) is LabelMask
    for same in (labels, labels.view(), labels.copy(), labels[:2], pickle.loads(pickle.dumps(labels))):
        assert ignored(same).any()
    for other in (np.asarray(labels), labels + 0, (labels == 255) * np.uint8(255), np.where(labels, labels, 0)):
        assert type(other) is np.ndarray
        with pytest.raises(InputError, match=r"255 and no 1, .*does not count, tokenprune\.utils\.masks\.with_ignored"):
            ignored(other)
    for number in (labels.max(), labels.sum()):
        assert np.ndim(number) == 0
    labels[0, 5] = 7
    with pytest.raises(InputError, match="has the values 7"):
        ignored(labels)


def test_a_comparison_leaves_out_a_target_that_is_ignored_as_a_whole() -> None:
    void = Stored(lambda mask: with_ignored(np.asarray(mask), np.ones_like(mask)))
    assert scores(void) == [(1.0, 1.0)] * 2
    scene = next(iter(void.scenes("val", 1, 0)))
    record = run_query(FakeModel(), scene, scene.queries[0])
    assert record.outcomes[0].iou == 1.0


def test_targets_to_match_are_zero_and_one() -> None:
    targets = torch.zeros(2, *SHAPE, dtype=torch.uint8)
    targets[0, 1:], targets[1, :1] = 1, 1
    logits = torch.stack([targets[1], targets[0]]).float() * 8 - 4
    assert match_masks(logits, targets) == match_masks(logits, targets.bool()) == [(0, 1), (1, 0)]
    for wrong in (targets * 255, targets.float() / 2):
        with pytest.raises(InputError, match="targets: some values are neither 0 nor 1; give bool"):
            match_masks(logits, wrong)


# files ---------------------------------------------------------------------------------------------------------------

PATTERN = np.array([[True, False, True, True], [False, False, True, False], [False] * 4])


def saved(folder: Path, pixels: Any, name: str = "mask.png", mode: str | None = None, **options: Any) -> Path:
    image = Image.fromarray(pixels)
    (image.convert(mode) if mode else image).save(folder / name, **options)
    return folder / name


def palette(pattern: Any, *colours: tuple[int, int, int]) -> Image.Image:
    image = Image.fromarray(np.uint8(pattern))
    image.putpalette([value for colour in colours for value in colour])
    return image


@pytest.mark.parametrize("white", ["target", "ignore"])
@pytest.mark.parametrize("pattern", [PATTERN, ~PATTERN, PATTERN & False])
def test_files_of_zeros_and_ones(tmp_path: Path, pattern: Any, white: Any) -> None:
    found = [read_mask(saved(tmp_path, pattern), white=white), read_mask(saved(tmp_path, np.uint8(pattern)))]
    for mask in found:
        assert (mask.dtype, mask.tolist()) == (bool, pattern.tolist())


@pytest.mark.parametrize("mode", [None, "RGB"])
@pytest.mark.parametrize("pattern", [PATTERN, PATTERN | True, PATTERN & False])
def test_white_is_the_target_unless_told(tmp_path: Path, pattern: Any, mode: str | None) -> None:
    path = saved(tmp_path, np.uint8(pattern) * 255, mode=mode)
    assert read_mask(path).tolist() == pattern.tolist()
    nothing = read_mask(path, white="ignore")
    assert not foreground(nothing).any()
    assert ignored(nothing).tolist() == pattern.tolist()


def test_pixels_that_do_not_count(tmp_path: Path) -> None:
    pixels = np.where(PATTERN, 1, 0).astype(np.uint8)
    pixels[2] = 255
    path = saved(tmp_path, pixels)
    mask = read_mask(path, white="ignore")
    assert (mask.dtype, mask.tolist()) == (np.uint8, pixels.tolist())
    assert ignored(mask).sum() == 4
    with pytest.raises(InputError, match=r"'.*mask\.png' has 1 and 255; .* read_mask\(path, white=\"ignore\"\)"):
        read_mask(path)


def test_palettes_count_by_their_greys(tmp_path: Path) -> None:
    path = tmp_path / "mask.png"
    palette(PATTERN, (255, 255, 255), (0, 0, 0)).save(path)
    assert read_mask(path).tolist() == (~PATTERN).tolist()
    palette(PATTERN, (0, 0, 0), (128, 0, 0)).save(path)  # as label maps have them
    with pytest.raises(InputError, match="of mode P has colours, expected greys of 8 bits; save it as a PNG"):
        read_mask(path)


def test_a_mask_is_turned_upright_as_its_picture_is(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    path = saved(tmp_path, np.uint8(PATTERN) * 255, exif=exif)
    assert read_mask(path, size=(4, 3)).tolist() == np.rot90(PATTERN, -1).tolist()


@pytest.mark.parametrize(
    ("name", "mode", "problem"),
    [
        ("mask.jpg", "L", r"has the values .*JPEG and resizing make values in between: save masks as PNG"),
        ("mask.png", "RGBA", "of mode RGBA has transparency, which may be the mask or not; save it as"),
        ("mask.png", "LA", "has transparency"),
        ("mask.png", "I;16", "of mode I;16 has greys of another depth"),
        ("mask.tif", "CMYK", "of mode CMYK has colours"),
    ],
)
def test_files_that_are_no_masks_are_refused(tmp_path: Path, name: str, mode: str, problem: str) -> None:
    pixels = np.kron(np.uint8(PATTERN) * 255, np.ones((5, 5), np.uint8))
    with pytest.raises(InputError, match=problem):
        read_mask(saved(tmp_path, pixels, name, mode))


def test_other_files_are_refused(tmp_path: Path) -> None:
    for values, shown in (([0, 1, 2], "values 2, expected"), ([0, 3, 9, 17, 33], "values 3, 9, 17, …, expected")):
        with pytest.raises(InputError, match=shown):
            read_mask(saved(tmp_path, np.array([values], np.uint8)))
    with pytest.raises(InputError, match="no such file"):
        read_mask(tmp_path / "none.png")
    (tmp_path / "text.png").write_text("no image")
    with pytest.raises(InputError, match=r"text\.png' cannot be read .*give an intact image file"):
        read_mask(tmp_path / "text.png")
    with pytest.raises(InputError, match="is 4×3, expected 3×4, the size of its image"):
        read_mask(saved(tmp_path, PATTERN), size=(4, 3))
    with pytest.raises(OptionError, match="white='void' found"):
        read_mask(tmp_path / "none.png", white="void")  # type: ignore[arg-type]
