"""COCO's format: one JSON file of images, annotations and categories, with a text on each annotation or without.

Format: https://cocodataset.org/#format-data.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from tokenprune.datasets.files.annotation_files import item, json_of, side, words
from tokenprune.datasets.files.dataset import FileDataset, FileOptions, ListedQuery, ListedScene, Target
from tokenprune.datasets.files.places import KINDS, place_queries
from tokenprune.datasets.files.segmentation import check_installed, drawn
from tokenprune.errors import InputError
from tokenprune.utils.arguments import shown
from tokenprune.utils.files import expanded
from tokenprune.utils.masks import with_ignored

FIELDS = ("query", "queries", "caption", "captions", "ref")  # of an annotation that may have its text
NAMED = ("train", "val", "test")  # splits that are recognized in the name of a file
SAMPLES = 20  # images that the folder of the images is recognized by


@dataclass
class Asked:
    """One query while annotations are collected: what is wanted, and what does not count."""

    id: str
    text: str
    kind: str
    is_sentence: bool = False
    wanted: list[dict[str, Any]] = field(default_factory=list)
    crowds: list[dict[str, Any]] = field(default_factory=list)


class Coco(FileDataset):
    """A file in COCO's format.

    Queries are the texts of annotations, or names of categories: one query for an image and a category or text, whose
    target is the union of its annotations. Crowds (`iscrowd`) of the same category or text do not count, as in COCO's
    evaluation; they are never targets. With `queries="places"` a query is for one annotation: the only one of its
    category in the image, or one that its side or its size tells from the others (see `place_queries`).
    """

    name = "coco"
    splits = ("val",)
    kinds = ("category", "text", *KINDS)
    layout = "a JSON file with images, annotations and categories"

    class Options(FileOptions):
        """Options of COCO's format."""

        images: str = Field("", description="Folder of the images; by default looked for near the file.")
        queries: Literal["auto", "category", "text", "places"] = Field(
            "auto",
            description="Names of categories, texts of annotations, or (auto) texts if there are any; or places: one "
            "object of a category, by its place or size.",
        )
        field: str = Field("", description="Field of an annotation with its text or texts; by default one of a few.")
        split: str = Field("", description="Name of the split; by default train, val or test, as the file is named.")

    options: Options

    def __init__(self, path: str | Path, *, name: str | None = None, **options: Any) -> None:
        super().__init__(path, name=name, **options)
        if not os.path.isfile(self.path):
            held = "a folder" if os.path.isdir(self.path) else "no regular file"
            raise InputError(f"dataset {self.name!r}: {str(path)!r} is {held}, expected {self.layout}")
        check_installed()
        found = [word for word in re.findall(r"[a-z]+", self.path.stem.lower()) if word in NAMED]
        self.splits = (self.options.split or (found[0] if len(set(found)) == 1 else "val"),)  # type: ignore[misc]

    def listed(self, split: str) -> Sequence[ListedScene]:
        """See `FileDataset.listed`: images in the order of the file, those without a query left out."""
        asked: dict[Any, dict[str, Asked]] = {image: {} for image in self._images}
        problems: list[str] = []
        field = self._field
        ids = (one.get("id") for one in self._annotations if isinstance(one, dict))
        taken = Counter(str(id) for id in ids if isinstance(id, (int, str)))  # 3 and "3" would be one query
        for number, annotation in enumerate(self._annotations):
            where = f"{str(self.path)!r}, annotation {number}"
            try:
                identity = item(annotation, "id", (int, str), where)
                where = f"{str(self.path)!r}, annotation {identity!r}"
                if taken[str(identity)] > 1:
                    raise InputError(f"{where} is there {taken[str(identity)]} times; give each annotation its own id")
                self._add(asked, annotation, field, where)
            except InputError as error:
                problems.append(str(error))
        scenes = [self._scene(image, queries) for image, queries in asked.items()]
        wrong = [ListedScene(f"problem {number}", self.path, problem=said) for number, said in enumerate(problems, 1)]
        found = [scene for scene in scenes if scene.queries or scene.problem]
        if not found and not wrong:
            why = f"has text in {field!r}" if field else "has a category and is no crowd"
            why = "can be told from the others of its category" if self.options.queries == "places" else why
            raise InputError(f"dataset {self.name!r}: no annotation of {str(self.path)!r} {why}, so there is no query")
        return wrong + found

    @cached_property
    def _file(self) -> dict[str, Any]:
        found = json_of(self.path)
        for key in ("images", "annotations"):
            item(found, key, list, repr(str(self.path)))
        assert isinstance(found, dict)
        return found

    @cached_property
    def _images(self) -> dict[Any, dict[str, Any]]:
        found: dict[Any, dict[str, Any]] = {}
        taken: set[str] = set()
        for number, image in enumerate(self._file["images"]):
            where = f"{str(self.path)!r}, image {number}"
            identity = item(image, "id", (int, str), where)
            item(image, "file_name", str, where)
            if str(identity) in taken:
                raise InputError(f"{where} has the id {identity!r} of another image; give each its own id")
            taken.add(str(identity))
            found[identity] = image
        return found

    @property
    def _annotations(self) -> list[Any]:
        found: list[Any] = self._file["annotations"]
        return found

    @cached_property
    def _categories(self) -> dict[Any, str]:
        listed = item(self._file, "categories", list, repr(str(self.path)))
        names: dict[Any, str] = {}
        taken: set[str] = set()
        for number, one in enumerate(listed):
            where = f"{str(self.path)!r}, category {number}"
            identity = item(one, "id", (int, str), where)
            if str(identity) in taken:
                raise InputError(f"{where} has the id {identity!r} of another category; give each its own id")
            taken.add(str(identity))
            names[identity] = words(item(one, "name", str, where), f"{where}, its name")
        return names

    @cached_property
    def _field(self) -> str:
        """The field with the texts; empty for names of categories."""
        if self.options.queries in ("category", "places"):
            if self.options.field:
                given = f"queries={self.options.queries}"
                raise InputError(f"dataset {self.name!r}: field has no effect with {given}; leave one out")
            return ""
        candidates = (self.options.field,) if self.options.field else FIELDS
        targets = [one for one in self._annotations if isinstance(one, dict) and not one.get("iscrowd")]
        counts = Counter(key for one in targets for key in candidates if one.get(key))
        if len(counts) > 1:
            found = " and ".join(map(repr, counts))
            raise InputError(f"dataset {self.name!r}: annotations have {found}; choose one with the option field")
        if not counts:
            if self.options.queries == "auto" and not self.options.field:
                return ""
            expected = " or ".join(map(repr, candidates))
            raise InputError(f"dataset {self.name!r}: no annotation of {str(self.path)!r} has text in {expected}")
        ((field, count),) = counts.items()
        if count < len(targets) and self.options.queries == "auto":
            raise InputError(
                f"dataset {self.name!r}: {len(targets) - count} of {len(targets)} annotations have no {field!r}; leave "
                "those out with the option queries=text, or take names of categories with queries=category"
            )
        return field

    def _add(self, asked: dict[Any, dict[str, Asked]], annotation: dict[str, Any], field: str, where: str) -> None:
        image = item(annotation, "image_id", (int, str), where)
        if image not in self._images:
            raise InputError(f"{where} is about image {image!r}, which is not among the images")
        crowd = annotation.get("iscrowd", 0)
        if crowd not in (0, 1):
            raise InputError(f"{where} has 'iscrowd' {shown(crowd)}, expected 0 or 1")
        if not annotation.get("segmentation"):
            raise InputError(f"{where} has no 'segmentation'; boxes and captions alone give no target")
        for id, text, is_sentence in self._texts(annotation, image, field, where):
            query = asked[image].setdefault(text, Asked(id, text, "text" if field else "category", is_sentence))
            if not (query.wanted or crowd):
                query.id = id  # that of the first annotation which is a target
            members = query.crowds if crowd else query.wanted
            if not (members and members[-1] is annotation):  # a text that an annotation has twice
                members.append(annotation)

    def _texts(self, annotation: dict[str, Any], image: Any, field: str, where: str) -> Iterator[tuple[str, str, bool]]:
        """(id, text, is_sentence) of each query that an annotation belongs to."""
        if not field:
            category = item(annotation, "category_id", (int, str), where)
            if category not in self._categories:
                raise InputError(f"{where} is of category {category!r}, which is not among the categories")
            yield f"{image}-{category}", self._categories[category], False
            return
        given = annotation.get(field)
        if not given:
            return
        is_sentence = item(annotation, "is_sentence", bool, where) if "is_sentence" in annotation else False
        several = isinstance(given, list)
        for number, text in enumerate(given if several else [given], 1):
            id = f"{annotation['id']}#{number}" if several else str(annotation["id"])
            yield id, words(text, f"{where}, its {field!r}"), is_sentence

    def _scene(self, image: Any, asked: dict[str, Asked]) -> ListedScene:
        record, found = self._images[image], [one for one in asked.values() if one.wanted]
        file, where = self._folder / record["file_name"], f"{str(self.path)!r}, image {image!r}"
        size, by_place = None, self.options.queries == "places"
        try:
            if found and (by_place or "height" in record or "width" in record):
                size = side(record, "height", where), side(record, "width", where)
            if size and by_place:
                found = [query for one in found for query in placed(one, *size)]
        except InputError as error:
            return ListedScene(str(image), file, problem=str(error))
        queries = tuple(
            ListedQuery(one.id, one.text, one.kind, partial(target_of, one.wanted, one.crowds), one.is_sentence)
            for one in found
        )
        return ListedScene(str(image), file, queries, size)

    @cached_property
    def _folder(self) -> Path:
        """The folder of the images: the option, or the first place near the file that has one of the first images."""
        if self.options.images:
            folder = expanded(self.options.images)
            if not os.path.isdir(folder):
                raise InputError(f"dataset {self.name!r}: images {str(folder)!r} is not a folder; check the option")
            return folder
        here, above = self.path.parent, self.path.parent.parent
        names = [image["file_name"] for image in list(self._images.values())[:SAMPLES]]
        subset = self.path.stem.rsplit("_", 1)[-1]  # val2017 of instances_val2017.json
        near = [place / inner for place in (here, above) for inner in ("", "images", subset, f"images/{subset}")]
        return next((folder for folder in near if any(os.path.isfile(folder / name) for name in names)), here)


