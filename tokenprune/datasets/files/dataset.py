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
from tokenprune.errors import DataWarning, InputError, OptionError
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
        queries: about it, at least one.
        size: (height, width) that the annotations are made for; None = that of the image.
    """

    id: str
    image: Path
    queries: tuple[ListedQuery, ...]
    size: tuple[int, int] | None = None


class FileOptions(BaseModel):
    """Options of every dataset that is read from files; subclasses add fields."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    missing: Literal["refuse", "skip"] = Field(
        "refuse",
        description="Missing image files and unusable annotations: refuse the dataset, or skip their queries with a "
        "warning.",
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
        """The scenes of a split, in order, without opening an image.

        Raises:
            InputError: the files of the split are missing or damaged.
        """

    def scenes(self, split: str, limit: int | None = None, seed: int = 0) -> Iterator[Scene]:
        """See `Dataset.scenes`: in the order of the files, so `seed` changes nothing.

        Raises:
            InputError: files are missing (unless `missing="skip"`), an image or annotation cannot be read, or their
                sizes differ.
        """
        for scene in self.selected(split, limit):
            yield self.read(scene)

    def read(self, scene: ListedScene) -> Scene:
        """Open the image of a scene, and draw its targets. Raises InputError as `scenes` does."""
        image = self._image(scene)
        height, width = image.shape[:2]
        return Scene(scene.id, image, [self._drawn(scene, query, height, width) for query in scene.queries])

    def _image(self, scene: ListedScene) -> NDArray[np.uint8]:
        """The image in the frame that the annotations are made for: upright, unless only the stored image fits them.

        Pictures with an EXIF orientation may be annotated as they are stored, or upright. A turn by 90° shows in the
        size. Where both would fit, the upright image is taken, as OpenCV reads it, with a DataWarning.
        """
        from tokenprune.utils.images import exif_orientation, to_rgb  # import torch, which listing does without

        image = to_rgb(scene.image)
        if scene.size is None:
            return np.asarray(image)
        wanted, turned = scene.size[::-1], exif_orientation(scene.image)
        stored = to_rgb(scene.image, upright=False) if turned != 1 else image
        if image.size == wanted:
            if turned != 1 and stored.size == wanted:
                warnings.warn(
                    f"dataset {self.name!r}: image {str(scene.image)!r} has the EXIF orientation {turned}, and its "
                    "annotations may be for the upright or the stored image; they are taken to be for the upright one",
                    DataWarning,
                    stacklevel=4,
                )
            return np.asarray(image)
        if stored.size == wanted:
            return np.asarray(stored)
        exif = f" (stored as {_size(stored.size)}, with the EXIF orientation {turned})" if turned != 1 else ""
        raise InputError(
            f"dataset {self.name!r}: image {str(scene.image)!r} is {_size(image.size)}{exif}, but its annotations are "
            f"made for {_size(wanted)}; use the images that belong to the annotations, in their original size"
        )

    def _drawn(self, scene: ListedScene, query: ListedQuery, height: int, width: int) -> Query:
        try:
            target = query.draw(height, width)
        except InputError as error:
            raise InputError(f"dataset {self.name!r}, image {scene.id!r}, query {query.id!r}: {error}") from error
        return Query(query.text, query.kind, target.mask, query.is_sentence, query.id, target.targets)

    def missing_images(self, split: str) -> list[ListedScene]:
        """The scenes of a split whose image file is not there."""
        return [scene for scene in self.listed(split) if not scene.image.is_file()]

    def selected(self, split: str, limit: int | None) -> list[ListedScene]:
        """The scenes with the first `limit` queries, those without image left out; the last scene is cut.

        Raises:
            InputError: images are missing, see `missing`.
        """
        scenes = self.listed(split)
        absent = {id(scene): scene for scene in scenes if not scene.image.is_file()}
        if absent:
            queries = sum(len(scene.queries) for scene in absent.values())
            found = (
                f"dataset {self.name!r}, split {split!r}: {len(absent)} of {len(scenes)} images, of {queries} queries, "
                f"are missing: {listing([str(scene.image) for scene in absent.values()])}"
            )
            if self.options.missing == "refuse" or len(absent) == len(scenes):
                raise InputError(f"{found}; complete the folder, or leave them out with the option missing=skip")
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


def _size(size: tuple[int, int]) -> str:
    return f"{size[0]}×{size[1]}"


def listing(names: Sequence[str]) -> str:
    """The first ten, and how many more there are."""
    more = f", … and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more
