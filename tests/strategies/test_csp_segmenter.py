"""CSP's `seg_first` with a segmenter: a checkpoint from a folder, functions, no instance, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from strategy_bench import PIXELS, Bench

import tokenprune as tp
from tokenprune.datasets.shapes import Shapes
from tokenprune.errors import InputError, OptionError, PluginError
from tokenprune.testing.tiny_decoders import tiny_llama
from tokenprune_strategies.csp.csp import CSP
from tokenprune_strategies.csp.instance_masks import segment

SIDE = 14  # the grid of the bench's pictures, in cells of 4 pixels


def write_segmenter(folder: Path, family: str, seed: int = 2, *, instances: bool = True) -> None:
    """A tiny checkpoint with random masks, each with a sure class, or surely of no object."""
    from transformers import (
        DetrConfig,
        Mask2FormerConfig,
        Mask2FormerForUniversalSegmentation,
        Mask2FormerImageProcessor,
        MaskFormerConfig,
        MaskFormerForInstanceSegmentation,
        MaskFormerImageProcessor,
        SwinConfig,
    )

    torch.manual_seed(seed)
    heads = {"num_attention_heads": 2, "encoder_layers": 1, "num_queries": 6, "num_labels": 3}
    tower = SwinConfig(
        image_size=64,
        embed_dim=8,
        depths=[1, 1, 1, 1],
        num_heads=[1, 1, 2, 2],
        window_size=2,
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )
    if family == "mask2former":
        sizes = {"feature_size": 32, "mask_feature_size": 32, "hidden_dim": 32, "dim_feedforward": 16}
        config = Mask2FormerConfig(
            backbone_config=tower, encoder_feedforward_dim=16, decoder_layers=2, **heads, **sizes
        )
        model, processor = Mask2FormerForUniversalSegmentation(config), Mask2FormerImageProcessor
    else:
        decoder = DetrConfig(
            d_model=32,
            encoder_layers=1,
            decoder_layers=1,
            encoder_attention_heads=2,
            decoder_attention_heads=2,
            encoder_ffn_dim=16,
            decoder_ffn_dim=16,
            num_queries=6,
        )
        config = MaskFormerConfig(
            backbone_config=tower, decoder_config=decoder, fpn_feature_size=32, mask_feature_size=32, num_labels=3
        )
        model, processor = MaskFormerForInstanceSegmentation(config), MaskFormerImageProcessor
    with torch.no_grad():
        model.class_predictor.weight.zero_()
        model.class_predictor.bias.zero_()
        model.class_predictor.bias[0 if instances else -1] = 9.0
    try:
        made = processor(size={"height": 64, "width": 64})
    except ImportError as error:  # some releases of transformers
        pytest.skip(f"the image processor of {family} cannot be made here: {error}")
    model.save_pretrained(folder)
    made.save_pretrained(folder)


def masks_by_hand(folder: Path, family: str, picture: NDArray[np.uint8]) -> list[NDArray[np.bool_]]:
    """The checkpoint's panoptic segments, without a pipeline."""
    from transformers import AutoImageProcessor, AutoModelForUniversalSegmentation, MaskFormerForInstanceSegmentation

    processor = AutoImageProcessor.from_pretrained(folder)
    kind = MaskFormerForInstanceSegmentation if family == "maskformer" else AutoModelForUniversalSegmentation
    model = kind.from_pretrained(folder).eval()
    with torch.no_grad():
        output = model(**processor(images=[Image.fromarray(picture)], return_tensors="pt"))
    (found,) = processor.post_process_panoptic_segmentation(
        output, threshold=0.9, overlap_mask_area_threshold=0.5, target_sizes=[picture.shape[:2]]
    )
    return [np.asarray(found["segmentation"] == one["id"]) for one in found["segments_info"]]


def chosen_by_hand(masks: list[NDArray[np.bool_]], side: int, count: int) -> tuple[list[int], int]:
    """Representatives of an image of side × side cells, and the number of instances, the background among them."""
    labels = []
    for row in range(side):
        for column in range(side):
            covered = []
            for mask in masks:
                height, width = mask.shape[0] // side, mask.shape[1] // side
                covered.append(mask[row * height :, column * width :][:height, :width].mean())
            best = max(covered, default=0)
            labels.append(covered.index(best) + 1 if best >= 0.5 else 0)
    members = [[cell for cell, label in enumerate(labels) if label == one] for one in sorted(set(labels))]
    shares = [1] * len(members)
    while sum(shares) < count:  # one more for whoever is farthest below its part
        below = [count * len(own) / len(labels) - share for own, share in zip(members, shares, strict=True)]
        shares[below.index(max(below))] += 1
    picked = [
        own[int((place + 0.5) * len(own) / share)]
        for own, share in zip(members, shares, strict=True)
        for place in range(share)
    ]
    return sorted(picked), len(members)


@pytest.mark.parametrize("family", ["mask2former", "maskformer"])
def test_a_checkpoint_from_a_folder_chooses_as_by_hand(family: str, tmp_path: Path) -> None:
    picture = Bench(CSP(), [[SIDE**2]]).provide(tp.Pixels())[0].numpy()
    for seed in range(20):  # until random weights give several instances
        folder = tmp_path / str(seed)
        write_segmenter(folder, family, seed)
        expected, instances = chosen_by_hand(masks_by_hand(folder, family, picture), SIDE, 12)
        if instances > 3:
            break
    assert instances > 3
    strategy = CSP(clustering="seg_first", segmenter=str(folder), representatives=12)
    assert Bench(strategy, [[SIDE**2]]).run().trace.stages[0].kept == [expected]


