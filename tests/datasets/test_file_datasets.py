"""What datasets that are read from files share: names, options, limits, and files that are missing."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import tokenprune as tp
from tokenprune.datasets.by_name import split_path
from tokenprune.datasets.files.dataset import FileDataset, FileOptions, ListedQuery, ListedScene, Target
from tokenprune.datasets.files.segmentation import drawn, summed
from tokenprune.datasets.validation import check_request, counted_scenes, numbered_scenes
from tokenprune.errors import DataWarning, InputError, OptionError, UnknownNameError
from tokenprune.plugins import registry
from tokenprune.plugins.hookspecs import hookimpl
from tokenprune.utils.images import to_rgb


def left_half(height: int, width: int) -> Target:
    mask = np.zeros((height, width), dtype=np.bool_)
    mask[:, : width // 2] = True
    return Target(mask)


class Halves(FileDataset):
    """NAME.png, two queries each."""

    name, splits, kinds, layout = "halves", ("val",), ("half",), "NAME.png"

    class Options(FileOptions):
        size: int = 0

    options: Options

    def listed(self, split: str) -> Sequence[ListedScene]:
        size = (self.options.size,) * 2 if self.options.size else None
        return [
            ListedScene(
                str(number),
                self.path / f"{number}.png",
                tuple(ListedQuery(f"{number}-{side}", f"the {side} half", "half", left_half) for side in "ab"),
                size,
            )
            for number in range(15)
        ]


class Cornered(FileDataset):
    """image.jpg, 60 × 40 as its annotations say; the target is the left upper quarter."""

    name, splits, kinds, layout = "cornered", ("val",), ("corner",), "image.jpg"

    class Options(FileOptions):
        annotated: tuple[int, int] = (40, 60)

    options: Options

    def listed(self, split: str) -> Sequence[ListedScene]:
        def corner(height: int, width: int) -> Target:
            mask = np.zeros((height, width), dtype=np.bool_)
            mask[: height // 2, : width // 2] = True
            return Target(mask)

        height, width = self.options.annotated
        query = ListedQuery("0", "the bright corner", "corner", corner)
        return [ListedScene("0", self.path / "image.jpg", (query,), (height, width))]


class Plugin:
    @hookimpl
    def tokenprune_register_datasets(self, register: Any) -> None:
        register("halves", Halves)
        register("others", Halves)
        register("cornered", Cornered)


@pytest.fixture(autouse=True)
def registered() -> Any:
    registry.register_plugin(Plugin(), "halves-of-images")
    yield
    registry.unregister_plugin("halves-of-images")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for number in range(15):
        Image.new("RGB", (8, 6), (number, 0, 0)).save(tmp_path / f"{number}.png")
    return tmp_path


def test_by_name_and_path(folder: Path) -> None:
    data = tp.dataset(f"others:{folder}")
    assert (data.name, data.splits) == ("others", ("val",))
    scenes = list(data.scenes("val"))
    assert [scene.id for scene in scenes] == [str(number) for number in range(15)]
    assert [query.id for query in scenes[3].queries] == ["3-a", "3-b"]
    assert scenes[3].image[0, 0].tolist() == [3, 0, 0]
    assert scenes[0].queries[0].mask.sum() == 24
    assert tp.dataset(f"halves:{folder}").name == "halves"


def test_a_limit_counts_queries(folder: Path) -> None:
    scenes = list(tp.dataset(f"halves:{folder}").scenes("val", limit=5))
    assert [len(scene.queries) for scene in scenes] == [2, 2, 1]


def test_options_by_text_and_by_name(folder: Path) -> None:
    assert tp.dataset(f"halves:{folder},size=8").options.size == 8  # type: ignore[attr-defined]
    assert tp.dataset(f"halves:{folder}", size=8).options.size == 8  # type: ignore[attr-defined]
    assert split_path("/a,b/c,size=8,missing=skip") == ("/a,b/c", ["size=8", "missing=skip"])


def test_missing_images_are_told_once(folder: Path) -> None:
    for number in range(2, 14):
        (folder / f"{number}.png").unlink()
    said = "12 of 15 images, of 24 queries, are missing: "
    with pytest.raises(InputError, match=said) as told:
        list(tp.dataset(f"halves:{folder}").scenes("val"))
    assert str(told.value).count(".png") == 10
    assert "… and 2 more; complete the folder, or leave them out with the option missing=skip" in str(told.value)
    with pytest.warns(DataWarning, match=said) as warned:
        scenes = list(tp.dataset(f"halves:{folder},missing=skip").scenes("val", limit=5))
    assert [(scene.id, len(scene.queries)) for scene in scenes] == [("0", 2), ("1", 2), ("14", 1)]
    assert [warning.category for warning in warned].count(DataWarning) == 1


def test_a_split_is_listed_and_warned_about_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "3.png").unlink()
    times = []
    listed = Halves.listed
    monkeypatch.setattr(Halves, "listed", lambda self, split: times.append(split) or listed(self, split))
    data = tp.dataset(f"halves:{folder},missing=skip")
    with pytest.warns(DataWarning, match="1 of 15 images") as warned:
        counted = list(counted_scenes(data, "val", None, 0))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        some = list(data.scenes("val", limit=5))
        (last,) = (scene for _, scene in numbered_scenes(data, "val", None, 0, lambda number, _: number == 13))
    assert (times, [warning.category for warning in warned].count(DataWarning)) == (["val"], 1)
    assert counted == [(number, 2) for number in range(14)]
    assert [(scene.id, len(scene.queries)) for scene in some] == [("0", 2), ("1", 2), ("2", 1)]
    assert (last.id, len(last.queries)) == ("14", 2)


def test_a_split_that_is_refused_is_listed_again(folder: Path) -> None:
    data = tp.dataset(f"halves:{folder}")
    (folder / "3.png").rename(folder / "gone.png")
    with pytest.raises(InputError, match="1 of 15 images"):
        list(data.scenes("val"))
    (folder / "gone.png").rename(folder / "3.png")
    assert len(list(data.scenes("val"))) == 15


def test_nothing_left_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="15 of 15 images"):
        list(tp.dataset(f"halves:{tmp_path},missing=skip").scenes("val"))


def test_images_of_another_size_are_refused(folder: Path) -> None:
    with pytest.raises(InputError, match=r"is 8×6, but its annotations are made for 9×9; use the images that belong"):
        next(iter(tp.dataset(f"halves:{folder}", size=9).scenes("val")))


def write_turned(folder: Path, orientation: int, size: tuple[int, int] = (60, 40)) -> None:
    """image.jpg, bright in the left upper quarter as stored."""
    pixels = np.zeros((size[1], size[0], 3), dtype=np.uint8)
    pixels[: size[1] // 2, : size[0] // 2] = 255
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(pixels).save(folder / "image.jpg", exif=exif, quality=95)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_images_are_in_the_frame_of_the_annotations(tmp_path: Path, orientation: int) -> None:
    """Stored as annotated: a turn by 90° would not fit, so the image stays as stored; else it is turned upright."""
    write_turned(tmp_path, orientation)
    data = tp.dataset(f"cornered:{tmp_path}")
    if orientation in (2, 3, 4):
        with pytest.warns(DataWarning, match=f"has the EXIF orientation {orientation}, and its annotations may be for"):
            (scene,) = data.scenes("val")
        assert np.array_equal(scene.image, np.asarray(to_rgb(tmp_path / "image.jpg")))
        return
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        (scene,) = data.scenes("val")
    assert scene.image.shape[:2] == (40, 60)
    assert np.array_equal(scene.image.mean(axis=2) > 128, scene.queries[0].mask)


@pytest.mark.parametrize("orientation", [5, 6, 7, 8])
def test_images_annotated_upright_are_turned(tmp_path: Path, orientation: int) -> None:
    write_turned(tmp_path, orientation, (40, 60))
    (scene,) = tp.dataset(f"cornered:{tmp_path}").scenes("val")
    assert np.array_equal(scene.image, np.asarray(to_rgb(tmp_path / "image.jpg")))
    assert scene.image.shape[:2] == (40, 60)


def test_the_orientation_is_named_where_no_frame_fits(tmp_path: Path) -> None:
    write_turned(tmp_path, 6)
    with pytest.raises(InputError, match=r"is 40×60 \(stored as 60×40, with the EXIF orientation 6\), but its annot"):
        next(iter(tp.dataset(f"cornered:{tmp_path},annotated=[30,60]").scenes("val")))


@pytest.mark.parametrize(
    ("name", "options", "error", "message"),
    [
        ("halves", {}, OptionError, "dataset 'halves' is read from files: give their place, as in halves:/data/halves"),
        ("shapes:/data", {}, OptionError, "dataset 'shapes' takes no path and no options, found path '/data'"),
        ("shapes", {"size": 3}, OptionError, "takes no path and no options, found options size; give its name alone"),
        ("halves:/no/where", {}, InputError, "nothing is at '/no/where'; check the path; expected NAME.png"),
        ("halves:HERE", {"sizes": 3}, OptionError, r"dataset 'halves': .*'sizes'.*size"),
        ("halves:HERE,size=3", {"size": 3}, OptionError, "option 'size' is given twice"),
        ("halves:HERE,missing=no", {}, OptionError, "missing"),
        ("halvs:HERE", {}, UnknownNameError, "halvs"),
        ("my_module:Data", {"size": 3}, OptionError, "takes no options, found size"),
    ],
)
def test_mistakes(folder: Path, name: str, options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        tp.dataset(name.replace("HERE", str(folder)), **options)


def test_the_command_line_takes_it(folder: Path) -> None:
    assert check_request(f"halves:{folder}", "val", 3, 0).name == "halves"


# COCO's segmentations ------------------------------------------------------------------------------------------------


def test_polygons_are_united_and_summed() -> None:
    pytest.importorskip("pycocotools")
    first, second = [1, 1, 5, 1, 5, 5, 1, 5], [3, 3, 9, 3, 9, 7, 3, 7]
    expected = np.zeros((10, 12), dtype=int)
    expected[1:5, 1:5] += 1
    expected[3:7, 3:9] += 1
    assert np.array_equal(summed([first, second], 10, 12), expected)
    assert np.array_equal(drawn([first, second], 10, 12), expected > 0)
    assert not drawn([], 10, 12).any()


@pytest.mark.parametrize("number", [1, 2, 255, 256, 257, 512])
def test_parts_over_a_pixel_are_counted(number: int) -> None:
    pytest.importorskip("pycocotools")
    parts = [[1, 1, 5, 1, 5, 5, 1, 5]] * number
    expected = np.zeros((10, 12), dtype=int)
    expected[1:5, 1:5] = number
    assert np.array_equal(summed(parts, 10, 12), expected)
    assert np.array_equal(drawn(parts, 10, 12), expected > 0)


def packed(*lengths: int) -> str:
    """Compressed run lengths of at most three runs: five bits a character, lowest first, 32 where another follows."""
    text = ""
    for length in lengths:
        while True:
            bits, length = length & 31, length >> 5
            is_last = length == (-1 if bits & 16 else 0)
            text += chr(48 + bits + (0 if is_last else 32))
            if is_last:
                break
    return text


@pytest.mark.parametrize("seed", range(5))
def test_run_lengths_are_those_of_the_mask(seed: int) -> None:
    coder = pytest.importorskip("pycocotools.mask")
    mask = np.random.default_rng(seed).random((7, 9)) < 0.4
    flat = mask.flatten(order="F")  # column by column; the first run is of background
    counts, value, run = [], False, 0
    for pixel in flat:
        if pixel == value:
            run += 1
        else:
            counts.append(run)
            value, run = pixel, 1
    counts.append(run)
    plain = {"size": [7, 9], "counts": counts}
    packed = coder.encode(np.asfortranarray(mask.astype(np.uint8)))
    text = {"size": [7, 9], "counts": packed["counts"].decode()}
    for form in (plain, packed, text, [plain], [text, packed]):
        assert np.array_equal(drawn(form, 7, 9), mask)


@pytest.mark.parametrize(
    ("segmentation", "message"),
    [
        (5, "segmentation of type int found, expected polygons or run lengths"),
        ([[1, 2, 3, 4]], "expected x, y of at least three points"),
        ([[1, 2, 3, 4, 5, 6, 7]], "expected x, y of at least three points"),
        ([[1, 2, 3, float("nan"), 5, 6]], "expected x, y of at least three points"),
        ([["a", "b"]], "cannot be drawn"),
        ({"size": [3, 3], "counts": [9]}, r"run lengths for \[3, 3\] found, expected \[10, 12\]"),
        ({"counts": [9]}, "cannot be drawn"),
        ({"size": [10, 12], "counts": [5, 5]}, "run lengths of 10 pixels found, expected 120, those of the image"),
        ({"size": [10, 12], "counts": [10**9]}, "run lengths of 1000000000 pixels found, expected 120"),
        ({"size": [10, 12], "counts": [130, -10]}, "run length 1 is -10, expected none below 0"),
        ({"size": [10, 12], "counts": packed(130, -10)}, "run length 1 is -10, expected none below 0"),
        ({"size": [10, 12], "counts": [60.5, 59.5]}, "run length 60.5 found, expected whole numbers"),
        ({"size": [10, 12], "counts": [True, 119]}, "run length True found, expected whole numbers"),
        ({"size": [10, 12], "counts": ["60", "60"]}, "run length '60' found, expected whole numbers"),
        ({"size": [10, 12], "counts": packed(60, 60) + "P"}, "compressed run lengths end within a number"),
        ({"size": [10, 12], "counts": ""}, "run lengths of 0 pixels found, expected 120"),
        ({"size": [10, 12], "counts": "zzzz"}, "run lengths of .* pixels found, expected 120"),
        ([[0, 0, 1e9, 3, 5, 5]], r"has the coordinate 1e\+09, expected pixels of the image"),
        ({"size": [10, 12], "counts": [-4, "x"]}, "run length 'x' found, expected whole numbers"),
        ({"size": [10, 12], "counts": 120}, "cannot be drawn"),
    ],
)
def test_odd_segmentations_are_refused(segmentation: Any, message: str) -> None:
    pytest.importorskip("pycocotools")
    with pytest.raises(InputError, match=message):
        drawn(segmentation, 10, 12)


def test_a_dataset_tells_its_place(folder: Path) -> None:
    place = f"halves:{folder},size=8"
    assert tp.dataset(place).place == place  # type: ignore[attr-defined]
