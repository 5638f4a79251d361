"""The referring datasets in REFER's layout: RefCOCO, RefCOCO+, RefCOCOg, RefCLEF, and gRefCOCO."""

from __future__ import annotations

import warnings
from abc import abstractmethod
from collections.abc import Iterable, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
from pydantic import Field

from tokenprune.datasets.files.dataset import FileDataset, FileOptions, ListedQuery, ListedScene, Target, listing
from tokenprune.datasets.files.index_cache import Index
from tokenprune.datasets.files.refer.joined import joined
from tokenprune.datasets.files.refer.layout import INSTANCES, folder_of, images_of, list_of
from tokenprune.datasets.files.segmentation import drawn, summed
from tokenprune.errors import DataWarning, InputError, UnknownNameError

INDEX = "refer-2"  # to be raised when `joined` gives something else
COCO_IMAGES = ("images/mscoco/images/train2014", "images/train2014", "train2014")
CLEF_IMAGES = ("images/saiapr_tc-12", "saiapr_tc-12")
WITHOUT_OUTLINE = "sentences about an annotation without segmentation"


class ReferOptions(FileOptions):
    """Options of every dataset in REFER's layout."""

    images: str | Path | None = Field(
        None, description="Folder of the images; by default found beside or above the files."
    )


class PhraseOptions(ReferOptions):
    """Options of the datasets whose references are to one object; subclasses say which `splitby` there are."""

    splitby: str
    faithful: bool = Field(
        False,
        description="Masks as the original evaluations count them: pixels where parts of an annotation overlap are "
        "background, and an annotation without segmentation is an empty target.",
    )


class Refer(FileDataset):
    """A dataset in REFER's layout; a scene has all sentences about an image, references in the order of the file.

    A query is a sentence, in lower case, and its id is the `sent_id`. Subclasses define `name`, `kinds`, `images_at`
    and `several`, and the methods `lists` and `query_of`.
    """

    images_at: ClassVar[Sequence[str]]
    """Where the images may be, beside or above the files."""
    several: ClassVar[bool] = False
    """Whether a reference is to a list of annotations."""

    options: ReferOptions

    def __init__(self, path: str | Path, *, name: str | None = None, **options: Any) -> None:
        super().__init__(path, name=name, **options)
        self._folder = folder_of(self.path, type(self).name, self.lists())
        files = [list_of(self._folder, self.name, self.lists()), self._folder / INSTANCES]
        self._index = Index(INDEX, files, lambda: joined(files[0], files[1], self.several))
        self._parts: dict[str, Any] = {}

    @abstractmethod
    def lists(self) -> tuple[str, ...]:
        """Names that the list of references may have: "refs(unc).p"."""

    @abstractmethod
    def query_of(self, id: str, text: str, objects: list[Any]) -> ListedQuery | None:
        """A query about objects, given as COCO's segmentations; None if one is empty and cannot be used so."""

    @cached_property
    def splits(self) -> tuple[str, ...]:  # type: ignore[override]  # of the file, not of the class
        """The splits that the list of references has."""
        return tuple(self._index.part("splits"))

    def listed(self, split: str) -> Sequence[ListedScene]:
        """See `FileDataset.listed`.

        Raises:
            UnknownNameError: no such split.
            InputError: files are missing or damaged, or references cannot be used, unless `missing="skip"`.
        """
        scenes, problems = self._usable(split)
        self._tell(split, problems, bool(scenes))
        return scenes

    def unusable(self, split: str) -> list[str]:
        """See `FileDataset.unusable`."""
        return [f"{kind}: {item}" for kind, item, _ in self._usable(split)[1]]

    def _usable(self, split: str) -> tuple[list[ListedScene], list[Any]]:
        """The scenes with what can be used, and the problems of what cannot."""
        if split not in self.splits:
            raise UnknownNameError.among(f"split of dataset {self.name!r}", split, self.splits)
        if split not in self._parts:
            self._parts[split] = self._index.part(f"split {split}")
        part = self._parts[split]
        images = images_of(self._folder, self.name, self.options.images, self.images_at)
        problems = [*part["problems"]]
        scenes = [scene for entry in part["scenes"] if (scene := self._scene(entry, images, problems)).queries]
        return scenes, problems

    def _scene(self, entry: Any, images: Path, problems: list[Any]) -> ListedScene:
        queries = []
        for id, text, numbers in entry["queries"]:
            query = self.query_of(id, text, [entry["objects"][number] for number in numbers])
            if query is None:
                problems.append([WITHOUT_OUTLINE, f"sentence {id}", 1])
            else:
                queries.append(query)
        height, width = entry["size"]
        return ListedScene(str(entry["id"]), images / entry["file"], tuple(queries), (height, width))

    def _tell(self, split: str, problems: Iterable[Any], any_left: bool) -> None:
        by_kind: dict[str, list[str]] = {}
        queries = 0
        for kind, item, number in problems:
            by_kind.setdefault(kind, []).append(item)
            queries += number
        if not by_kind:
            return
        found = "; ".join(f"{kind}: {len(items)} ({listing(items)})" for kind, items in by_kind.items())
        found = f"dataset {self.name!r}, split {split!r}: {queries} queries cannot be used: {found}"
        if self.options.missing == "refuse" or not any_left:
            raise InputError(f"{found}; use files that belong together, or leave them out with the option missing=skip")
        warnings.warn(f"{found}; they are left out", DataWarning, stacklevel=6)


