"""The conformance kit for datasets: tests what comparisons assume about any dataset.

from tokenprune.testing.dataset_conformance import DatasetConformance

class TestMyData(DatasetConformance):
    dataset = "my-data"  # or "my-data:PATH", or "my_module:MyData"
"""

from __future__ import annotations

import warnings
from typing import ClassVar

import numpy as np
import pytest

from tokenprune.datasets.base import Dataset, Query, Scene
from tokenprune.datasets.by_name import dataset as by_name
from tokenprune.datasets.validation import scenes_of
from tokenprune.errors import PluginError, PluginWarning, TokenPruneError


class DatasetConformance:
    """Subclass it and define `dataset`; pytest does the rest.

    Attributes:
        dataset: registered name, with a path if it is read from files ("name:PATH"), or "module:Class".
        queries: how many queries of each split are tested.
    """

    dataset: ClassVar[str] = ""
    queries: ClassVar[int] = 8

    def data(self) -> Dataset:
        """A new instance of the dataset."""
        if not self.dataset:
            raise pytest.UsageError(f"{type(self).__name__}: give dataset, a registered name or module:Class")
        return by_name(self.dataset)

    def test_every_split_has_sound_scenes(self) -> None:
        """Images and masks have the shapes and types that comparisons read; a query has words."""
        for split in self.data().splits:
            assert self._scenes(split), f"split {split!r} has no scene"

    def test_kinds_are_declared(self) -> None:
        """Results are given for each of `kinds`, so every query has one of them."""
        kinds = self.data().kinds
        for split in self.data().splits:
            for scene in self._scenes(split):
                for query in scene.queries:
                    assert query.kind in kinds, f"{query.text!r} is of kind {query.kind!r}, declared are {kinds}"

    def test_limit_counts_queries(self) -> None:
        """The last scene is cut to meet it."""
        for split in self.data().splits:
            there = len(_queries(self._scenes(split)))
            for limit in range(1, there + 1):
                found = len(_queries(self._scenes(split, limit)))
                assert found == limit, f"split {split!r} gave {found} queries, of which there are {there}, for {limit}"

    def test_the_same_seed_gives_the_same(self) -> None:
        """Equal requests give equal queries."""
        for split in self.data().splits:
            first, again = self._scenes(split), self._scenes(split)
            assert [scene.id for scene in first] == [scene.id for scene in again]
            for one, other in zip(first, again, strict=True):
                assert np.array_equal(one.image, other.image), f"scene {one.id!r} has another image the second time"
            for query, repeated in zip(_queries(first), _queries(again), strict=True):
                assert (query.text, query.kind, query.is_sentence) == (
                    repeated.text,
                    repeated.kind,
                    repeated.is_sentence,
                )
                assert np.array_equal(query.mask, repeated.mask), f"{query.text!r} has another mask the second time"

    def test_an_unknown_split_is_refused(self) -> None:
        """With an error that a command prints as one line."""
        with pytest.raises(TokenPruneError):
            list(self.data().scenes("no-such-split", 1, 0))

    def _scenes(self, split: str, limit: int | None = None) -> list[Scene]:
        limit = self.queries if limit is None else limit
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error", PluginWarning)  # a comparison cuts what is too much, with a warning
                return list(scenes_of(self.data(), split, limit, seed=0, any_kind=True))
        except (PluginError, PluginWarning) as problem:
            pytest.fail(str(problem))


def _queries(scenes: list[Scene]) -> list[Query]:
    return [query for scene in scenes for query in scene.queries]
