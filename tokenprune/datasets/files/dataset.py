"""The base class of datasets of files: listed first, then read one image at a time."""

from __future__ import annotations

import os
import warnings
from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from tokenprune.datasets.base import Query, Scene
from tokenprune.datasets.files.path_dataset import PathDataset, PathOptions
from tokenprune.errors import DataWarning, InputError, UnknownNameError
from tokenprune.utils.masks import Mask

SHOWN = 10  # files that a message lists


@dataclass(frozen=True)
class Target:
    """What a query asks for, drawn.

    Attributes:
        mask: [H, W], see `Query`.
        targets: the single objects, where the query asks for several.
    """

    mask: Mask
    targets: tuple[NDArray[np.bool_], ...] = ()


@dataclass(frozen=True)
class ListedQuery:
    """A query as the files list it.

    Attributes:
        id, text, kind, is_sentence: see `Query`.
        draw: from the image's height and width to the target; called when the scene is read. Raises InputError for an
            annotation that cannot be drawn.
    """

    id: str
    text: str
    kind: str
    draw: Callable[[int, int], Target]
    is_sentence: bool = False


@dataclass(frozen=True)
class ListedScene:
    """An image as the files list it; it is not opened.

    Attributes:
        id: see `Scene`.
        image: its file.
        queries: about it, at least one; none if there is a problem or a file is missing.
        size: (height, width) that the annotations are made for; None = that of the image.
        needs: other files that it is read from, such as masks.
        problem: what is wrong with its annotations, if they cannot be read: which file and place, what was found, what
            was expected. `image` may then be the file with the annotations.
    """

    id: str
    image: Path
    queries: tuple[ListedQuery, ...] = ()
    size: tuple[int, int] | None = None
    needs: tuple[Path, ...] = ()
    problem: str = ""

    def missing(self) -> list[Path]:
        """Its files that are not there, or no regular files."""
        # os.path takes names that no file can have, which Path raises errors for
        return [path for path in dict.fromkeys((self.image, *self.needs)) if not os.path.isfile(path)]


class FileOptions(PathOptions):
    """Options of every dataset that lists its files; subclasses add fields."""

    missing: Literal["refuse", "skip"] = Field(
        "refuse",
        description="Missing images and masks, and unusable annotations: refuse the dataset, or skip their queries "
        "with a warning.",
    )


