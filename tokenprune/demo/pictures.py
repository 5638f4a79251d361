"""The pictures that strategies run on: scenes of `shapes`, whose targets are known, and uploaded ones."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

import numpy as np
from PIL import Image

from tokenprune.datasets.base import Dataset, Query, Scene
from tokenprune.datasets.shapes import Shapes
from tokenprune.errors import InputError
from tokenprune.utils.images import to_rgb

SCENES = 8
LONGEST = 1024  # pixels of a side; masks have the picture's size, and phones take pictures of 12 megapixels


@dataclass(frozen=True, eq=False)
class Asked:
    """One picture and one query about it.

    Attributes:
        scene: with this query alone; its target is empty if none is known.
        has_target: whether it is known.
    """

    scene: Scene
    has_target: bool


class Single(Dataset):
    """A dataset of one scene."""

    splits = ("only",)

    def __init__(self, scene: Scene) -> None:
        self._scene = scene
        self.name = scene.id  # type: ignore[misc]
        self.kinds = tuple(query.kind for query in scene.queries)  # type: ignore[misc]

    def scenes(self, split: str, limit: int | None = None, seed: int = 0) -> Iterator[Scene]:
        """The scene."""
        yield self._scene


def example_scenes() -> dict[str, tuple[Scene, int]]:
    """Queries of the first scenes of `shapes`, split val, by what the page calls them: the scene, and the number."""
    found = {}
    for number, scene in enumerate(islice(Shapes().scenes("val"), SCENES), 1):
        for place, query in enumerate(scene.queries):
            found[f"{number}: {query.text}"] = (scene, place)
    return found


def about_scene(scene: Scene, text: str) -> Asked:
    """A query about a scene of a dataset; its target is known if it is one of the scene's own.

    Raises:
        InputError: an empty query.
    """
    for number, query in enumerate(scene.queries):
        if query.text == text.strip():
            return Asked(scene.only([number]), has_target=True)
    return _without_target(scene, text)


def about_file(path: str | Path, text: str) -> Asked:
    """A query about an uploaded picture, which is reduced to at most `LONGEST` pixels a side.

    Raises:
        InputError: not an image, or an empty query.
    """
    try:
        picture = to_rgb(path)
    except InputError as error:
        raise InputError(str(error).replace(str(path), Path(path).name)) from error  # its folder says nothing to a user
    picture.thumbnail((LONGEST, LONGEST), Image.Resampling.LANCZOS)
    return _without_target(Scene("upload", np.asarray(picture), []), text)


def _without_target(scene: Scene, text: str) -> Asked:
    if not text.strip():
        raise InputError("the query is empty; say in words what to segment")
    unknown = np.zeros(scene.image.shape[:2], dtype=np.bool_)
    query = Query(text.strip(), "query", unknown, is_sentence=text.strip().endswith((".", "?")))
    return Asked(replace(scene, queries=[query]), has_target=False)
