"""The dataset `photo-strips`: every strip and query follows from (split, seed, index)."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import Field

from tokenprune.datasets.base import Query, Scene
from tokenprune.datasets.endless import limited
from tokenprune.datasets.files.path_dataset import PathDataset, PathOptions
from tokenprune.datasets.strips.photographs import AGAIN, SPLITS, Photographs
from tokenprune.datasets.strips.queries import KINDS
from tokenprune.datasets.strips.strip import Strips
from tokenprune.errors import InputError, UnknownNameError

SPLIT_CODES = {"train": 20, "val": 21, "test": 22}


class PhotoStrips(PathDataset):
    """Strips of street photographs, with queries that are true for exactly one of the persons.

    Photographs and labels are those of Clothing Co-Parsing, colour words follow from the pixels. Kinds: "garment" ("the
    person wearing a hat"), "colour" ("who has a red dress on?"), "two" ("a red dress and a bag") and "without" ("the
    one who has no bag"). In val and test the ids of some queries end in "unseen": photo-small was not trained with
    their wording, or with their pair of colour and garment.

    Examples:
        >>> import tokenprune as tp
        >>> data = tp.dataset("photo-strips:/data/ccp")  # doctest: +SKIP
        >>> [query.text for query in next(data.scenes("test")).queries]  # doctest: +SKIP
    """

    name = "photo-strips"
    splits = SPLITS
    kinds = KINDS
    layout = "a folder with photos, labels and labels.json"

    class Options(PathOptions):
        """Options of the strips."""

        persons: int = Field(4, ge=2, le=8, description="Photographs in a strip.")
        queries: int = Field(4, ge=1, le=16, description="Queries about a strip, at most.")

    options: Options

    def __init__(self, path: str | Path, *, name: str | None = None, **options: Any) -> None:
        super().__init__(path, name=name, **options)
        if not (self.path / "labels.json").is_file():
            held = f"no labels.json is in {str(path)!r}"
            raise InputError(f"dataset {self.name!r}: {held}, expected {self.layout}; {AGAIN}")
        self._photographs = {split: Photographs(self.path, split) for split in SPLITS}

    def scenes(self, split: str, limit: int | None = None, seed: int = 0) -> Iterator[Scene]:
        """Yield strips without end, or until `limit` queries were given.

        Raises:
            UnknownNameError: no such split.
            OptionError: the limit is too high, see `limited`.
            InputError: a file cannot be read.
        """
        if split not in self.splits:
            raise UnknownNameError.among(f"split of dataset {self.name!r}", split, self.splits)
        return limited(self.name, self._drawn(split, seed), limit)

    def _drawn(self, split: str, seed: int) -> Iterator[Scene]:
        strips = Strips(self._photographs[split], self.options.persons)
        for index in count():
            # the tool that trains photo-small draws by [code, index], which is the same as [code, index, 0]
            strip = strips.draw(np.random.default_rng([SPLIT_CODES[split], index, seed]), self.options.queries)
            queries = [
                Query(
                    query.text,
                    query.kind,
                    strip.person(query.person),
                    query.is_sentence,
                    f"{split}-{seed}-{index}#{number}{'-unseen' if query.unseen else ''}",
                )
                for number, query in enumerate(strip.queries, 1)
            ]
            yield Scene(f"{self.name}-{split}-{seed}-{index}", strip.pixels, queries)