class FileDataset(PathDataset):
    """A dataset that lists the user's files first, then reads one image at a time.

    Subclasses define `splits`, `kinds` and `listed`, and may define a nested class `Options` of `FileOptions`. For
    arguments and errors see `PathDataset`.
    """

    class Options(FileOptions):
        """See `FileOptions`."""

    options: FileOptions

    @abstractmethod
    def listed(self, split: str) -> Sequence[ListedScene]:
        """The scenes of one of `splits`, in order, without opening an image.

        Raises:
            InputError: the files of the split are missing or damaged as a whole. What is wrong with a single scene is
                its `problem`, so that all can be listed.
        """

    def scenes(self, split: str, limit: int | None = None, seed: int = 0) -> Iterator[Scene]:
        """See `Dataset.scenes`: in the order of the files, so `seed` changes nothing.

        Raises:
            UnknownNameError: no such split.
            InputError: annotations cannot be read, files are missing (unless `missing="skip"`), an image cannot be
                read, a target cannot be drawn, or their sizes differ.
        """
        for scene in self.selected(split, limit):
            yield self.read(scene)

    def read(self, scene: ListedScene) -> Scene:
        """Open the image of a scene, and draw its targets. Raises InputError as `scenes` does."""
        image = self.opened(scene)
        if problem := self.size_problem(scene, image):
            raise InputError(problem)
        return Scene(scene.id, image, [self.drawn(scene, query, *image.shape[:2]) for query in scene.queries])

    def opened(self, scene: ListedScene) -> NDArray[np.uint8]:
        """The image, uint8 RGB [H, W, 3], in the frame of the annotations: upright, unless only the stored one fits.

        Pictures with an EXIF orientation may be annotated as they are stored, or upright. A turn by 90° shows in the
        size. Where both would fit, the upright image is taken, as OpenCV reads it, with a DataWarning. Where neither
        fits, there is a `size_problem`.

        Raises:
            InputError: the image cannot be read.
        """
        from tokenprune.utils.images import exif_orientation, to_rgb  # import torch, which listing does without

        try:
            image, turned = to_rgb(scene.image), exif_orientation(scene.image)
            if scene.size is None or turned == 1:
                return np.asarray(image)
            stored, wanted = to_rgb(scene.image, upright=False), scene.size[::-1]
        except InputError as error:
            raise InputError(f"dataset {self.name!r}: {error}") from error
        if image.size == wanted == stored.size:
            warnings.warn(
                f"dataset {self.name!r}: image {str(scene.image)!r} has the EXIF orientation {turned}, and its "
                "annotations may be for the upright or the stored image; they are taken to be for the upright one",
                DataWarning,
                stacklevel=4,
            )
        return np.asarray(stored if image.size != wanted == stored.size else image)

    def size_problem(self, scene: ListedScene, image: NDArray[np.uint8]) -> str:
        """The error about an opened image of another size than its annotations; empty if they fit."""
        if scene.size in (None, image.shape[:2]):
            return ""
        from tokenprune.utils.images import exif_orientation, to_rgb

        turned, exif = exif_orientation(scene.image), ""
        if turned != 1:
            stored = to_rgb(scene.image, upright=False).size
            exif = f" (stored as {_size(stored)}, with the EXIF orientation {turned})"
        found, wanted = (_size(size[1::-1]) for size in (image.shape, scene.size or ()))
        return (
            f"dataset {self.name!r}: image {str(scene.image)!r} is {found}{exif}, but its annotations are made for "
            f"{wanted}; use the images that belong to the annotations, in their original size"
        )

    def drawn(self, scene: ListedScene, query: ListedQuery, height: int, width: int) -> Query:
        """A query with its target, for an image of this size. Raises InputError if it cannot be drawn."""
        try:
            target = query.draw(height, width)
        except InputError as error:
            raise InputError(f"dataset {self.name!r}, image {scene.id!r}, query {query.id!r}: {error}") from error
        return Query(query.text, query.kind, target.mask, query.is_sentence, query.id, target.targets)

    def unusable(self, split: str) -> list[str]:
        """What is wrong with references that belong to no scene of `listed`, each in one line.

        With `missing="refuse"`, `listed` raises InputError if there are any. By default there are none: an image whose
        annotations cannot be used is a scene with a `problem`.
        """
        return []

    def selected(self, split: str, limit: int | None) -> list[ListedScene]:
        """The scenes with the first `limit` queries, those that cannot be used left out; the last scene is cut.

        A split is listed, and a warning says what is left out, at the first call; later changes of files are not seen.

        Raises:
            UnknownNameError: no such split.
            InputError: annotations cannot be used, or files are missing, see `missing`.
        """
        if split not in self.splits:
            raise UnknownNameError.among(f"split of dataset {self.name!r}", split, self.splits)
        if split not in self._listings:
            self._listings[split] = self._usable_scenes(split)
        found_scenes, left = [], limit
        for scene in self._listings[split]:
            if left is not None and left <= 0:
                break
            cut = scene if left is None else replace(scene, queries=scene.queries[:left])
            left = None if left is None else left - len(cut.queries)
            found_scenes.append(cut)
        return found_scenes

    @cached_property
    def _listings(self) -> dict[str, list[ListedScene]]:
        return {}

    def _usable_scenes(self, split: str) -> list[ListedScene]:
        scenes = self.listed(split)
        useless = {id(scene): (scene, scene.missing()) for scene in scenes if scene.problem or scene.missing()}
        if useless:
            found = f"dataset {self.name!r}, split {split!r}: {_told(list(useless.values()), len(scenes))}"
            if self.options.missing == "refuse" or len(useless) == len(scenes):
                named = ", give its place with the option images" if "images" in self.Options.model_fields else ""
                raise InputError(f"{found}; complete the folder{named}, or leave them out with the option missing=skip")
            warnings.warn(f"{found}; their queries are left out", DataWarning, stacklevel=4)
        return [scene for scene in scenes if id(scene) not in useless]


def _told(useless: list[tuple[ListedScene, list[Path]]], total: int) -> str:
    """What is wrong with which of `total` scenes: annotations, then images, then other files."""
    parts = []
    problems = [scene.problem for scene, _ in useless if scene.problem]
    if problems:
        more = f" (the first of {len(problems)} such problems: tokenprune data check)" if len(problems) > 1 else ""
        parts.append(problems[0] + more)
    absent = [(scene, files) for scene, files in useless if not scene.problem]
    images = [scene for scene, files in absent if scene.image in files]
    if images:
        queries = sum(len(scene.queries) for scene in images)
        names = listing([str(scene.image) for scene in images])
        parts.append(f"{len(images)} of {total} images, of {queries} queries, are missing: {names}")
    others = [str(file) for scene, files in absent for file in files if file != scene.image]
    if others:
        parts.append(f"{len(others)} masks or annotations are missing: {listing(others)}")
    return "; ".join(parts)


def _size(size: Sequence[int]) -> str:
    return f"{size[0]}×{size[1]}"


def listing(names: Sequence[str]) -> str:
    """The first ten, and how many more there are."""
    more = f", … and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(name if name.isprintable() else repr(name) for name in names[:SHOWN]) + more
