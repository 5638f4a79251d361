"""The `shapes` dataset: every scene and query follows from (split, seed, index); nothing is stored. Ours.

Its two versions have the same scenes and other queries. They are two datasets by name, because results are stored
under the name of their dataset, and those of different queries must not be taken for the same.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import count
from typing import ClassVar

import numpy as np

from tokenprune.datasets.base import Dataset, Query, Scene
from tokenprune.datasets.endless import limited
from tokenprune.datasets.shapes.phrases import Candidate
from tokenprune.datasets.shapes.queries import KINDS, sample_queries
from tokenprune.datasets.shapes.scenes import HELD_OUT, DrawnScene, draw_scene
from tokenprune.errors import TokenPruneError

_SPLIT_CODES = {"train": 0, "val": 1, "test": 2, "heldout": 3}


class UnknownSplitError(TokenPruneError):
    """The dataset has no split of that name."""


def scene_generator(split: str, seed: int, index: int) -> np.random.Generator:
    """The random generator that scene `index` of a split is drawn with."""
    return np.random.default_rng([20250411, _SPLIT_CODES[split], seed, index])


def draw(split: str, seed: int, index: int, version: int = 1) -> tuple[DrawnScene, list[tuple[str, Candidate]]]:
    """Scene `index` with up to one query of each kind, as (kind, (text, object)).

    In the split `heldout` every answer is an object of a held-out (colour, shape) pair. `version` (1 or 2) changes
    the queries, not the scene.
    """
    rng = scene_generator(split, seed, index)
    scene = draw_scene(rng, held_out=split == "heldout")
    queries: list[tuple[str, Candidate]] = []
    for kind in KINDS:
        drawn = sample_queries(rng, scene.objects, kind, 1 if split != "heldout" else 8, version)
        if split == "heldout":
            drawn = [c for c in drawn if (c[1].colour, c[1].shape) in HELD_OUT][:1]
        queries.extend((kind, candidate) for candidate in drawn)
    return scene, queries


class Shapes(Dataset):
    """Procedural reasoning segmentation: 256 x 256 scenes, four kinds of queries, at most one of each kind a scene."""

    name = "shapes"
    version: ClassVar[int] = 1
    splits = tuple(_SPLIT_CODES)
    kinds = KINDS

    def scenes(self, split: str, limit: int | None = None, seed: int = 0) -> Iterator[Scene]:
        """Yield scenes without end, or until `limit` queries were given. Raises `UnknownSplitError`, and OptionError
        as `limited` does."""
        if split not in self.splits:
            splits = ", ".join(self.splits)
            raise UnknownSplitError(f"dataset {self.name!r} has no split {split!r}; choose one of {splits}")
        return limited(self.name, self._drawn(split, seed), limit)

    def _drawn(self, split: str, seed: int) -> Iterator[Scene]:
        for index in count():
            scene, drawn = draw(split, seed, index, self.version)
            queries = [Query(text, kind, scene.labels == item.label) for kind, (text, item) in drawn]
            if queries:
                yield Scene(f"{self.name}-{split}-{seed}-{index}", scene.image, queries)


class Shapes2(Shapes):
    """Version 2 of `shapes`: the same scenes; in relations the anchor decides, and no form of reasoning is rare."""

    name = "shapes-2"
    version = 2
