"""ReasonSeg: images with a JSON file beside each, which has the sentences and the polygons.

Format and evaluation are those of LISA (Lai et al., 2024, https://arxiv.org/abs/2308.00692; its
`utils/data_processing.py` and `utils/dataset.py`).
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from tokenprune.datasets.files.annotation_files import item, json_of, words
from tokenprune.datasets.files.dataset import FileDataset, FileOptions, ListedQuery, ListedScene, Target
from tokenprune.datasets.files.segmentation import FARTHEST, check_installed, part_drawn
from tokenprune.errors import InputError
from tokenprune.utils.arguments import shown, unicode_problem
from tokenprune.utils.extras import install_extra
from tokenprune.utils.files import reason
from tokenprune.utils.masks import with_ignored

SPLITS: tuple[str, ...] = ("train", "val", "test")
ENCODINGS = ("utf-8", "cp1252")  # some of the original files are of the second
DEPRECATED = "flag"  # label of shapes that mean nothing


@dataclass(frozen=True)
class Shape:
    """A polygon; `is_ignored` if its pixels do not count."""

    points: tuple[tuple[float, float], ...]
    is_ignored: bool


class ReasonSeg(FileDataset):
    """ReasonSeg: reasoning segmentation, queries of kinds "long" (a sentence) and "short" (a phrase).

    Shapes with the label "flag" are left out. The others are drawn in order of area, the largest first, so that smaller
    ones cover larger ones: as the target, or as ignored pixels if the label contains "ignore". Polygons are drawn by
    pycocotools, as COCO's; with `faithful` by OpenCV, outline and inside, as in the original code: half a pixel larger
    on every side.
    """

    name = "reasonseg"
    splits = SPLITS
    kinds = ("long", "short")
    layout = "a folder with train, val or test, each with NAME.jpg and NAME.json"

    class Options(FileOptions):
        """Options of ReasonSeg."""

        texts: Literal["first", "all"] = Field(
            "first", description="Sentences of an image that are queries: the first, as in LISA's evaluation, or all."
        )
        faithful: bool = Field(False, description="Draw polygons with their outline, as the original code does.")

    options: Options

    def __init__(self, path: str | Path, *, name: str | None = None, **options: Any) -> None:
        super().__init__(path, name=name, **options)
        inside = (self.path, self.path / "ReasonSeg", self.path / "reason_seg" / "ReasonSeg")
        root = next((folder for folder in inside if any(os.path.isdir(folder / split) for split in SPLITS)), None)
        if root is None:
            up = f"; give the folder above it, {str(self.path.parent)!r}" if self.path.name in SPLITS else ""
            found = f"dataset {self.name!r}: no folder train, val or test is in {str(path)!r}"
            raise InputError(f"{found}{up or self._expected()}")
        (_opencv if self.options.faithful else check_installed)()
        self.root = root
        self.splits = tuple(split for split in SPLITS if os.path.isdir(root / split))  # type: ignore[misc]

    def listed(self, split: str) -> Sequence[ListedScene]:
        """See `FileDataset.listed`: in order of the files' names."""
        folder = self.root / split
        try:
            files = [file for file in folder.iterdir() if not file.name.startswith(".")]
        except OSError as error:
            found = f"{str(folder)!r} cannot be read ({reason(error)})"
            raise InputError(f"dataset {self.name!r}: {found}; check its permissions") from error
        images, texts = _by_stem(files, ".jpg"), _by_stem(files, ".json")
        if not texts:
            raise InputError(f"dataset {self.name!r}: no NAME.json is in {str(folder)!r}{self._expected()}")
        return [
            self._listed(images.get(stem, [folder / f"{stem}.jpg"]), texts.get(stem, [folder / f"{stem}.json"]))
            for stem in sorted({*images, *texts})
        ]

    def _listed(self, images: list[Path], texts: list[Path]) -> ListedScene:
        image, text = images[0], texts[0]
        stem = image.stem
        if problem := unicode_problem(stem):
            return ListedScene(ascii(stem)[1:-1], image, problem=f"the name of {str(image)!r} {problem}")
        for several in (images, texts):
            if len(several) > 1:
                found = " and ".join(sorted(file.name for file in several))
                return ListedScene(stem, image, problem=f"{str(image.parent)!r} has {found}; keep one of them")
        if not os.path.isfile(text):
            return ListedScene(stem, image, needs=(text,))
        try:
            queries = self._queries(stem, text)
        except InputError as error:
            return ListedScene(stem, image, problem=str(error))
        return ListedScene(stem, image, queries)

    def _queries(self, stem: str, file: Path) -> tuple[ListedQuery, ...]:
        found, where = json_of(file, ENCODINGS), repr(str(file))
        texts = item(found, "text", list, where)
        is_sentence = item(found, "is_sentence", bool, where)
        listed = item(found, "shapes", list, where)
        shapes = [_shape(shape, f"{where}, shape {number}") for number, shape in enumerate(listed, 1)]
        draw = partial(target_of, [shape for shape in shapes if shape], is_faithful=self.options.faithful)
        if not texts:
            raise InputError(f"{where} has an empty list 'text', expected at least one sentence")
        wanted = texts[:1] if self.options.texts == "first" else texts
        ids = [stem] if self.options.texts == "first" else [f"{stem}#{number}" for number in range(1, len(texts) + 1)]
        kind = "long" if is_sentence else "short"
        return tuple(
            ListedQuery(id, words(text, f"{where}, a text"), kind, draw, is_sentence)
            for id, text in zip(ids, wanted, strict=True)
        )