def test_a_checkpoint_without_instances_leaves_one_background(tmp_path: Path) -> None:
    write_segmenter(tmp_path / "mask2former", "mask2former", instances=False)
    strategy = CSP(clustering="seg_first", segmenter=str(tmp_path / "mask2former"), representatives=7)
    kept = Bench(strategy, [[SIDE**2]]).run().trace.stages[0].kept
    assert kept == [chosen_by_hand([], SIDE, 7)[0]] == [[14, 42, 70, 98, 126, 154, 182]]


def test_a_function_on_the_bundled_model() -> None:
    """One mask for each colour; two queries about one picture need its masks once."""
    pictures: list[NDArray[np.uint8]] = []

    def by_colour(picture: NDArray[np.uint8]) -> NDArray[np.bool_]:
        pictures.append(picture)
        channel, bright = picture.argmax(-1), np.ptp(picture, -1) > 60
        return np.stack([bright & (channel == one) for one in range(3)])

    model, scene = tp.load("lisa-tiny"), next(Shapes().scenes("val"))
    strategy = tp.strategy("csp", clustering="seg_first", segmenter=by_colour, budget=0.35)
    queries = [query.text for query in scene.queries[:1]] * 2
    trace = model.segment(scene.image, queries, strategy=strategy).trace
    (picture,) = pictures
    assert picture.dtype == np.uint8
    expected, instances = chosen_by_hand(list(by_colour(picture)), 16, len(trace.stages[0].kept[0]))
    assert instances > 1
    assert trace.stages[0].kept == [expected] * 2


def lower_half(picture: NDArray[np.uint8]) -> NDArray[np.bool_]:
    return (np.arange(len(picture)) >= len(picture) // 2)[None, :, None].repeat(picture.shape[1], 2)


def test_behind_another_strategy_masks_are_still_those_of_the_whole_image() -> None:
    """Of the tokens that `Top` keeps, half of the last row's cells are in the lower half of the image."""

    class Top(tp.Strategy):
        name = "top"

        def stages(self, shape: tp.Shape) -> Any:
            yield tp.Stage("select", 0, 24)

        def choose(self, stage: tp.Stage, tokens: tp.Tokens) -> tp.Decision:
            return tp.Keep.where(tokens.active & (tokens.grid[..., 0] < 4))

    assert PIXELS == 56
    strategy = tp.Sequence(Top(), CSP(clustering="seg_first", segmenter=lower_half, representatives=4))
    kept = Bench(strategy, [[36]], grids=[[(6, 6)]]).run().trace.stages[1].kept[0]
    assert [token // 6 >= 3 for token in kept] == [False, False, False, True]  # 18 of 24 above, 6 below


@pytest.mark.parametrize(
    ("masks", "found"),
    [
        (np.full((1, 8, 6), 0.4), r"found masks of torch\.float64, expected bool; return scores > 0\.5"),
        (np.full((1, 8, 6), np.nan, np.float32), r"found masks of torch\.float32, expected bool"),
        (torch.ones(1, 8, 6) * 1j, r"found masks of torch\.complex64"),
        (np.arange(48).reshape(1, 8, 6), r".*int64 with the values \[1, 2, 3\].*labels == label"),
        (-np.ones((1, 8, 6), int), r".* with the values \[-1\]"),
        (np.ones((8, 6), bool), r"found masks of shape \[8, 6\], expected masks \[n, 8, 6\]"),
        (np.ones((2, 6, 8), bool), r"found masks of shape \[2, 6, 8\]"),
        ([], r"found masks of shape \[0\]"),
        (None, "found NoneType"),
        ({"masks": 1}, "found dict"),
    ],
)
def test_what_is_no_masks_is_refused(masks: Any, found: str) -> None:
    def mine(picture: Any) -> Any:
        return masks

    with pytest.raises(InputError, match=f"segmenter 'mine': {found}"):
        segment(mine, np.zeros((8, 6, 3), np.uint8))


@pytest.mark.parametrize(
    "masks", [np.ones((1, 8, 6), np.uint8), np.full((1, 8, 6), 255), torch.ones(1, 8, 6, dtype=int)]
)
def test_numbers_0_and_1_or_255_are_masks(masks: Any) -> None:
    assert segment(lambda picture: masks, np.zeros((8, 6, 3), np.uint8)).tolist() == np.ones((1, 8, 6), bool).tolist()
    assert segment(lambda picture: np.zeros((0, 8, 6)) > 0, np.zeros((8, 6, 3), np.uint8)).shape == (0, 8, 6)


def test_a_function_that_fails_is_named() -> None:
    def broken(picture: Any) -> Any:
        raise ZeroDivisionError("no weights")

    with pytest.raises(PluginError, match="'csp': segmenter 'broken' failed with ZeroDivisionError: no weights"):
        Bench(CSP(clustering="seg_first", segmenter=broken), [[SIDE**2]]).run()


def test_folders_of_other_things_are_named(tmp_path: Path) -> None:
    tiny_llama(1).save_pretrained(tmp_path / "language")
    write_segmenter(tmp_path / "bare", "mask2former")
    (tmp_path / "bare" / "preprocessor_config.json").unlink()
    for name in ("language", "bare", "missing"):
        with pytest.raises(
            OptionError, match=f"'segmenter': '.*{name}' is not an installed segmenter .* cannot be"
        ) as it:
            segment(str(tmp_path / name), np.zeros((8, 6, 3), np.uint8))
        assert "\n" not in str(it.value)
