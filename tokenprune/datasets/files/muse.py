"""MUSE: questions about images of COCO, most of them for several objects.

Format of PixelLM (Ren et al., 2024, https://arxiv.org/abs/2312.02228; its `utils/multi_reason_seg_val_dataset.py`).
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from pydantic import Field

from tokenprune.datasets.files.annotation_files import item, json_of, side, words
from tokenprune.datasets.files.dataset import FileDataset, FileOptions, ListedQuery, ListedScene, Target
from tokenprune.datasets.files.segmentation import check_installed, drawn
from tokenprune.errors import InputError
from tokenprune.utils.arguments import shown
from tokenprune.utils.files import expanded

FILES = {"val": "muse_val.json", "test_less": "muse_test_less.json", "test_many": "muse_test_many.json"}
SUBSETS = ("train2014", "train2017", "val2017")
KINDS = ("none", "single", "multiple")  # by the number of targets: 0, 1, more
IMAGES = ("refer_seg/images/mscoco/images", "images/mscoco/images", "images", "")  # the first is PixelLM's own


class Muse(FileDataset):
    """MUSE, as PixelLM evaluates on it: each question is a query, with a target for each object of its answer.

    Kinds are the number of targets: "single", "multiple", and "none" for an empty answer. Polygons and run lengths are
    drawn by pycocotools; parts of one object are united (the original code adds them up, so that it holds 2 where they
    overlap). Images without annotations are left in their place; the original code puts the first image there.
    """

    name = "muse"
    splits: ClassVar[tuple[str, ...]] = tuple(FILES)
    kinds = KINDS
    layout = "a folder with muse_val.json, muse_test_less.json or muse_test_many.json"

    class Options(FileOptions):
        """Options of MUSE."""

        images: str = Field(
            "", description="Folder of train2014, train2017 and val2017; by default looked for beside the files."
        )

    options: Options

    def __init__(self, path: str | Path, *, name: str | None = None, **options: Any) -> None:
        super().__init__(path, name=name, **options)
        self.splits = tuple(split for split, file in FILES.items() if os.path.isfile(self.path / file))  # type: ignore[misc]
        if not self.splits:
            raise InputError(f"dataset {self.name!r}: no file of MUSE is in {str(path)!r}{self._expected()}")
        check_installed()
        places = [expanded(self.options.images)] if self.options.images else []
        places = places or [self.path / place for place in IMAGES]
        found = (place for place in places if any(os.path.isdir(place / subset) for subset in SUBSETS))
        self.images = next(found, places[0])
        if self.options.images and not os.path.isdir(self.images):
            raise InputError(f"dataset {self.name!r}: images {str(self.images)!r} is not a folder; check the option")

    def listed(self, split: str) -> Sequence[ListedScene]:
        """See `FileDataset.listed`: entries in the order of the file."""
        file = self.path / FILES[split]
        entries = json_of(file)
        if not isinstance(entries, list) or not entries:
            raise InputError(f"dataset {self.name!r}: {str(file)!r} is not a list of images; get the file again")
        scenes = []
        for number, entry in enumerate(entries):
            try:
                scenes.append(self._scene(entry, number, f"{str(file)!r}, entry {number}"))
            except InputError as error:
                scenes.append(ListedScene(f"entry {number}", file, problem=str(error)))
        return scenes

    def _scene(self, entry: Any, number: int, where: str) -> ListedScene:
        size = side(entry, "height", where), side(entry, "width", where)
        questions, answers = item(entry, "questions", list, where), item(entry, "answers", list, where)
        if len(questions) != len(answers) or not questions:
            found = f"{len(questions)} questions and {len(answers)} answers"
            raise InputError(f"{where} has {found}, expected as many, and at least one")
        image = self._image(entry, where)
        queries = []
        for place, (question, answer) in enumerate(zip(questions, answers, strict=True)):
            at = f"{where}, question {place}"
            if not isinstance(answer, list):
                raise InputError(f"{at}: its answer is {shown(answer)}, expected a list of objects")
            parts = [item(one, "segmentation", (list, dict), at) for one in answer]
            queries.append(
                ListedQuery(
                    f"{number}-{place}",
                    words(question, at),
                    KINDS[min(len(parts), 2)],
                    partial(target_of, parts),
                    is_sentence=True,
                )
            )
        return ListedScene(f"{number}-{image.stem}", image, tuple(queries), size)

    def _image(self, entry: dict[str, Any], where: str) -> Path:
        """Its file: of train2014 if it has a file_name, else of the folder that its coco_url names."""
        if "file_name" in entry:
            return self.images / "train2014" / Path(str(item(entry, "file_name", str, where))).name
        parts = str(item(entry, "coco_url", str, where)).split("/")
        if len(parts) < 2 or parts[-2] not in SUBSETS:
            raise InputError(f"{where} has coco_url {'/'.join(parts)!r}, expected …/train2017/NAME or …/val2017/NAME")
        return self.images / parts[-2] / parts[-1]


def target_of(parts: Sequence[Any], height: int, width: int) -> Target:
    """The union of objects, and each of several. Raises InputError for one that cannot be drawn."""
    targets = []
    for number, part in enumerate(parts):
        try:
            targets.append(drawn(part, height, width))
        except InputError as error:
            raise InputError(f"object {number} of its answer: {error}") from error
    union = np.logical_or.reduce(targets) if targets else np.zeros((height, width), dtype=np.bool_)
    return Target(union, tuple(targets) if len(targets) > 1 else ())