def target_of(shapes: Sequence[Shape], height: int, width: int, *, is_faithful: bool) -> Target:
    """The target that shapes make; see `ReasonSeg`. Raises InputError for a shape that has no area."""

    def draw(shape: Shape) -> NDArray[np.bool_]:
        return _drawn(shape, height, width, is_faithful)

    target, ignored = np.zeros((2, height, width), dtype=np.bool_)
    sizes = [draw(shape).sum() for shape in shapes] if len(shapes) > 1 else [0] * len(shapes)
    for number in np.argsort(sizes, kind="stable")[::-1]:  # of equal ones the last is drawn first, as in LISA
        area = draw(shapes[number])  # anew: all at once would need an image of memory each
        target[area] = not shapes[number].is_ignored
        ignored[area] = shapes[number].is_ignored
    return Target(with_ignored(target, ignored))


def _drawn(shape: Shape, height: int, width: int, is_faithful: bool) -> NDArray[np.bool_]:
    if not is_faithful:
        try:
            return part_drawn([value for point in shape.points for value in point], height, width)
        except InputError as error:
            raise InputError(f"{error}; repair it, or take faithful=true, which draws lines and points too") from error
    cv2 = _opencv()
    area = np.zeros((height, width), dtype=np.uint8)
    corners = [np.array(shape.points, dtype=np.int32)]  # cut, not rounded, as in the original
    cv2.polylines(area, corners, True, 1, 1)
    cv2.fillPoly(area, corners, 1)
    return area > 0


def _by_stem(files: list[Path], ending: str) -> dict[str, list[Path]]:
    """The files with this ending, in small letters or large, by the name before it."""
    found: dict[str, list[Path]] = {}
    for file in files:
        if file.suffix.lower() == ending:
            found.setdefault(file.stem, []).append(file)
    return found


def _shape(found: Any, where: str) -> Shape | None:
    """A shape; None if it is deprecated. Raises InputError."""
    label = item(found, "label", str, where).lower()
    if label == DEPRECATED:
        return None
    points = item(found, "points", list, where)
    if not points:
        raise InputError(f"{where} ({label!r}) has no points; remove the shape, or draw it")
    for point in points:
        is_pair = isinstance(point, (list, tuple)) and len(point) == 2
        if not is_pair or not all(type(value) in (int, float) and abs(value) <= FARTHEST for value in point):
            raise InputError(f"{where} ({label!r}) has the point {shown(point)}, expected [x, y] in pixels")
    return Shape(tuple((float(x), float(y)) for x, y in points), "ignore" in label)


def _opencv() -> Any:
    try:
        import cv2
    except ImportError:
        raise InputError(
            f"OpenCV, which draws faithful=true, is not installed; {install_extra('data')}, or leave faithful out"
        ) from None
    return cv2
