"""The `shapes` dataset: every scene and query follows from (split, seed, index); nothing is stored. Ours."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from tokenprune.datasets.base import Dataset, Query, Scene
from tokenprune.datasets.shapes.queries import KINDS, Candidate, sample_queries
from tokenprune.datasets.shapes.scenes import HELD_OUT, DrawnScene, draw_scene
from tokenprune.errors import OptionError, TokenPruneError

MOST = 20_000
_SPLIT_CODES = {"train": 0, "val": 1, "test": 2, "heldout": 3}


class UnknownSplitError(TokenPruneError):
    """The dataset has no split of that name."""


def scene_generator(split: str, seed: int, index: int) -> np.random.Generator:
    """The random generator that scene `index` of a split is drawn with."""
    return np.random.default_rng([20250411, _SPLIT_CODES[split], seed, index])


def draw(split: str, seed: int, index: int) -> tuple[DrawnScene, list[tuple[str, Candidate]]]:
    """Scene `index` with up to one query of each kind, as (kind, (text, object)).

    In the split `heldout` every answer is an object of a held-out (colour, shape) pair.
    """
    rng = scene_generator(split, seed, index)
    scene = draw_scene(rng, held_out=split == "heldout")
    queries: list[tuple[str, Candidate]] = []
    for kind in KINDS:
        drawn = sample_queries(rng, scene.objects, kind, count=1 if split != "heldout" else 8)
        if split == "heldout":
            drawn = [c for c in drawn if (c[1].colour, c[1].shape) in HELD_OUT][:1]
        queries.extend((kind, candidate) for candidate in drawn)
    return scene, queries


class Shapes(Dataset):
    """Procedural reasoning segmentation: 256 x 256 scenes, four kinds of queries, at most one of each kind a scene."""

    name = "shapes"
    splits = tuple(_SPLIT_CODES)
    kinds = KINDS

    def scenes(self, split: str, limit: int | None = None, seed: int = 0) -> Iterator[Scene]:
        """Yield scenes without end, or until `limit` queries were given. Raises `UnknownSplitError`,
        and OptionError for more than `MOST` queries, which would be minutes of drawing."""
        if split not in self.splits:
            splits = ", ".join(self.splits)
            raise UnknownSplitError(f"dataset 'shapes' has no split {split!r}; choose one of {splits}")
        if limit is not None and limit > MOST:
            raise OptionError(
                f"dataset 'shapes' draws scenes one after the other, at most {MOST} queries; {limit} were asked for, "
                "choose a lower limit or index, or another seed"
            )
        index = given = 0
        while limit is None or given < limit:
            scene, drawn = draw(split, seed, index)
            index += 1
            if not drawn:
                continue
            queries = [Query(text, kind, scene.labels == item.label) for kind, (text, item) in drawn]
            if limit is not None:
                queries = queries[: limit - given]
            given += len(queries)
            yield Scene(f"shapes-{split}-{seed}-{index - 1}", scene.image, queries)