class Phrases(Refer):
    """References to one object each; subclasses define `name`, `layout`, `images_at` and `Options`."""

    kinds = ("phrase",)
    options: PhraseOptions

    def lists(self) -> tuple[str, ...]:
        """See `Refer.lists`."""
        return (f"refs({self.options.splitby}).p",)

    def query_of(self, id: str, text: str, objects: list[Any]) -> ListedQuery | None:
        """See `Refer.query_of`."""
        (segmentation,) = objects
        if not segmentation and not self.options.faithful:
            return None
        return ListedQuery(id, text, "phrase", partial(_one, segmentation, self.options.faithful))


class UncOrGoogle(PhraseOptions):
    """Options of RefCOCO and RefCOCO+."""

    splitby: Literal["unc", "google"] = Field(
        "unc", description="Whose splits: those of refs(unc).p or refs(google).p."
    )


class RefCOCO(Phrases):
    """Phrases for objects in pictures of COCO, collected in a game: Yu et al., 2016; Kazemzadeh et al., 2014."""

    name, layout, images_at = "refcoco", "refcoco/refs(unc).p and refcoco/instances.json", COCO_IMAGES

    class Options(UncOrGoogle):
        """See `UncOrGoogle`."""


class RefCOCOPlus(Phrases):
    """As RefCOCO, without words for locations: Yu et al., 2016."""

    name, layout, images_at = "refcoco+", "refcoco+/refs(unc).p and refcoco+/instances.json", COCO_IMAGES

    class Options(UncOrGoogle):
        """See `UncOrGoogle`."""


class RefCOCOg(Phrases):
    """Longer phrases, not collected in a game: Mao et al., 2016 (google); splits of Nagaraja et al., 2016 (umd)."""

    name, layout, images_at = "refcocog", "refcocog/refs(umd).p and refcocog/instances.json", COCO_IMAGES

    class Options(PhraseOptions):
        """Options of RefCOCOg."""

        splitby: Literal["umd", "google"] = Field(
            "umd", description="Whose splits: those of refs(umd).p or refs(google).p."
        )


class RefCLEF(Phrases):
    """Phrases for regions of the SAIAPR TC-12 pictures (ReferItGame): Kazemzadeh et al., 2014."""

    name, layout, images_at = "refclef", "refclef/refs(unc).p and refclef/instances.json", CLEF_IMAGES

    class Options(PhraseOptions):
        """Options of RefCLEF."""

        splitby: Literal["unc", "berkeley"] = Field(
            "unc", description="Whose splits: those of refs(unc).p or refs(berkeley).p."
        )


class GRefCOCO(Refer):
    """Phrases for one object, several or none: Liu et al., 2023 (GRES).

    Crowds among several objects are left out, as the authors' code does.
    """

    name, layout, images_at = "grefcoco", "grefcoco/grefs(unc).p or .json and grefcoco/instances.json", COCO_IMAGES
    kinds, several = ("one target", "several targets", "no target"), True

    class Options(ReferOptions):
        """See `ReferOptions`."""

    def lists(self) -> tuple[str, ...]:
        """See `Refer.lists`."""
        return ("grefs(unc).p", "grefs(unc).json")

    def query_of(self, id: str, text: str, objects: list[Any]) -> ListedQuery | None:
        """See `Refer.query_of`."""
        if not all(objects):
            return None
        kind = "no target" if not objects else "one target" if len(objects) == 1 else "several targets"
        return ListedQuery(id, text, kind, partial(_union, objects))


def _one(segmentation: Any, faithful: bool, height: int, width: int) -> Target:
    """The target of one annotation.

    The original evaluations sum the masks of an annotation's parts and count the classes 0 and 1 of the sum. A pixel of
    two parts has the value 2: no prediction there is an intersection, and a predicted pixel counts in the union, but a
    missing one does not. The same holds of background, so that the target is where the sum is 1.
    """
    if faithful:
        return Target(summed(segmentation, height, width) == 1)
    return Target(drawn(segmentation, height, width))


def _union(segmentations: list[Any], height: int, width: int) -> Target:
    masks = tuple(drawn(segmentation, height, width) for segmentation in segmentations)
    union = np.zeros((height, width), dtype=np.bool_)
    for mask in masks:
        union |= mask
    return Target(union, masks)