def placed(asked: Asked, height: int, width: int) -> list[Asked]:
    """Queries for single annotations of a category. Raises InputError for one that cannot be drawn."""
    masks = [(one, _drawn(one, height, width)) for one in asked.wanted]
    seen = [(one, mask) for one, mask in masks if mask.any()]
    return [
        Asked(f"{seen[number][0]['id']}-{kind}", text, kind, False, [seen[number][0]], asked.crowds)
        for text, number, kind in place_queries(asked.text, [mask for _, mask in seen])
    ]


def target_of(wanted: Sequence[dict[str, Any]], crowds: Sequence[dict[str, Any]], height: int, width: int) -> Target:
    """The union of annotations; crowds beside it do not count. Raises InputError for one that cannot be drawn."""
    targets = tuple(_drawn(one, height, width) for one in wanted)
    target = np.logical_or.reduce(targets)
    ignored = np.zeros_like(target)
    for crowd in crowds:
        ignored |= _drawn(crowd, height, width)
    return Target(with_ignored(target, ignored & ~target), targets if len(targets) > 1 else ())


def _drawn(annotation: dict[str, Any], height: int, width: int) -> NDArray[np.bool_]:
    try:
        return drawn(annotation["segmentation"], height, width)
    except InputError as error:
        raise InputError(f"annotation {annotation['id']!r}: {error}") from error
