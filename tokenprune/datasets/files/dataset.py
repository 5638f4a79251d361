"""The base class of datasets that are read from files: listed first, then read one image at a time."""

from __future__ import annotations

import warnings
from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from tokenprune.datasets.base import Dataset, Query, Scene
from tokenprune.errors import DataWarning, InputError, OptionError, UnknownNameError
from tokenprune.utils.files import expanded
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
        """Its files that are not there."""
        return [path for path in dict.fromkeys((self.image, *self.needs)) if not path.is_file()]


class FileOptions(BaseModel):
    """Options of every dataset that is read from files; subclasses add fields."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    missing: Literal["refuse", "skip"] = Field(
        "refuse", description="Missing images and masks: refuse the dataset, or skip their queries with a warning."
    )


class FileDataset(Dataset):
    """A dataset that is read from the user's files.

    Subclasses define `splits`, `kinds` and `listed`, and may define a nested class `Options` of `FileOptions`.

    Args:
        path: of the dataset's folder, or its file.
        name: that it is registered as; by default that of the class.
        options: fields of `Options`.

    Raises:
        InputError: there is nothing at the path.
        OptionError: an unknown option, or a value that it cannot take.
    """

    class Options(FileOptions):
        """See `FileOptions`."""

    options: FileOptions
    layout: ClassVar[str] = ""
    """What is expected at the path, for messages: "refcoco/refs(unc).p, …"."""

    def __init__(self, path: str | Path, *, name: str | None = None, **options: Any) -> None:
        self.name = name or type(self).name  # type: ignore[misc]  # one class may have several names
        self.path = expanded(path)
        if not self.path.exists():
            raise InputError(f"dataset {self.name!r}: nothing is at {str(path)!r}; check the path{self._expected()}")
        try:
            self.options = self.Options(**options)
        except ValidationError as error:
            raise OptionError.from_validation(f"dataset {self.name!r}", error, self.Options.model_fields) from None

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
        if split not in self.splits:
            raise UnknownNameError.among(f"split of dataset {self.name!r}", split, self.splits)
        for scene in self._to_read(split, limit):
            yield self.read(scene)

    def read(self, scene: ListedScene) -> Scene:
        """Open the image of a scene, and draw its targets. Raises InputError as `scenes` does."""
        image = self.opened(scene)
        height, width = image.shape[:2]
        if problem := self.size_problem(scene, height, width):
            raise InputError(problem)
        return Scene(scene.id, image, [self.drawn(scene, query, height, width) for query in scene.queries])

    def opened(self, scene: ListedScene) -> NDArray[np.uint8]:
        """The image of a scene, uint8 RGB [H, W, 3], upright. Raises InputError if it cannot be read."""
        from tokenprune.utils.images import to_rgb  # imports torch, which listing does without

        try:
            return np.asarray(to_rgb(scene.image))
        except InputError as error:
            raise InputError(f"dataset {self.name!r}: {error}") from error

    def size_problem(self, scene: ListedScene, height: int, width: int) -> str:
        """The error about an image of another size than its annotations; empty if they fit."""
        if scene.size in (None, (height, width)):
            return ""
        wanted = "×".join(str(side) for side in reversed(scene.size or ()))
        return (
            f"dataset {self.name!r}: image {str(scene.image)!r} is {width}×{height}, but its annotations are made "
            f"for {wanted}; use the images that belong to the annotations, in their original size"
        )

    def drawn(self, scene: ListedScene, query: ListedQuery, height: int, width: int) -> Query:
        """A query with its target, for an image of this size. Raises InputError if it cannot be drawn."""
        try:
            target = query.draw(height, width)
        except InputError as error:
            raise InputError(f"dataset {self.name!r}, image {scene.id!r}, query {query.id!r}: {error}") from error
        return Query(query.text, query.kind, target.mask, query.is_sentence, query.id, target.targets)

    def _to_read(self, split: str, limit: int | None) -> list[ListedScene]:
        """The scenes with the first `limit` queries, those with missing files left out; the last scene is cut."""
        scenes = self.listed(split)
        if problems := [scene.problem for scene in scenes if scene.problem]:
            more = f" (the first of {len(problems)} such problems: tokenprune data check)" if len(problems) > 1 else ""
            raise InputError(f"dataset {self.name!r}, split {split!r}: {problems[0]}{more}")
        absent = {id(scene): (scene, files) for scene in scenes if (files := scene.missing())}
        if absent:
            found = f"dataset {self.name!r}, split {split!r}: {_told(list(absent.values()), len(scenes))}"
            if self.options.missing == "refuse" or len(absent) == len(scenes):
                named = ", give its place with the option images" if "images" in self.Options.model_fields else ""
                raise InputError(f"{found}; complete the folder{named}, or leave them out with the option missing=skip")
            warnings.warn(f"{found}; their queries are left out", DataWarning, stacklevel=3)
        found_scenes, left = [], limit
        for scene in scenes:
            if id(scene) in absent:
                continue
            if left is not None and left <= 0:
                break
            cut = scene if left is None else replace(scene, queries=scene.queries[:left])
            left = None if left is None else left - len(cut.queries)
            found_scenes.append(cut)
        return found_scenes

    def _expected(self) -> str:
        return f"; expected {self.layout}" if self.layout else ""


def _told(absent: list[tuple[ListedScene, list[Path]]], total: int) -> str:
    """Which files of which of `total` scenes are missing: images, then others."""
    parts = []
    images = [scene for scene, files in absent if scene.image in files]
    if images:
        queries = sum(len(scene.queries) for scene in images)
        files = listing([str(scene.image) for scene in images])
        parts.append(f"{len(images)} of {total} images, of {queries} queries, are missing: {files}")
    others = [str(file) for scene, files in absent for file in files if file != scene.image]
    if others:
        parts.append(f"{len(others)} masks or annotations are missing: {listing(others)}")
    return "; ".join(parts)


def listing(names: Sequence[str]) -> str:
    """The first ten, and how many more there are."""
    more = f", … and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(name if name.isprintable() else repr(name) for name in names[:SHOWN]) + more
